"""Seconds and memory of one forward pass of a host's model, as it is and with our operators in it.

The models are small random ones with the layers of the real kinds, so that attention over the tokens is most of their
work, as it is in video models.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bench.harness.timing import Timer, peak_of
from model.errors import require
from model.machine.counted import TensorMemory
from swifti2v_kernels.attention.segment_attention import KERNEL_HEAD_DIMS
from swifti2v_kernels.common.target import device_obstacle
from swifti2v_kernels.integrations.diffusers import accelerate

IDENTITY = ("model", "head_dim", "tokens", "mode", "provider")
METRICS = ("seconds", "peak_bytes", "speedup", "memory_ratio")
COLUMNS = ("model", "head_dim", "mode", "provider", *METRICS)
#: Axes of the rotation of HunyuanVideo, by head_dim.
_AXES = {24: (8, 8, 8), 64: (16, 24, 24), 128: (16, 56, 56)}
FRAMES, TEXT, MODES = 4, 64, ("inference", "gradients")


@dataclass(frozen=True)
class HostModel:
    """A kind of model: ``make`` builds it for a head_dim, ``inputs`` gives those of ``rows`` x ``columns`` tokens."""

    name: str
    make: Callable[[int], nn.Module]
    inputs: Callable[[nn.Module, int, int], dict[str, Any]]


def _wan(head_dim: int) -> nn.Module:
    import diffusers

    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=head_dim, in_channels=16, out_channels=16,
        text_dim=16, freq_dim=32, ffn_dim=8 * head_dim, num_layers=2, cross_attn_norm=True,
    )  # fmt: skip


def _wan_inputs(module: nn.Module, rows: int, columns: int) -> dict[str, Any]:
    noise = torch.randn(1, 16, FRAMES, 2 * rows, 2 * columns)
    return {
        "hidden_states": noise,
        "timestep": torch.tensor([900.0]),
        "encoder_hidden_states": torch.randn(1, TEXT, 16),
    }


def _hunyuan(head_dim: int) -> nn.Module:
    import diffusers

    return diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=head_dim, num_layers=1,
        num_single_layers=2, num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=_AXES[head_dim],
    )  # fmt: skip


def _hunyuan_inputs(module: nn.Module, rows: int, columns: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, FRAMES, 2 * rows, 2 * columns),
        "timestep": torch.tensor([900]),
        "encoder_hidden_states": torch.randn(1, TEXT, 16),
        # A third of the text is padding.
        "encoder_attention_mask": (torch.arange(TEXT) < TEXT * 2 // 3).unsqueeze(0),
        "pooled_projections": torch.randn(1, 8),
        "guidance": torch.tensor([6000.0]),
    }


def _ltx(head_dim: int) -> nn.Module:
    import diffusers

    return diffusers.LTXVideoTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=head_dim,
        cross_attention_dim=2 * head_dim, num_layers=2, caption_channels=16,
    )  # fmt: skip


def _ltx_inputs(module: nn.Module, rows: int, columns: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, FRAMES * rows * columns, 16),
        "encoder_hidden_states": torch.randn(1, TEXT, 16),
        "timestep": torch.tensor([900.0]),
        "encoder_attention_mask": (torch.arange(TEXT) < TEXT * 2 // 3).unsqueeze(0).long(),
        "num_frames": FRAMES,
        "height": rows,
        "width": columns,
        "rope_interpolation_scale": (0.4, 32, 32),
    }


MODELS = (
    HostModel("Wan", _wan, _wan_inputs),
    HostModel("HunyuanVideo, padded text", _hunyuan, _hunyuan_inputs),
    HostModel("LTX-Video, padded text", _ltx, _ltx_inputs),
)


def host_rows(
    host: HostModel, head_dim: int, side: int, device: torch.device, timer: Timer
) -> Iterator[dict[str, Any]]:
    """Yields two rows, the host's and ours, for a forward pass without gradients, and two with a backward pass.

    Args:
        host: the kind of model.
        head_dim: channels of a head; kernels of attention exist for 64, 96 and 128.
        side: rows and columns of tokens of a frame.
        device: where the model runs: in bfloat16 on a GPU, in float32 on a CPU.
        timer: times the host's pass and ours in turns.
    """
    require("diffusers", "diffusers")
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    plain = _loaded(host.make(head_dim), device, dtype)
    ours = copy.deepcopy(plain)
    with contextlib.redirect_stdout(io.StringIO()):  # its report
        accelerate(ours)
    inputs = {name: _placed(x, device, dtype) for name, x in host.inputs(plain, side, side).items()}
    kernels = device_obstacle(device) is None and head_dim in KERNEL_HEAD_DIMS
    for mode in MODES:
        by = "kernels" if kernels and mode == "inference" else "PyTorch"
        modules = {"diffusers": plain, f"accelerated, attention by {by}": ours}
        calls = {name: functools.partial(_pass, module, inputs, mode) for name, module in modules.items()}
        peaks = {name: _peak(call, device, inputs) for name, call in calls.items()}
        times = timer(calls)
        for name in modules:
            yield {
                "model": host.name, "head_dim": head_dim, "tokens": FRAMES * side * side, "mode": mode,
                "provider": name, **times[name].row(), "peak_bytes": peaks[name],
                "speedup": times["diffusers"].median / times[name].median,
                "memory_ratio": peaks["diffusers"] / peaks[name],
            }  # fmt: skip


def _loaded(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Returns the module as ``from_pretrained`` loads it: in ``dtype``, but for what its class keeps in float32."""
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.to(device, torch.float32 if kept & set(name.split(".")) else dtype)
    return module.eval().to(device)


def _placed(x: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(x, Tensor):
        return x
    return x.to(device, dtype) if x.is_floating_point() and x.ndim > 1 else x.to(device)


def _pass(module: nn.Module, inputs: dict[str, Any], mode: str) -> None:
    with torch.set_grad_enabled(mode == "gradients"):
        out = module(**inputs, return_dict=False)[0]
        if mode == "gradients":
            out.float().square().mean().backward()
            module.zero_grad(set_to_none=True)


def _peak(call: Callable[[], None], device: torch.device, inputs: dict[str, Any]) -> int:
    """Returns the most bytes that a call allocates beyond those before it, its weights' gradients among them."""
    call()
    if device.type == "cuda":
        return peak_of(call, device)[1]
    with TensorMemory(x for x in tree_leaves(inputs) if isinstance(x, Tensor)) as memory:
        before = memory.live
        call()
    return memory.peak - before
