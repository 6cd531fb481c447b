"""The choice of a kernel for those calls of segment attention that the reference does not serve, and its launch.

Ours are ``hopper`` and ``portable``; ``sdpa-cudnn`` and ``sdpa-flash`` are torch's own attention, for plain dense
calls.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..common.configs import configured, fastest
from ..common.target import capability_of, on_device
from .arguments import SegmentCall, aligned


def choose_kernel(call: SegmentCall, wants_lse: bool) -> tuple[str, str]:
    """Returns which implementation serves a call that the Triton backend takes, and why; ``none`` without queries."""
    filled = [x for x in call.q if x.numel()]
    if not filled:
        return "none", "no queries"
    q, k, v = filled[0], call.k[0], call.v[0]
    capability, head_dim = capability_of(q.device), q.shape[3]
    dense = len(filled) == len(call.k) == 1 and call.valid_lengths[0] is None and not call.window and not wants_lse
    # cuDNN's attention takes views that are not aligned and computes something else (torch 2.11, cuDNN 9.19, H200).
    if dense and q.device.type == "cuda" and aligned(q, k, v):
        match = {"capability": capability, "dtype": str(q.dtype).removeprefix("torch."), "head_dim": head_dim}
        best, reason = fastest("attention", match, "tokens", k.shape[1])
        if best is None:
            # Published: cuDNN leads on Hopper and Blackwell (NVIDIA/cudnn-frontend), flash is at a RTX 4090's peak.
            best = "sdpa-cudnn" if capability is not None and capability >= 90 else "sdpa-flash"
        if best != "swifti2v":
            return best, f"one dense source: {reason}"
    return own_kernel(call)


def own_kernel(call: SegmentCall) -> tuple[str, str]:
    """Returns which of our kernels takes the call, and why."""
    capability = capability_of(call.q[0].device)
    if capability == 90:
        try:
            from . import hopper
        except (ImportError, AttributeError):  # Gluon is missing, or has other names
            return "portable", "the Hopper kernel does not take it: no Gluon in this Triton"
        if (obstacle := hopper.obstacle(call)) is not None:
            return "portable", f"the Hopper kernel does not take it: {obstacle}"
        return "hopper", "warp-specialised for capability 9.0"
    return "portable", "in Triton's interpreter" if capability is None else f"capability {capability / 10:.1f}"


def launch(call: SegmentCall, kernel: str = "") -> None:
    """Writes ``out`` and ``lse`` (empty if not wanted) by the kernel of this name, default that which is chosen."""
    filled = [i for i, x in enumerate(call.q) if x.numel()]
    if not filled:
        return
    call.check_lengths()
    kernel = kernel or choose_kernel(call, bool(call.lse))[0]
    if len(filled) < len(call.q):
        views = {name: [getattr(call, name)[i] for i in filled] for name in ("q", "out", "attends")}
        call = call._replace(**views, lse=[call.lse[i] for i in filled] if call.lse else ())
    q, head_dim, capability = call.q[0], call.q[0].shape[3], capability_of(call.q[0].device)
    with on_device(q.device):
        if kernel.startswith("sdpa"):
            call.out[0].copy_(sdpa(kernel, q, call.k[0], call.v[0], call.scale))
        elif kernel == "hopper":
            from .hopper import HopperConfig, launch_hopper

            config = configured("attention_hopper", 90, HopperConfig.heuristic(head_dim), head_dim=head_dim)
            launch_hopper(call, config)
        else:
            from .portable import PortableConfig, launch_portable

            described = aligned(*call.k, *call.v)
            heuristic = PortableConfig.heuristic(capability, head_dim, len(call.k), described)
            # Descriptors are unrolled for every source; without them a loop walks any number.
            unrolled = len(call.k) if heuristic.descriptors else 0
            key = {"head_dim": head_dim, "sources": unrolled, "aligned": int(described)}
            launch_portable(call, configured("attention_portable", capability, heuristic, **key))


def sdpa(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Returns torch's attention [B, L, H, D] by the back end of this name, or by the next one that takes the call."""
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    order = order[::-1] if name == "sdpa-flash" else order
    with sdpa_kernel([*order, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True):
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale)
    return out.transpose(1, 2)
