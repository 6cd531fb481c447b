"""The choice of a kernel for those calls of segment attention that the reference does not serve, and its launch.

Ours are ``hopper`` and ``portable``; ``sdpa-cudnn`` and ``sdpa-flash`` are torch's own attention, for plain dense
calls.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..common.checks import check_values
from ..common.configs import configured, fastest
from ..common.target import capability_of, on_device
from .arguments import SegmentCall


def choose_kernel(call: SegmentCall, wants_lse: bool) -> tuple[str, str]:
    """Returns which implementation serves a call that the Triton backend takes, and why; ``none`` without queries."""
    filled = [x for x in call.q if x.numel()]
    if not filled:
        return "none", "no queries"
    q, k, v = filled[0], call.k[0], call.v[0]
    capability, head_dim = capability_of(q.device), q.shape[3]
    dense = len(filled) == len(call.k) == 1 and call.valid_lengths[0] is None and not call.window and not wants_lse
    # cuDNN's attention takes views that are not aligned and computes something else (torch 2.11, cuDNN 9.19, H200).
    if dense and q.device.type == "cuda" and torch_takes(q, k, v):
        match = {"capability": capability, "dtype": str(q.dtype).removeprefix("torch."), "head_dim": head_dim}
        best, reason = fastest("attention", match, "tokens", k.shape[1])
        if best is None:
            # Published: cuDNN leads on Hopper and Blackwell (NVIDIA/cudnn-frontend), flash is at a RTX 4090's peak.
            best = "sdpa-cudnn" if capability is not None and capability >= 90 else "sdpa-flash"
        if best != "swifti2v":
            return best, f"one dense source: {reason}"
    return own_kernel(call)


def torch_takes(*views: Tensor) -> bool:
    """Returns whether torch's attention can be trusted with views: 16-byte aligned, strides multiples of 16 bytes.

    Fake tensors have no address; the offset of the view in its storage stands for it.
    """
    return all(
        (x.storage_offset() * x.itemsize if is_fake(x) else x.data_ptr()) % 16 == 0
        and all(s * x.itemsize % 16 == 0 for s, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1)
        for x in views
    )


def own_kernel(call: SegmentCall) -> tuple[str, str]:
    """Returns which of our kernels takes the call, and why."""
    capability = capability_of(call.q[0].device)
    if capability == 90:
        hopper = _hopper_module()
        obstacle = "no Gluon in this Triton" if hopper is None else hopper.obstacle(call)
        if obstacle is None:
            return "hopper", "warp-specialised for capability 9.0"
        return "portable", f"the Hopper kernel does not take it: {obstacle}"
    return "portable", "in Triton's interpreter" if capability is None else f"capability {capability / 10:.1f}"


def _hopper_module() -> ModuleType | None:
    """Returns the Hopper kernel's module, or None where this Triton's Gluon is missing or has other names."""
    try:
        return importlib.import_module(".hopper", __package__)
    except (ImportError, AttributeError):
        return None


def launch(kernel: str, call: SegmentCall, out: Sequence[Tensor], lse: Sequence[Tensor]) -> None:
    """Writes ``out`` and ``lse`` (empty if not wanted) by the kernel of this name."""
    filled = [i for i, x in enumerate(call.q) if x.numel()]
    q, out, attends = ([views[i] for i in filled] for views in (call.q, out, call.attends))
    call = SegmentCall(q, *call[1:5], attends, call.window, out, [lse[i] for i in filled] if lse else ())
    head_dim, capability = q[0].shape[3], capability_of(q[0].device)
    with on_device(q[0].device):
        if kernel.startswith("sdpa"):
            out[0].copy_(sdpa(kernel, q[0], call.k[0], call.v[0], call.scale))
        elif kernel == "hopper":
            from .hopper import HopperConfig, launch_hopper

            config = configured("attention_hopper", 90, HopperConfig.heuristic(head_dim), head_dim=head_dim)
            launch_hopper(call, config)
        else:
            from .portable import PortableConfig, descriptors_possible, launch_portable

            aligned = descriptors_possible(call)
            heuristic = PortableConfig.heuristic(capability, head_dim, len(call.k), aligned)
            # Descriptors are unrolled for every source; without them a loop walks any number.
            unrolled = len(call.k) if heuristic.descriptors else 0
            key = {"head_dim": head_dim, "sources": unrolled, "aligned": int(aligned)}
            launch_portable(call, configured("attention_portable", capability, heuristic, **key))


def prepare(call: SegmentCall, wants_lse: bool) -> str:
    """Checks what only real tensors can tell, and returns the kernel's name; ``none`` where there are no queries."""
    kernel = choose_kernel(call, wants_lse)[0]
    if kernel != "none":
        check_lengths(call)
    return kernel


def check_lengths(call: SegmentCall) -> None:
    """Checks that no source has fewer keys than are said to count.

    Raises:
        ValueError: one has, on the CPU.
    """
    for j, (x, k) in enumerate(zip(call.valid_lengths, call.k, strict=True)):
        if x is not None:
            check_values(f"valid_lengths[{j}]", x, 0, k.shape[1])


def sdpa(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Returns torch's attention [B, L, H, D] by the back end of this name, or by the next one that takes the call."""
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    order = order[::-1] if name == "sdpa-flash" else order
    with sdpa_kernel([*order, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True):
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale)
    return out.transpose(1, 2)
