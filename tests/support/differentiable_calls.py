"""Calls of every operator as functions of the tensors that they can be differentiated by, at toy sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from swifti2v_kernels import (
    BlockWindow,
    QuantizedRows,
    Rope3D,
    causal_conv3d,
    dequantize_rows,
    embed_window,
    frames_out,
    gated_residual_norm_modulate,
    linear_gelu,
    merge_attention,
    norm_modulate,
    norm_rope,
    project_step,
    qk_norm_rope,
    quantize_rows,
    rms_norm_silu,
    rope_3d,
    rope_from_tokens,
    scaled_linear,
    segment_attention,
    upsample_conv2d,
)


@dataclass(frozen=True)
class Differentiable:
    """A call ``function(*tensors)`` of an operator, for tensors of these shapes.

    ``writes`` says whether it writes into memory of the caller, which a batch of calls cannot share.
    """

    name: str
    operator: Callable[..., Any]
    function: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    writes: bool = False

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
        """Returns normal numbers of these shapes."""
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in self.shapes]

    def results(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Returns what the call gives, as a tuple of tensors."""
        return tuple(x for x in tree_flatten(self.function(*tensors))[0] if x.is_floating_point())


def _rope(like: Tensor) -> Rope3D:
    return rope_3d([0, 7], 1, 3, 16, device=like.device)


def _attention(q: Tensor, k: Tensor, v: Tensor, text: Tensor) -> Any:
    valid = torch.tensor([2, 0], dtype=torch.int32, device="cpu")
    return segment_attention(
        [q[:, :4], q[:, 4:]], [(k, v), (text, text * 2)], valid_lengths=[None, valid], attends=[[0, 1], [0]]
    )


def _rotated(cos: Tensor, sin: Tensor) -> Any:
    x = torch.linspace(-1, 1, 6 * 32, dtype=torch.float32, device="cpu").view(1, 6, 32)
    return norm_rope(x, torch.ones(32, dtype=torch.float32, device="cpu"), rope_from_tokens(cos, sin), 2)


def _channels_last(weight: Tensor) -> Tensor:
    return weight.permute(0, 4, 1, 2, 3)


def _frames(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
    return frames_out(x, _channels_last(weight), bias, torch.zeros(1, 2, 4, 5, 3, dtype=x.dtype, device=x.device))


def _embed(latents: Tensor, weight: Tensor, bias: Tensor, reference: Tensor) -> Any:
    index = torch.tensor([1, -1, 0], dtype=torch.int32, device="cpu")
    mask = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float32, device="cpu")
    return embed_window(latents, weight, bias, reference=reference, latent_index=index, mask=mask)


def _project(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, latents: Tensor, step: Tensor
) -> Any:
    index = torch.tensor([1, -1], dtype=torch.int32, device="cpu")
    return project_step(x, weight, bias, shift, scale, latents.clone(), latent_index=index, step=step)


def _scaled(scales: Tensor, weight_scales: Tensor, bias: Tensor, **options: Any) -> Any:
    values = torch.arange(-127, 129, device="cpu").remainder(61).sub(30).to(torch.int8).view(16, 16)
    x, weight = QuantizedRows(values[:6], scales), QuantizedRows(values.t().contiguous(), weight_scales)
    return scaled_linear(x, weight, bias.float(), activation="gelu_tanh", dtype=torch.float32, **options)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> Any:
    block_map = torch.tensor([1, 0], dtype=torch.int32, device="cpu")
    return norm_modulate(x, shift, scale, block_map=block_map, weight=weight, bias=bias)


def _dequantized(scales: Tensor) -> Any:
    values = torch.arange(-6, 6, dtype=torch.int8, device="cpu").view(3, 4)
    return dequantize_rows(values, scales, dtype=torch.float32)


_ROWS, _PART = (1, 6, 32), (1, 2, 32)
_HEAD = (2, 6, 2, 64)

CALLS = tuple(
    Differentiable(*call)
    for call in (
        ("segment_attention", segment_attention, _attention, (_HEAD, _HEAD, _HEAD, (2, 5, 2, 64))),
        ("segment_attention window lse", segment_attention,
         lambda q, k, v: segment_attention(q, [(k, v)], window=BlockWindow(3, 1), return_lse=True), (_HEAD,) * 3),
        ("segment_attention out", segment_attention,
         lambda q, k, v: segment_attention(q, [(k, v)], out=torch.zeros_like(q)), (_HEAD,) * 3, True),
        ("merge_attention", merge_attention, lambda a, b, lse_a, lse_b: merge_attention([a, b], [lse_a, lse_b]),
         ((1, 5, 2, 8),) * 2 + ((1, 2, 5),) * 2),
        ("norm_modulate", norm_modulate, _modulated, (_ROWS, _PART, _PART, (32,), (32,))),
        ("norm_modulate rms out", norm_modulate,
         lambda x, w: norm_modulate(x, weight=w, norm="rms", out=torch.zeros_like(x)), (_ROWS, (32,)), True),
        ("gated_residual_norm_modulate", gated_residual_norm_modulate, gated_residual_norm_modulate,
         (_ROWS, _ROWS, _PART, _PART, _PART)),
        ("qk_norm_rope", qk_norm_rope, lambda q, k, a, b: qk_norm_rope(q, k, a, b, _rope(q), 2),
         (_ROWS, _ROWS, (32,), (32,))),
        ("norm_rope", norm_rope, lambda x, w: norm_rope(x[:, 2:], w, _rope(x), 2, start=2, layout="half"),
         (_ROWS, (16,))),
        ("norm_rope by its tables", norm_rope, _rotated, ((6, 8), (6, 8))),
        ("rms_norm_silu", rms_norm_silu, rms_norm_silu, ((1, 1, 2, 3, 8), (8,))),
        ("causal_conv3d", causal_conv3d, lambda x, w, b, past, r, n: causal_conv3d(
            x, _channels_last(w), b, past=past, residual=r, norm_weight=n),
         ((1, 2, 4, 5, 8), (4, 3, 3, 3, 8), (4,), (1, 2, 4, 5, 8), (1, 2, 4, 5, 4), (4,))),
        # So large a weight that PyTorch sums the taps one after the other.
        ("causal_conv3d of many channels", causal_conv3d,
         lambda x, w, n: causal_conv3d(x, _channels_last(w), norm_weight=n)[1],
         ((1, 3, 2, 3, 36), (36, 3, 3, 3, 36), (36,))),
        ("upsample_conv2d", upsample_conv2d, lambda x, p, b, r: upsample_conv2d(x, p, b, residual=r),
         ((1, 1, 2, 3, 8), (4, 4, 2, 2, 8), (4,), (1, 1, 4, 6, 4))),
        ("upsample_conv2d norm", upsample_conv2d, lambda x, p, n: upsample_conv2d(x, p, norm_weight=n)[1],
         ((1, 1, 2, 3, 8), (4, 4, 2, 2, 8), (4,))),
        ("frames_out", frames_out, _frames, ((1, 2, 4, 5, 8), (3, 3, 3, 3, 8), (3,)), True),
        ("embed_window", embed_window, _embed, ((1, 4, 2, 4, 6), (16, 12, 1, 2, 2), (16,), (1, 4, 3, 4, 6))),
        ("project_step", project_step, _project,
         ((1, 12, 16), (16, 16), (16,), (1, 2, 16), (1, 2, 16), (1, 4, 3, 4, 6), (1,)), True),
        ("linear_gelu", linear_gelu, linear_gelu, ((2, 3, 16), (8, 16), (8,))),
        ("dequantize_rows", dequantize_rows, _dequantized, ((3,),)),
        ("scaled_linear", scaled_linear, _scaled, ((6,), (16,), (16,))),
        ("scaled_linear out", scaled_linear,
         lambda *x: _scaled(*x, out=torch.zeros(6, 16, dtype=torch.float32, device="cpu")), ((6,), (16,), (16,)), True),
        ("quantize_rows", quantize_rows, lambda x: quantize_rows(x, torch.int8), ((3, 8),)),
    )
)  # fmt: skip
