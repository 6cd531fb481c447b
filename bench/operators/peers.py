"""The implementations that every operator is compared with: plain PyTorch, compiled, and other libraries'.

They return new tensors, as their users call them; ours works in place where the case does. What a library keeps ready
between calls is made before, and is not timed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import swifti2v_kernels as kernels
from bench.operators import eager
from bench.operators.eager import EPS
from bench.records.outcome import Unavailable
from swifti2v_kernels import QuantizedRows
from swifti2v_kernels.common.case import Case

Call = Callable[[], Any]


@dataclass(frozen=True)
class Peer:
    """An implementation of an operator; its parameters are some of the operator's, by their names.

    ``prepared``: ``function`` returns the call instead of making it. ``note`` says what its time holds besides;
    ``exact`` is False for matmuls in 8 bits.
    """

    name: str
    function: Callable[..., Any]
    note: str = ""
    prepared: bool = False
    compiled: bool = False
    ours: bool = False
    exact: bool = True

    def call(self, case: Case, args: Sequence[Any], options: Mapping[str, Any]) -> Any:
        """Returns a call of the operator without arguments, a ``functools.partial`` of plain PyTorch.

        Raises:
            Unavailable: it is not installed, or does not take this call.
        """
        given = inspect.signature(case.operator).bind(*args, **options).arguments
        wanted = inspect.signature(self.function).parameters
        # The backend that a case asks for is ours.
        named = {name: x for name, x in given.items() if name in wanted and (self.ours or name != "backend")}
        call = self.function(**named) if self.prepared else functools.partial(self.function, **named)
        return functools.partial(_compiled(call.func), *call.args, **call.keywords) if self.compiled else call


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def peers_of(case: Case) -> list[Peer]:
    """Returns ours and all other implementations; what is not installed says so when it is prepared."""
    return [Peer("swifti2v", case.operator, ours=True), *PEERS[case.operator]]


def library(name: str) -> ModuleType:
    """Imports a module of another library.

    Raises:
        Unavailable: it is not installed, or does not load here.
    """
    package = name.split(".")[0].replace("_", "-")
    try:
        return import_module(name)
    except ImportError as error:
        raise Unavailable(f"{package} is not installed ({error})") from error


def _per_token(x: Tensor, block_map: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
    """Returns modulation as diffusers holds it for two noise levels: a row a token, float32, strided over a table."""
    table = torch.stack(tables, dim=2)[:, block_map.long()]
    return table.repeat_interleave(x.shape[1] // block_map.shape[0], dim=1).unbind(2)


def _layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """Returns diffusers' ``FP32LayerNorm``."""
    norm = library("diffusers.models.normalization").FP32LayerNorm(x.shape[2], EPS, weight is not None)
    if weight is not None:
        norm.load_state_dict({"weight": weight, "bias": bias})
    return norm.to(x.device).requires_grad_(False)


def _diffusers_adaln(
    x: Tensor, block_map: Tensor, update: Tensor | None = None, gate: Tensor | None = None,
    shift: Tensor | None = None, scale: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None,
) -> Call:  # fmt: skip
    norm, given = _layer_norm(x, weight, bias), [t for t in (gate, shift, scale) if t is not None]
    rows = list(_per_token(x, block_map, *given))

    def call() -> Any:
        y = x if update is None else (x.float() + update * rows[0]).type_as(x)
        n = norm(y.float())
        n = (n if shift is None else n * (1 + rows[-1]) + rows[-2]).type_as(y)
        return n if update is None else (y, n)

    return call


def _diffusers_residual(x: Tensor, update: Tensor, gate: Tensor, block_map: Tensor) -> Call:
    library("diffusers")  # its sum is in its block's code; without diffusers the row would be misnamed
    (gate,) = _per_token(x, block_map, gate)
    return lambda: (x.float() + update * gate).type_as(x)


def _conv3d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    library("diffusers")  # its patch embedding is torch's Conv3d
    return F.conv3d(x, weight, bias, weight.shape[2:]).flatten(2).transpose(1, 2).contiguous()


def _diffusers_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Call:
    gelu = library("diffusers.models.activations").GELU(*weight.shape[::-1], approximate="tanh")
    gelu.proj.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    return functools.partial(gelu.requires_grad_(False), x)


def _liger_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    ones, zeros = _affine(x.shape[2], x.device)
    norm = library("liger_kernel.transformers.functional").liger_layer_norm
    return norm(x, ones if weight is None else weight, zeros if bias is None else bias, EPS)


@functools.cache
def _affine(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns weights and biases that change nothing, since Liger's LayerNorm wants some."""
    return torch.ones(width, device=device), torch.zeros(width, device=device)


def _liger_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return library("liger_kernel.transformers.functional").liger_rms_norm(x, weight, EPS, in_place=False)


def _comfy_norm(x: Tensor, shift: Tensor, scale: Tensor, block_map: Tensor) -> Call:
    adaln, blocks = library("comfy_kitchen").adaln, x.unflatten(1, (block_map.shape[0], -1))
    tables = [eager.by_block(table, block_map).to(x.dtype) for table in (scale, shift)]
    return lambda: adaln(blocks, *tables, EPS).flatten(1, 2)


def _comfy_quantize(x: Tensor, dtype: torch.dtype) -> Call:
    if dtype != torch.int8:
        raise Unavailable("it has a scale a row in int8 alone")
    quantize = library("comfy_kitchen").quantize_int8_rowwise

    def call() -> QuantizedRows:
        values, scales = quantize(x)
        return QuantizedRows(values, scales.view(values.shape[:-1]))

    return call


def _comfy_dequantize(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Call:
    if values.dtype != torch.int8:
        raise Unavailable("it has a scale a row in int8 alone")
    dequantize = library("comfy_kitchen").dequantize_int8_simple
    return lambda: dequantize(values, scales.unsqueeze(-1)).to(dtype)


def _by_torch(operator: Callable[..., Any]) -> Peer:
    """Returns the PyTorch path of an operator as its eager implementation."""
    return Peer("eager", functools.partial(operator, backend="torch"))


def _scaled(
    x: QuantizedRows, weight: QuantizedRows, bias: Tensor, activation: str | None, dtype: torch.dtype
) -> Tensor:
    """Multiplies by torch's own matmul in 8 bits, of which that of float8 takes a scale a row on 9.0 in every torch."""
    float8 = x.values.dtype != torch.int8
    if not x.values.is_cuda or (float8 and torch.cuda.get_device_capability(x.values.device) != (9, 0)):
        return kernels.scaled_linear(x, weight, bias, activation=activation, dtype=dtype, backend="torch")
    columns = weight.values.t()
    if float8:
        scales = x.scales.unsqueeze(1), weight.scales.unsqueeze(0)
        y = torch._scaled_mm(x.values, columns, *scales, bias=bias, out_dtype=dtype)
    else:
        y = (torch._int_mm(x.values, columns) * x.scales.unsqueeze(1) * weight.scales + bias).to(dtype)
    return y if activation is None else F.gelu(y, approximate="tanh")


def _linear_16_bits(
    x: QuantizedRows, weight: QuantizedRows, bias: Tensor, activation: str | None, dtype: torch.dtype
) -> Call:
    wide = [kernels.dequantize_rows(*rows, dtype=dtype, backend="torch") for rows in (x, weight)]
    return functools.partial(F.linear if activation is None else eager.linear_gelu, *wide, bias)


def _attention(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Returns attention of ``[B, L, H, D]`` tensors that concatenates several sources first."""

    def call(q: Tensor, sources: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        k, v = sources[0] if len(sources) == 1 else (torch.cat(side, dim=1) for side in zip(*sources, strict=True))
        return attend(q, k, v)

    return call


def _sdpa(name: str, backend: SDPBackend) -> Peer:
    def attend(*qkv: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)

    return Peer(name, _attention(attend))


def _flex(*qkv: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    return _compiled(flex_attention)(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)


def _with_eager(plain: Peer, *libraries: Peer) -> tuple[Peer, ...]:
    """Returns plain PyTorch, the same compiled for the shapes of each call, and libraries' implementations."""
    return plain, replace(plain, name="torch.compile", compiled=True), *libraries


_ready = functools.partial(Peer, prepared=True)
_PER_TOKEN = "modulation stored per token, its form for two noise levels"
_LIGER_NORM = Peer("liger", functools.partial(eager.adaln, norm=_liger_layer_norm), "LayerNorm alone, the rest eager")
PEERS: Mapping[Callable[..., Any], tuple[Peer, ...]] = {
    kernels.norm_modulate: _with_eager(
        Peer("eager", eager.adaln),
        _ready("diffusers", _diffusers_adaln, _PER_TOKEN),
        _LIGER_NORM,
        _ready("comfy-kitchen", _comfy_norm, "modulation in x's dtype"),
    ),
    kernels.gated_residual: _with_eager(
        Peer("eager", eager.gated_residual), _ready("diffusers", _diffusers_residual, _PER_TOKEN)
    ),
    kernels.gated_residual_norm_modulate: _with_eager(
        Peer("eager", eager.adaln), _ready("diffusers", _diffusers_adaln, _PER_TOKEN), _LIGER_NORM
    ),
    kernels.qk_norm_rope: _with_eager(
        _ready("eager", eager.qk_norm_rope),
        _ready(
            "liger",
            functools.partial(eager.qk_norm_rope, norm=_liger_rms_norm),
            "RMSNorm alone, rotation eager (its own is for halves)",
        ),
    ),
    kernels.embed_window: _with_eager(
        Peer("eager", eager.embed_window),
        Peer("diffusers", functools.partial(eager.embed_window, embed=_conv3d), "concatenation and Conv3d"),
    ),
    kernels.project_step: _with_eager(_ready("eager", eager.project_step)),
    kernels.linear_gelu: _with_eager(Peer("eager", eager.linear_gelu), _ready("diffusers", _diffusers_gelu)),
    kernels.scaled_linear: _with_eager(
        Peer("eager", _scaled, "torch._scaled_mm or torch._int_mm where they take the call"),
        _ready("16 bits", _linear_16_bits, "a matmul of 16-bit operands"),
    ),
    kernels.quantize_rows: _with_eager(_by_torch(kernels.quantize_rows), _ready("comfy-kitchen", _comfy_quantize)),
    kernels.dequantize_rows: _with_eager(
        _by_torch(kernels.dequantize_rows), _ready("comfy-kitchen", _comfy_dequantize)
    ),
    kernels.segment_attention: (
        _sdpa("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION),
        _sdpa("sdpa-flash", SDPBackend.FLASH_ATTENTION),
        _sdpa("sdpa-efficient", SDPBackend.EFFICIENT_ATTENTION),
        Peer("flex-attention", _attention(_flex)),
        Peer("flash-attn", _attention(lambda *qkv: library("flash_attn").flash_attn_func(*qkv))),
        Peer(
            "sageattention",
            _attention(lambda *qkv: library("sageattention").sageattn(*qkv, tensor_layout="NHD")),
            "8-bit matmuls",
            exact=False,
        ),
    ),
}
