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

With ``quantize``, y is float8_e4m3fn or int8 with one float32 scale a token (:func:`swifti2v_kernels.quantize_rows`),
rounded once too: from the float32 row in registers, never through x's dtype. ``scaled_linear`` takes it as it is; a
pass of its own would read and write all of y once more.

What fusing saves, and the limits, are in docs/operators/norm.md. FLOPs: about 8 an element, 5 more to quantise it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.checks import Spec, check_index, check_tensor, check_tensors, check_written, same_view
from ..common.dispatch import compute, kernel_obstacle, public_operator, transform
from ..common.registration import kernel_operator
from ..linear.quantize_rows import QuantizedRows, check_dtype, check_out, float8_obstacle, new_rows, quantized_reference

NORMS = ("layer", "rms")
#: A row is held in registers.
MAX_CHANNELS = 8192


class AdalnCall(NamedTuple):
    """The arguments of the registered operator, then what of a public function's becomes its outputs."""

    x: Tensor
    update: Tensor | None = None
    gate: Tensor | None = None
    shift: Tensor | None = None
    scale: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    block_map: Tensor | None = None
    #: Empty where only an update is added.
    norm: str = ""
    eps: float = 0.0
    x_out: Tensor | None = None
    y_out: Tensor | None = None
    y_scales: Tensor | None = None
    #: What the public function does; the kernel goes by what is None.
    adds: bool = False
    normed: bool = True
    quantize: torch.dtype | None = None
    out: Tensor | QuantizedRows | None = None
    inplace: bool = False

    def check(self) -> None:
        check_tensor("x", self.x, Spec(("B*", "L*", "C*"), None))
        (batch, length, width), device = self.x.shape, self.x.device
        like, affine = Spec(self.x.shape, self.x.dtype), Spec((width,), None, whole=True)
        if self.adds:
            check_tensor("update", self.update, like, device)
        if self.quantize is None:
            check_tensors(self, device, out=like)
        else:
            check_dtype("quantize", self.quantize)
            if width == 0:
                raise ValueError(f"x: expected at least one channel to quantize, got {list(self.x.shape)}")
            if self.out is not None:
                check_out("out", self.out, self.x, self.quantize)
        if self.normed and self.norm not in NORMS:
            raise ValueError(f"norm: expected {' or '.join(NORMS)}, got {self.norm!r}")
        if (self.shift is None) != (self.scale is None):
            raise ValueError("shift, scale: expected both or neither")
        check_tensors(self, device, weight=affine, bias=affine)
        name, rows = "", "R"
        for each in ("gate", "shift", "scale"):
            if (m := getattr(self, each)) is not None:
                check_tensor(each, m, Spec((batch, rows, width), None), device)
                name, rows = name or each, m.shape[1]
        if self.block_map is not None:
            if not name:
                raise ValueError("block_map: expected None, since there is no gate, shift or scale to choose from")
            check_index("block_map", self.block_map, None, 0, rows - 1, device)
            name, rows = "block_map", self.block_map.shape[0]
        if name and length % rows:
            raise ValueError(f"{name}: {rows} blocks do not divide {length} tokens")

    def check_written(self) -> None:
        """Checks that outputs overlap nothing that is still to be read.

        A program reads all of its row of x and update before it writes, but others read the parameters meanwhile.
        """
        outputs, x_out = ("x_out", "y_out", "y_scales", "out"), self.x if self.inplace else self.x_out
        y_out = self.out if self.y_out is None else self.y_out
        if self.y_scales is not None:
            y_out = QuantizedRows(self.y_out, self.y_scales)
        if isinstance(y_out, QuantizedRows):
            # Of another dtype than x and update, so they are never the whole of one.
            check_written(self, outputs, y_out.parts("out"))
            y_out = None
        over_x = x_out is None and y_out is not None and same_view(y_out, self.x)
        check_written(self, outputs, {"x": y_out} if over_x else {"x": x_out, "out": y_out}, ("x", "update"))

    def obstacle(self) -> str | None:
        out = self.out if isinstance(self.out, Tensor) else None
        if (reason := kernel_obstacle((*self[:8], out))) is not None:
            return reason
        if self.x.shape[2] > MAX_CHANNELS:
            return f"kernels exist for up to {MAX_CHANNELS} channels, got {self.x.shape[2]}"
        return None if self.quantize is None else float8_obstacle("round to", self.quantize, self.x.device)

    def by_torch(self) -> Any:
        """Computes the call in PyTorch, differentiable unless quantised; what is to be overwritten is last."""
        self.check_written()
        x = _gated(self) if self.adds else self.x
        y = _normed(self, x) if self.normed else None
        if self.inplace:
            x = self.x.copy_(x)
        if self.out is not None:
            y = self.out.copy_(y)
        return self._results(x, y)

    def by_kernel(self) -> Any:
        x, y, outputs = None, self.out, [None, None, None]
        if self.adds:
            x = outputs[0] = self.x if self.inplace else self.x.new_empty(self.x.shape)
        if self.normed:
            if y is None:
                y = self.x.new_empty(self.x.shape) if self.quantize is None else new_rows(self.x, self.quantize)
            outputs[1:] = y if isinstance(y, QuantizedRows) else (y, None)
        _adaln_op(*self[:10], *outputs)
        return self._results(x, y)

    def _results(self, x: Tensor | None, y: Tensor | QuantizedRows | None) -> Any:
        return y if not self.adds else (x, y) if self.normed else x


def _gated(call: AdalnCall) -> Tensor:
    """Returns ``x'`` of the formula above."""
    x, update = _wide(call.x), _wide(call.update)
    if call.gate is None:
        return (x + update).to(call.x.dtype)
    gate = _rows(call.gate, call.block_map)
    blocks, updates = (t.unflatten(1, (gate.shape[1], -1)) for t in (x, update))
    return (blocks + updates * gate).flatten(1, 2).to(call.x.dtype)


def _normed(call: AdalnCall, x: Tensor) -> Tensor | QuantizedRows:
    """Returns ``y`` of the formula above."""
    y = _wide(x)
    weight, bias = (None if p is None else p.to(y.dtype) for p in (call.weight, call.bias))
    if call.norm == "layer":
        y = layer_norm_reference(y, weight, bias, call.eps)
    else:
        y = F.rms_norm(y, x.shape[2:], weight, call.eps)
        y = y if bias is None else y + bias
    if call.shift is not None and call.scale is not None:
        shift, scale = _rows(call.shift, call.block_map), _rows(call.scale, call.block_map)
        y = (y.unflatten(1, (shift.shape[1], -1)) * (1 + scale) + shift).flatten(1, 2)
    return y.to(x.dtype) if call.quantize is None else quantized_reference(y, call.quantize)


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


_adaln_op = kernel_operator(
    "adaln",
    "(Tensor x, Tensor? update, Tensor? gate, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias,"
    " Tensor? block_map, str norm, float eps, Tensor(a!)? x_out, Tensor(b!)? y_out, Tensor(c!)? y_scales)",
    AdalnCall,
)


@public_operator
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
        backend: ``auto``, ``torch`` or ``triton`` (see :mod:`swifti2v_kernels.common.dispatch`).

    Returns:
        ``[B, L, C]`` in the dtype of ``x`` (``out`` if it was given). With ``quantize`` values
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
    rest = (None, None, shift, scale, weight, bias, block_map, norm, eps)
    return compute(AdalnCall(x, *rest, quantize=quantize, out=out), backend)


@public_operator
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
    call = AdalnCall(x, update, gate, block_map=block_map, adds=True, normed=False, inplace=inplace)
    return compute(call, backend)


@public_operator
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
    rest = (gate, shift, scale, weight, bias, block_map, norm, eps)
    call = AdalnCall(x, update, *rest, adds=True, quantize=quantize, out=out, inplace=inplace)
    return compute(call, backend)
