"""The shapes and the implementations that ``python -m bench attention`` compares."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.records.outcome import Unavailable
from swifti2v_kernels import segment_attention
from swifti2v_kernels.attention import choice
from swifti2v_kernels.attention.segment_attention import cost
from swifti2v_kernels.common.cost import Cost

Sources = Sequence[tuple[Tensor, Tensor]]
Call = Callable[[Tensor, Sources], Tensor]


@dataclass(frozen=True)
class Shape:
    """One attention call of a real model; ``keys`` are the lengths of its sources."""

    name: str
    heads: int
    head_dim: int
    queries: int
    keys: tuple[int, ...]

    @property
    def cost(self) -> Cost:
        """The cost of the call in bf16, for one batch entry."""
        return cost(1, self.heads, self.head_dim, self.queries, sum(self.keys))

    @property
    def copied_bytes(self) -> int:
        """The bytes that ``torch.cat`` of the sources writes in bf16; as many are read, and held during the call."""
        return 2 * 2 * self.heads * self.head_dim * sum(self.keys) if len(self.keys) > 1 else 0

    def reduced(self, tokens: int) -> Shape:
        """Returns the same call with one head and lengths scaled to about ``tokens``, those of the sources uneven."""
        longest = max(self.queries, *self.keys)
        scale = min(1.0, tokens / longest)
        return Shape(
            self.name, 1, self.head_dim, max(1, int(self.queries * scale)),
            tuple(max(1, int(n * scale) + i) for i, n in enumerate(self.keys)),
        )  # fmt: skip


#: Tokens of one block (latent frame): (height / 16) * (width / 16) with the Wan2.1 VAE, / 32 with the Wan2.2 one.
SHAPES = (
    Shape("CSG window 1280x704, 1.3B", 12, 128, 5 * 3520, (5 * 3520,)),
    Shape("CSG window 1920x1088, 1.3B", 12, 128, 5 * 8160, (5 * 8160,)),
    Shape("CSG window 2560x1408, 1.3B", 12, 128, 5 * 14080, (5 * 14080,)),
    Shape("CSG window 2560x1408, 5B", 24, 128, 5 * 3520, (5 * 3520,)),
    Shape("CSG window 2560x1408, 3 sources", 12, 128, 5 * 14080, (14080, 14080, 3 * 14080)),
    Shape("CSG causal 2560x1408, noisy queries", 12, 128, 3 * 14080, (2 * 14080, 3 * 14080)),
    Shape("CSG cross-attention 2560x1408", 12, 128, 5 * 14080, (512,)),
    Shape("Stage I 640x352, 81 frames, 14B", 40, 128, 21 * 880, (21 * 880,)),
    Shape("HunyuanVideo 1280x720, 61 frames, joint", 24, 128, 16 * 3600, (16 * 3600, 256)),
    Shape("LTX-Video 1216x704, 121 frames", 32, 64, 16 * 836, (16 * 836,)),
)
QUICK_SHAPES = (SHAPES[0], Shape("CSG window 1280x704, 3 sources", 12, 128, 5 * 3520, (3520, 3520, 3 * 3520)))


@dataclass(frozen=True)
class Provider:
    """An implementation; ``exact`` is False where it computes with 8-bit matmuls."""

    name: str
    call: Call
    exact: bool = True
    ours: bool = False


def inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Returns q ``[1, L, H, D]`` and the sources, slices of fused buffers; as in real models, the mean is not zero."""
    generator = torch.Generator(device).manual_seed(0)

    def views(length: int) -> tuple[Tensor, Tensor, Tensor]:
        buffer = torch.empty(1, length, 3, shape.heads, shape.head_dim, device=device, dtype=dtype)
        return buffer.normal_(0.1, 0.8, generator=generator).unbind(2)

    sources = [views(n) for n in shape.keys]
    q = sources[0][0] if shape.queries == shape.keys[0] else views(shape.queries)[0]
    return q, [(k, v) for _, k, v in sources]


def providers(quick: bool) -> list[Provider]:
    """Returns all implementations that there may be; what is not installed says so when it is called."""
    found = [
        Provider("swifti2v", own_kernel, ours=True),
        Provider("swifti2v, portable kernel", functools.partial(own_kernel, portable=True), ours=True),
        Provider("swifti2v, public function", lambda q, sources: segment_attention(q, sources), ours=True),
        Provider("sdpa-cudnn", functools.partial(_sdpa, SDPBackend.CUDNN_ATTENTION)),
        Provider("sdpa-flash", functools.partial(_sdpa, SDPBackend.FLASH_ATTENTION)),
    ]
    if not quick:
        found += [
            Provider("sdpa-efficient", functools.partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION)),
            Provider("flex-attention", _flex),
            Provider("flash-attn", _flash_attn),
            Provider("sageattention", _sage, exact=False),
        ]
    return found


def own_kernel(q: Tensor, sources: Sources, portable: bool = False) -> Tensor:
    """Calls our own kernel, without the dispatch of dense calls to torch.

    Raises:
        Unavailable: ``portable`` is asked for where it is the only kernel, which would then be listed twice.
    """
    nothing = [None] * len(sources)
    kernel, _ = choice.own_kernel([q], sources, nothing, False)
    if portable:
        if kernel == "portable":
            raise Unavailable("the portable kernel is the only one here")
        kernel = "portable"
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    everything = [(1 << len(sources)) - 1]
    choice.launch(kernel, [q], sources, [out], [], nothing, q.shape[3] ** -0.5, everything, None)
    return out


def _cat(sources: Sources) -> tuple[Tensor, Tensor]:
    if len(sources) == 1:
        return sources[0]
    return torch.cat([k for k, _ in sources], dim=1), torch.cat([v for _, v in sources], dim=1)


def _sdpa(backend: SDPBackend, q: Tensor, sources: Sources) -> Tensor:
    k, v = _cat(sources)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(q: Tensor, sources: Sources) -> Tensor:
    k, v = _cat(sources)
    return _compiled_flex()(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def _flash_attn(q: Tensor, sources: Sources) -> Tensor:
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise Unavailable(f"flash-attn is not installed ({error})") from error
    return flash_attn_func(q, *_cat(sources))


def _sage(q: Tensor, sources: Sources) -> Tensor:
    try:
        from sageattention import sageattn
    except ImportError as error:
        raise Unavailable(f"sageattention is not installed ({error})") from error
    return sageattn(q, *_cat(sources), tensor_layout="NHD")
