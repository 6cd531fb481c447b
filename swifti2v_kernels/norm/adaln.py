"""Adaptive norms and gated residuals of a DiT layer, modulated per block of tokens.

    gated_residual:                x' = x + gate[r(t)] * update
    norm_modulate:                 y = (norm(x) * weight + bias) * (1 + scale[r(t)]) + shift[r(t)]
    gated_residual_norm_modulate:  x' as above, y = (norm(x') * weight + bias) * (1 + scale[r(t)]) + shift[r(t)]

``norm`` is LayerNorm or RMSNorm over the channels; ``weight`` and ``bias``, the pair ``shift``, ``scale``, and in the
third ``gate``, are optional. The L tokens are T blocks of L / T tokens (one block is one latent frame); ``r(t)`` is
the modulation row of the block of token ``t``: the block itself, or ``block_map[block]``, so that a window of five
blocks at two noise levels has two rows. Nothing is ever expanded per token: at 2560x1408 the modulation is 6 * R * C
numbers instead of 6 * 14,080 * T * C.

| tensor             | shape     | dtype                           | layout                                  |
|--------------------|-----------|---------------------------------|-----------------------------------------|
| x, update, x', y   | [B, L, C] | fp32, fp16, bf16 (fp64: torch)  | any batch and token strides; C contiguous |
| shift, scale, gate | [B, R, C] | any float; fp32 keeps them exact | any batch and row strides; C contiguous |
| weight, bias       | [C]       | any float                       | contiguous                              |
| block_map          | [T]       | int32                           | contiguous                              |

Statistics, modulation and sums are float32 (float64 for float64 input). x' is rounded once to its dtype and the norm
reads the rounded value, as PyTorch code that stores it would; y is rounded once.

With ``quantize``, y is float8_e4m3fn or int8 with one float32 scale a token (:mod:`swifti2v_kernels.linear.rows`),
rounded once too: from the float32 row in registers, never through x's dtype. ``scaled_linear`` takes it as it is; a
pass of its own would read and write all of y once more.

Why fused: a DiT layer adds three updates to its residual stream, each followed by a norm. Separately, an update moves
3 tensors (x and update read, x' written) and a norm 2 (x' read, y written); together they move 4 instead of 5, and
eager PyTorch in 16 bits, which stores every float32 intermediate, 33. Least traffic, in elements of B * L * C:
norm_modulate 1 read and 1 written (eager 18 in all), gated_residual 2 and 1 (15), the fused form 2 and 2 (33); a
quantised y is half of a written one in 16 bits. FLOPs: about 8 an element, 5 more to quantise it.

Limits: the kernel takes up to 8,192 channels on NVIDIA GPUs of compute capability 8.0 or newer (8.9 for float8) and has
no derivative: the PyTorch reference, which has one unless it quantises, computes the calls whose inputs need gradients.
Timed on an NVIDIA H200 only; quantised not yet timed on hardware.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.cost import Cost
from ..common.dispatch import Choice, public_operator, transform
from ..common.registration import add_op_namespace_prefix
from ..common.target import on_device
from ..linear.rows import QuantizedRows, new_rows, quantized_reference, written
from .adaln_arguments import check_outputs, prepare


def gated_residual_reference(x: Tensor, update: Tensor, gate: Tensor | None, block_map: Tensor | None) -> Tensor:
    """Returns ``x'`` of the formula above, differentiable."""
    if gate is None:
        return (_wide(x) + _wide(update)).to(x.dtype)
    gate = _rows(gate, block_map)
    blocks, updates = (_wide(t).unflatten(1, (gate.shape[1], -1)) for t in (x, update))
    return (blocks + updates * gate).flatten(1, 2).to(x.dtype)


def norm_modulate_reference(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    block_map: Tensor | None,
    norm: str,
    eps: float,
    quantize: torch.dtype | None = None,
) -> Tensor | QuantizedRows:
    """Returns ``y`` of the formula above, differentiable unless quantised."""
    y, width = _wide(x), x.shape[2:]
    weight, bias = (None if p is None else p.to(y.dtype) for p in (weight, bias))
    if norm == "layer":
        y = layer_norm_reference(y, weight, bias, eps)
    else:
        y = F.rms_norm(y, width, weight, eps)
        y = y if bias is None else y + bias
    if shift is not None and scale is not None:
        shift, scale = _rows(shift, block_map), _rows(scale, block_map)
        y = (y.unflatten(1, (shift.shape[1], -1)) * (1 + scale) + shift).flatten(1, 2)
    return y.to(x.dtype) if quantize is None else quantized_reference(y, quantize)


def layer_norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Returns the LayerNorm over the last axis."""
    if transform() is None:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    # Derivatives of torch's own forward-mode derivative of it are wrong.
    centred = x - x.mean(dim=-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rows(modulation: Tensor, block_map: Tensor | None) -> Tensor:
    """Returns the modulation of every block, [B, T, 1, C], in float32 at least; NaN for a row that is not there."""
    if block_map is None:
        return _wide(modulation).unsqueeze(2)
    rows = block_map.clamp(0, modulation.shape[1] - 1)
    missing = (block_map != rows).view(1, -1, 1)
    return _wide(modulation[:, rows]).masked_fill(missing, float("nan")).unsqueeze(2)


# What is written has no default: torch up to 2.11 leaves out arguments that equal theirs, and then misses it.
@torch.library.custom_op(
    add_op_namespace_prefix("adaln"),
    mutates_args=("x_out", "y_out", "y_scales"),
    schema=(
        "(Tensor x, Tensor? update, Tensor? gate, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias,"
        " Tensor? block_map, str norm, float eps, Tensor(a!)? x_out, Tensor(b!)? y_out,"
        " Tensor(c!)? y_scales) -> ()"
    ),
)
def _adaln_op(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    block_map: Tensor | None,
    norm: str,
    eps: float,
    x_out: Tensor | None,
    y_out: Tensor | None,
    y_scales: Tensor | None,
) -> None:
    parameters = {"gate": gate, "shift": shift, "scale": scale, "weight": weight, "bias": bias, "block_map": block_map}
    y = y_out if y_out is None or y_scales is None else QuantizedRows(y_out, y_scales)
    check_outputs(x_out, y, x, update, parameters)
    if x.numel():
        from .adaln_kernel import LAYER, RMS, launch_adaln

        kind = {"": 0, "layer": LAYER, "rms": RMS}[norm]
        with on_device(x.device):
            launch_adaln(x, update, gate, shift, scale, weight, bias, block_map, kind, eps, x_out, y_out, y_scales)


@_adaln_op.register_fake
def _(x, update, gate, shift, scale, weight, bias, block_map, norm, eps, x_out, y_out, y_scales):  # type: ignore[no-untyped-def]
    return None


def _choose(*, backend: str, inplace: bool, **arguments: Any) -> Choice:
    chosen, reason = prepare(backend=backend, **arguments)
    return Choice(chosen, "reference" if chosen == "torch" else "fused kernel", reason)


@public_operator(_choose)
def norm_modulate(
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    block_map: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    quantize: torch.dtype | None = None,
    out: Tensor | QuantizedRows | None = None,
    inplace: bool = False,
    backend: str = "auto",
) -> Tensor | QuantizedRows:
    """Norms tokens over their channels and modulates them with a shift and a scale chosen per block.

    The result is ``(norm(x) * weight + bias) * (1 + scale) + shift``. A block is one latent frame of the tokens.

    Args:
        x: tokens ``[B, L, C]``, channels contiguous.
        shift: modulation rows ``[B, R, C]``, or None with ``scale`` None.
        scale: modulation rows ``[B, R, C]``, or None with ``shift`` None.
        block_map: int32 ``[T]``, T divides L: block i of the tokens uses row ``block_map[i]``. Default: T = R and row
            i, so R = 1 is one modulation for all tokens. A row that does not exist is an error on the CPU and gives
            NaN on a GPU, where reading the map would stop the stream.
        weight: factors ``[C]`` on the normed channels, or None.
        bias: summands ``[C]`` of the normed channels, or None.
        norm: ``layer`` (LayerNorm) or ``rms`` (RMSNorm).
        eps: added to the variance (or mean square).
        quantize: ``torch.float8_e4m3fn`` or ``torch.int8`` for a result in 8 bits,
            :class:`swifti2v_kernels.QuantizedRows` with a scale a token.
        out: where to write, shaped as ``x``: ``x`` itself, or memory that overlaps no input. With ``quantize``
            :class:`swifti2v_kernels.QuantizedRows` that overlap no input.
        inplace: whether to overwrite ``x``; the same as ``out=x``. Not with ``quantize``.
        backend: ``auto``, ``torch`` or ``triton`` (see :mod:`swifti2v_kernels.common.dispatch`).

    Returns:
        ``[B, L, C]`` in the dtype of ``x`` (``out`` or ``x`` where these were to be written). With ``quantize`` values
        ``[B, L, C]`` in that dtype and float32 scales ``[B, L]``, without gradients.

    Raises:
        TypeError, ValueError: an argument breaks the contract; the message names it.

    Examples:
        >>> x, table = torch.randn(1, 30, 96), torch.randn(1, 2, 2, 96)  # 3 blocks of 10 tokens, 2 noise levels
        >>> shift, scale = table.unbind(2)
        >>> norm_modulate(x, shift, scale, block_map=torch.tensor([0, 1, 1], dtype=torch.int32)).shape
        torch.Size([1, 30, 96])

    Source: AdaLN-zero of DiT; order of operations and roundings of Wan (diffusers ``WanTransformerBlock``).
    """
    if inplace and out is not None:
        raise ValueError("out: expected None with inplace, which writes to x")
    if inplace and quantize is not None:
        raise ValueError("inplace: expected False with quantize, whose result is not of x's dtype")
    arguments = {"shift": shift, "scale": scale, "weight": weight, "bias": bias, "block_map": block_map, "norm": norm}
    chosen, _ = prepare(x=x, out=out, quantize=quantize, backend=backend, **arguments)
    target = x if inplace else out
    if chosen == "torch":
        check_outputs(None, target, x, None, arguments)
        return _into(target, norm_modulate_reference(x, eps=eps, quantize=quantize, **arguments))
    target = _new(x, quantize) if target is None else target
    _adaln_op(x, None, None, shift, scale, weight, bias, block_map, norm, eps, None, *_tensors(target))
    return target


@public_operator(_choose)
def gated_residual(
    x: Tensor,
    update: Tensor,
    gate: Tensor | None = None,
    *,
    block_map: Tensor | None = None,
    inplace: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Adds an update to tokens, gated per block: ``x + gate * update``.

    Args:
        x: tokens ``[B, L, C]``, channels contiguous: the residual stream.
        update: tokens ``[B, L, C]`` in the dtype of ``x``.
        gate: modulation rows ``[B, R, C]``; None for a plain sum.
        block_map: int32 ``[T]``, the row of ``gate`` for each block, as for :func:`swifti2v_kernels.norm_modulate`.
        inplace: whether to overwrite ``x``.
        backend: ``auto``, ``torch`` or ``triton`` (see :mod:`swifti2v_kernels.common.dispatch`).

    Returns:
        ``[B, L, C]`` in the dtype of ``x`` (``x`` itself with ``inplace``).

    Raises:
        TypeError, ValueError: an argument breaks the contract; the message names it.

    Examples:
        >>> x, update = torch.randn(2, 1, 30, 96)
        >>> gated_residual(x, update, torch.zeros(1, 3, 96)).equal(x)
        True

    Source: AdaLN-zero of DiT; order of operations and roundings of Wan (diffusers ``WanTransformerBlock``).
    """
    chosen, _ = prepare(x=x, update=update, gate=gate, block_map=block_map, backend=backend)
    if chosen == "torch":
        if inplace:
            check_outputs(x, None, x, update, {"gate": gate, "block_map": block_map})
        return _into(x if inplace else None, gated_residual_reference(x, update, gate, block_map))
    target = x if inplace else _new(x)
    _adaln_op(x, update, gate, None, None, None, None, block_map, "", 0.0, target, None, None)
    return target


@public_operator(_choose)
def gated_residual_norm_modulate(
    x: Tensor,
    update: Tensor,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    block_map: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    quantize: torch.dtype | None = None,
    out: Tensor | QuantizedRows | None = None,
    inplace: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | QuantizedRows]:
    """Adds a gated update to tokens, then norms and modulates the sum, in one pass over memory.

    The results are ``x' = x + gate * update`` and ``y = (norm(x') * weight + bias) * (1 + scale) + shift``: what
    :func:`swifti2v_kernels.gated_residual` and then :func:`swifti2v_kernels.norm_modulate` compute.

    Args:
        x: tokens ``[B, L, C]``, channels contiguous: the residual stream.
        update: tokens ``[B, L, C]`` in the dtype of ``x``.
        gate: modulation rows ``[B, R, C]``; None for a plain sum.
        shift: modulation rows ``[B, R, C]``, or None with ``scale`` None.
        scale: modulation rows ``[B, R, C]``, or None with ``shift`` None.
        block_map: int32 ``[T]``, the row of gate, shift and scale for each block; default: its own.
        weight: factors ``[C]`` on the normed channels, or None.
        bias: summands ``[C]`` of the normed channels, or None.
        norm: ``layer`` (LayerNorm) or ``rms`` (RMSNorm).
        eps: added to the variance (or mean square).
        quantize: ``torch.float8_e4m3fn`` or ``torch.int8`` for a ``y`` in 8 bits,
            :class:`swifti2v_kernels.QuantizedRows` with a scale a token.
        out: where to write ``y``: ``update`` itself, or memory that overlaps no input. With ``quantize``
            :class:`swifti2v_kernels.QuantizedRows` that overlap no input.
        inplace: whether to overwrite ``x`` with ``x'``.
        backend: ``auto``, ``torch`` or ``triton`` (see :mod:`swifti2v_kernels.common.dispatch`).

    Returns:
        The pair ``(x', y)``, both ``[B, L, C]`` in the dtype of ``x``; with ``quantize`` y is
        :class:`swifti2v_kernels.QuantizedRows`, without gradients.

    Raises:
        TypeError, ValueError: an argument breaks the contract; the message names it.

    Examples:
        >>> x, update = torch.randn(2, 1, 30, 96)
        >>> gate, shift, scale = torch.randn(3, 1, 3, 96)
        >>> x, y = gated_residual_norm_modulate(x, update, gate, shift, scale, inplace=True)

    Source: AdaLN-zero of DiT; order of operations and roundings of Wan (diffusers ``WanTransformerBlock``).
    """
    arguments = {"shift": shift, "scale": scale, "weight": weight, "bias": bias, "block_map": block_map, "norm": norm}
    chosen, _ = prepare(x=x, update=update, gate=gate, out=out, quantize=quantize, backend=backend, **arguments)
    if chosen == "torch":
        check_outputs(x if inplace else None, out, x, update, {"gate": gate, **arguments})
        x_new = gated_residual_reference(x, update, gate, block_map)
        y = norm_modulate_reference(x_new, eps=eps, quantize=quantize, **arguments)
        return _into(x if inplace else None, x_new), _into(out, y)
    x_out, y_out = x if inplace else _new(x), _new(x, quantize) if out is None else out
    _adaln_op(x, update, gate, shift, scale, weight, bias, block_map, norm, eps, x_out, *_tensors(y_out))
    return x_out, y_out


def _new(x: Tensor, quantize: torch.dtype | None = None) -> Any:
    return x.new_empty(x.shape) if quantize is None else new_rows(x, quantize)


def _tensors(y: Tensor | QuantizedRows) -> tuple[Tensor, Tensor | None]:
    return (y.values, y.scales) if isinstance(y, QuantizedRows) else (y, None)


def _into(target: Any, result: Any) -> Any:
    if isinstance(result, QuantizedRows):
        return written(target, result)
    return result if target is None else target.copy_(result)


def cost(
    batch: int,
    length: int,
    channels: int,
    *,
    update: bool,
    norm: bool,
    quantize: bool = False,
    itemsize: int = 2,
) -> Cost:
    """Returns the least cost of one call with or without an update to add, a norm and its rounding to 8 bits.

    The modulation and the scales are negligible.
    """
    elements = batch * length * channels
    out = update * itemsize + norm * (1 if quantize else itemsize)
    return Cost((2 * update + 8 * norm + 5 * quantize) * elements, (1 + update) * elements * itemsize, out * elements)
