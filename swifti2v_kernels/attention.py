"""Bidirectional attention over keys and values that live in several buffers.

    out = softmax(scale * q @ concat(k_1 .. k_n)^T) @ concat(v_1 .. v_n)
    lse = log(sum(exp(scale * q @ concat(k_1 .. k_n)^T)))

A window of Conditional Segment-wise Generation, a cached context, the text of an MMDiT block and plain cross-attention
are all this one operation: the softmax runs over the union of the sources, so their order does not matter, and nothing
is concatenated. Queries and outputs may be several views too.

| tensor        | shape          | dtype                        | layout                                       |
|---------------|----------------|------------------------------|----------------------------------------------|
| q, one or n   | [B, Lq, H, D]  | fp16, bf16 (fp32, fp64: torch) | any batch, token and head strides; D contiguous |
| k_i, v_i      | [B, L_i, H, D] | as q                         | the same; strides may differ between sources |
| valid_lengths | [B]            | int32 or int64               | per source, optional                         |
| out, one or n | [B, Lq, H, D]  | as q                         | as q; contiguous if not given                |
| lse, one or n | [B, H, Lq]     | fp32                         | contiguous                                   |

Products accumulate in float32, the softmax is float32 and base 2; p is rounded to the inputs' dtype for ``p @ v``, as
in every fused attention. Sums run in the order of tiles, so results of different backends differ by rounding only.

FLOPs: 4 * B * H * D * (query, key pairs seen). Least traffic: q, every k_i and v_i read once, out written once. Against
``torch.cat`` and dense attention it saves writing and reading a copy of all keys and values, and the memory of it.

Backends: the reference below (any device and dtype, differentiable); the portable Triton kernel
(``attention_portable.py``); a warp-specialised one for Hopper (``attention_hopper.py``); and, for a plain dense call
with one source, torch's own attention where the measured table (``configs/attention.json``) does not prefer ours.
``explain(segment_attention, ...)`` says which of them a call takes. Beyond the H200 the kernels are not yet timed on
hardware.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swifti2v_kernels.attention_arguments import BlockWindow, Call, Source, check_call, check_overlaps
from swifti2v_kernels.attention_launch import choose_kernel, launch, prepare, sdpa
from swifti2v_kernels.common.case import Arguments, Case, RealSize
from swifti2v_kernels.common.checks import check_range
from swifti2v_kernels.common.cost import Cost, Work
from swifti2v_kernels.common.dispatch import Choice, explained_by, pick_backend
from swifti2v_kernels.common.target import device_obstacle, interpreting, on_device

KERNEL_HEAD_DIMS = (64, 96, 128)


def segment_attention_reference(
    q: Sequence[Tensor],
    sources: Sequence[Source],
    scale: float,
    valid_lengths: Sequence[Tensor | None],
    attends: Sequence[Sequence[int]],
    window: BlockWindow | None,
    return_lse: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """The formula above, piece by piece of the queries; differentiable. Masks are spelled out as slices."""
    out, lse = [], []
    for view, visible in zip(q, attends, strict=True):
        results = []
        for start, stop, seen in _pieces(view.shape[1], sources, visible, window):
            k, v = (_joined([sources[j][i][:, a:b] for j, a, b in seen]) for i in range(2))
            valid = None
            if any(valid_lengths[j] is not None for j, _, _ in seen):
                valid = torch.cat([_valid_rows(valid_lengths[j], a, b, view) for j, a, b in seen], dim=1)
            results.append(_attend(view[:, start:stop], k, v, scale, valid, return_lse))
        out.append(_joined([o for o, _ in results]))
        if return_lse:
            lse.append(torch.cat([s for _, s in results if s is not None], dim=2))
    return out, lse


def _joined(views: list[Tensor]) -> Tensor:
    """Along the tokens; one view is not copied."""
    return views[0] if len(views) == 1 else torch.cat(views, dim=1)


def _pieces(
    num_queries: int, sources: Sequence[Source], visible: Sequence[int], window: BlockWindow | None
) -> Iterator[tuple[int, int, list[tuple[int, int, int]]]]:
    """Ranges of queries that see the same keys, with these: (start, stop, [(source, first row, last row + 1)])."""
    everything = [(j, 0, sources[j][0].shape[1]) for j in visible]
    if window is None or num_queries == 0:
        yield 0, num_queries, everything
        return
    length = sources[0][0].shape[1]
    for i, start in enumerate(range(0, num_queries, window.block_len)):
        low = min(max(i - window.left, 0) * window.block_len, length)
        high = min((i + window.right + 1) * window.block_len, length)
        yield start, min(start + window.block_len, num_queries), [(0, low, high), *everything[1:]]


def _valid_rows(valid: Tensor | None, start: int, stop: int, like: Tensor) -> Tensor:
    rows = torch.arange(start, stop, device=like.device)
    if valid is None:
        return torch.ones_like(rows, dtype=torch.bool).expand(like.shape[0], -1)
    return rows < valid.unsqueeze(1)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, valid: Tensor | None, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, L, D]
    if not return_lse and valid is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2), None
    wide = torch.promote_types(q.dtype, torch.float32)
    if valid is not None:  # whatever lies behind a valid length, even NaN, must not count
        k, v = (x.masked_fill(~valid[:, None, :, None], 0.0) for x in (k, v))
    logits = scale * (q.to(wide) @ k.to(wide).transpose(2, 3))
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None, None, :], float("-inf"))
    lse = logits.logsumexp(-1)
    # A row without any valid key: weights 0, not NaN.
    weights = (logits - lse.masked_fill(lse.isneginf(), 0.0).unsqueeze(-1)).exp()
    return (weights @ v.to(wide)).to(v.dtype).transpose(1, 2), lse if return_lse else None


# Registration. Lists are flat, as the dispatcher wants them: out and lse in one, the window as no or three integers.
# The variant that writes into given outputs returns nothing: mutating operators that return lists cannot be
# functionalised.


def _new_outputs(q: Sequence[Tensor]) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in q]


def _new_lses(q: Sequence[Tensor], wanted: bool) -> list[Tensor]:
    return [x.new_empty((x.shape[0], x.shape[2], x.shape[1]), dtype=torch.float32) for x in q] if wanted else []


# Schemas are spelled out because torch 2.6 cannot read them from ``list[Tensor]``.
_ARGUMENTS = (
    "Tensor[] q, Tensor[] k, Tensor[] v, Tensor?[] valid_lengths, float scale, SymInt[] attends, SymInt[] window"
)


@torch.library.custom_op(
    "swifti2v::segment_attention", mutates_args=(), schema=f"({_ARGUMENTS}, bool return_lse) -> Tensor[]"
)
def _segment_attention_op(
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    valid_lengths: list[Tensor | None],
    scale: float,
    attends: list[int],
    window: list[int],
    return_lse: bool,
) -> list[Tensor]:
    sources = list(zip(k, v, strict=True))
    kernel = prepare(q, sources, valid_lengths, bool(window), return_lse)
    if kernel.startswith("sdpa") and len(q) == 1:
        with on_device(q[0].device):
            return [sdpa(kernel, q[0], *sources[0], scale).contiguous()]
    out, lse = _new_outputs(q), _new_lses(q, return_lse)
    if kernel != "none":
        launch(kernel, q, sources, out, lse, valid_lengths, scale, attends, tuple(window) if window else None)
    return out + lse


@_segment_attention_op.register_fake
def _(q, k, v, valid_lengths, scale, attends, window, return_lse):  # type: ignore[no-untyped-def]
    return _new_outputs(q) + _new_lses(q, return_lse)


@torch.library.custom_op(
    "swifti2v::segment_attention_out",
    mutates_args=("out", "lse"),
    schema=f"({_ARGUMENTS}, Tensor(a!)[] out, Tensor(b!)[] lse) -> ()",
)
def _segment_attention_out_op(
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    valid_lengths: list[Tensor | None],
    scale: float,
    attends: list[int],
    window: list[int],
    out: list[Tensor],
    lse: list[Tensor],
) -> None:
    sources = list(zip(k, v, strict=True))
    check_overlaps(out, q, sources)
    kernel = prepare(q, sources, valid_lengths, bool(window), bool(lse))
    if kernel != "none":
        launch(kernel, q, sources, out, lse, valid_lengths, scale, attends, tuple(window) if window else None)


@_segment_attention_out_op.register_fake
def _(q, k, v, valid_lengths, scale, attends, window, out, lse):  # type: ignore[no-untyped-def]
    return None


def _choose(*, return_lse: bool, backend: str, **arguments: Any) -> Choice:
    call = check_call(**arguments)
    chosen, reason = pick_backend(backend, _obstacle(call))
    if chosen == "torch":
        return Choice(chosen, "reference", reason)
    queries = [x for x in call.q if x.numel()]
    if not queries:
        return Choice(chosen, "none", "no queries")
    return Choice(chosen, *choose_kernel(queries, call.sources, call.valid, call.window is not None, return_lse))


@explained_by(_choose)
def segment_attention(
    q: Tensor | Sequence[Tensor],
    sources: Sequence[Source],
    *,
    scale: float | None = None,
    valid_lengths: Sequence[Tensor | None] | None = None,
    attends: Sequence[Sequence[int]] | None = None,
    window: BlockWindow | None = None,
    return_lse: bool = False,
    out: Tensor | Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> Tensor | list[Tensor] | tuple[Tensor, Tensor] | tuple[list[Tensor], list[Tensor]]:
    """Attention of ``q`` to the union of several key/value sources, read where they are.

    Args:
        q: queries ``[B, Lq, H, D]``, or a list of such views.
        sources: pairs ``(k, v)``, each ``[B, L_i, H, D]``; ``L_i`` may differ and may be 0, but not all of them. At
            most 24 pairs.
        scale: factor on the logits, positive; default ``D ** -0.5``.
        valid_lengths: per source None or integers ``[B]`` on the device: only the first so many of its keys count
            (padded text). A batch entry without any valid key gets output 0 and log-sum-exp -inf.
        attends: for a list of queries, the indices of the sources that each view sees; default all. Conditioning
            queries that must not see noisy keys are ``q=[q_given, q_noisy], attends=[[0], [0, 1]]``.
        window: a local mask over blocks, for one query view as long as the first source.
        return_lse: also return the logarithm (base e) of the sum of exponentials, for :func:`merge_attention`.
        out: where to write, views shaped as ``q`` that overlap neither each other nor an input.
        backend: ``auto``, ``torch`` or ``triton`` (see :mod:`swifti2v_kernels.common.dispatch`).

    Returns:
        ``[B, Lq, H, D]`` in the dtype of ``q`` (``out`` if given); a list if ``q`` is one. With ``return_lse`` a pair
        with the log-sum-exp, ``[B, H, Lq]`` float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: an argument breaks the contract; the message names it, with what was given and allowed.

    Example:
        >>> q = torch.randn(1, 5, 2, 8)
        >>> window, text = torch.randn(2, 1, 7, 2, 8), torch.randn(2, 1, 3, 2, 8)
        >>> segment_attention(q, [tuple(window), tuple(text)]).shape
        torch.Size([1, 5, 2, 8])

    Source: CSG self-attention of SwiftI2V (arXiv 2605.06356); joint attention of MMDiT models; FlashAttention-2
    (arXiv 2307.08691) for the online softmax.
    """
    call = check_call(q, sources, scale, valid_lengths, attends, window, out)
    chosen, _ = pick_backend(backend, _obstacle(call))
    if chosen == "torch":
        for j, x in enumerate(call.valid):
            if x is not None:
                check_range(f"valid_lengths[{j}]", x, 0, call.sources[j][0].shape[1])
        results, lses = segment_attention_reference(*call[:6], return_lse)
        if call.out is not None:
            if not torch.compiler.is_compiling():
                check_overlaps(call.out, call.q, call.sources)
            results = [target.copy_(result) for target, result in zip(call.out, results, strict=True)]
    else:
        k, v = [k for k, _ in call.sources], [v for _, v in call.sources]
        masks = [sum(1 << j for j in visible) for visible in call.attends]
        w = [] if window is None else [window.block_len, window.left, window.right]
        if call.out is None:
            both = _segment_attention_op(call.q, k, v, call.valid, call.scale, masks, w, return_lse)
            results, lses = both[: len(call.q)], both[len(call.q) :]
        else:
            results, lses = call.out, _new_lses(call.q, return_lse)
            _segment_attention_out_op(call.q, k, v, call.valid, call.scale, masks, w, results, lses)
    if isinstance(q, Tensor):
        return (results[0], lses[0]) if return_lse else results[0]
    return (results, lses) if return_lse else results


def _obstacle(call: Call) -> str | None:
    """Why the kernels cannot take this call."""
    q = call.q[0]
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*call.q, *(x for pair in call.sources for x in pair))):
        return "an input needs gradients, and the kernels have no backward"
    if (reason := device_obstacle(q.device)) is not None:
        return reason
    if q.shape[3] not in KERNEL_HEAD_DIMS:
        return f"kernels exist for head_dim {', '.join(map(str, KERNEL_HEAD_DIMS))}, got {q.shape[3]}"
    dtypes = (torch.float16, torch.bfloat16, *((torch.float32,) if interpreting() else ()))
    if q.dtype not in dtypes:
        return f"kernels exist for float16 and bfloat16, got {q.dtype}"
    # Within one tile offsets are 32-bit.
    if any(x.stride(1) >= 2**23 for x in (*call.q, *(call.out or ()), *(x for pair in call.sources for x in pair))):
        return "a token stride of 2**23 elements or more"
    if any(x.shape[1] >= 2**26 for x in (*call.q, *(k for k, _ in call.sources))):
        return "a view of 2**26 tokens or more"
    return None


def cost(
    batch: int,
    heads: int,
    head_dim: int,
    query_len: int,
    key_len: int,
    itemsize: int = 2,
    pairs: int | None = None,
) -> Cost:
    """Least cost of one call; ``pairs`` (query, key) per head and batch entry, default all of them."""
    rows = batch * heads * head_dim * itemsize
    pairs = query_len * key_len if pairs is None else pairs
    return Cost(4 * batch * heads * head_dim * pairs, rows * (query_len + 2 * key_len), rows * query_len)


class _Inputs(NamedTuple):
    """Tensors for one case, all of them slices of fused qkv buffers ``[B, L, 3, H, D]``, as the model has them."""

    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    query_lens: tuple[int, ...] = (299,)
    key_lens: tuple[int, ...] = (333,)
    valid: bool = False
    lse: bool = False
    window: BlockWindow | None = None
    #: Elements between the heads of one token beyond head_dim; 1 leaves nothing aligned.
    gap: int = 0
    attend_all: bool = False
    batch: int = 2
    heads: int = 2
    new: Callable[..., Tensor] = torch.ones

    def __call__(self, device: torch.device) -> Arguments:
        def views(length: int) -> list[Tensor]:
            size = self.batch, length, 3, self.heads, self.head_dim + self.gap
            buffer = self.new(size, dtype=self.dtype, device=device)
            return [buffer[:, :, i, :, : self.head_dim] for i in range(3)]

        q = [views(n)[0] for n in self.query_lens]
        sources = [tuple(views(n)[1:]) for n in self.key_lens]
        options: dict[str, object] = {"return_lse": self.lse, "window": self.window, "backend": "triton"}
        if self.valid:
            options["valid_lengths"] = [torch.full((self.batch,), n - 1, device=device) for n in self.key_lens]
        if len(q) > 1 and not self.attend_all:
            options["attends"] = [range(min(i + 1, len(sources))) for i in range(len(q))]
        return (q if len(q) > 1 else q[0], sources), options


def _work(constants: Mapping[str, Any]) -> Work:
    """One tile of keys: two products; k and v loaded. The Hopper kernel's two consumers run for themselves."""
    tile = constants["BLOCK_N"] * constants["BLOCK_D"]
    return Work(2 * constants["BLOCK_M"] * tile, 2 * 2 * tile, 2 if "NUM_K" in constants else 1)


def _cases() -> list[Case]:
    calls: dict[str, _Inputs] = {"fp16": _Inputs(128, torch.float16)}
    for d in KERNEL_HEAD_DIMS:
        calls |= {
            f"d{d}": _Inputs(d),
            f"d{d} lse": _Inputs(d, lse=True),
            f"d{d} 2 sources": _Inputs(d, key_lens=(333, 77)),
            f"d{d} 2 sources, padded, lse": _Inputs(d, key_lens=(333, 77), valid=True, lse=True),
            f"d{d} 4 sources, padded": _Inputs(d, key_lens=(333, 77, 77, 20), valid=True),
            f"d{d} joint, 2 sources": _Inputs(d, query_lens=(333, 77), key_lens=(333, 77), attend_all=True),
            f"d{d} causal, 3 sources": _Inputs(d, query_lens=(77, 150), key_lens=(77, 150, 40), lse=True),
            f"d{d} 5 sources": _Inputs(d, key_lens=(333, 77, 77, 128, 1)),
            f"d{d} block window": _Inputs(d, query_lens=(333,), key_lens=(333, 77), window=BlockWindow(100, 1)),
            f"d{d} unaligned": _Inputs(d, gap=1),
        }
    real = {
        "d64 lse": _real("1216x704, 121 frames, LTX-Video", calls["d64 lse"], 32, 13_376),
        "d128 lse": _real("CSG window 2560x1408, 5B", calls["d128 lse"], 24, 17_600),
        "d128 2 sources": _real("CSG window 1280x704, 1.3B", calls["d128 2 sources"], 12, 14_080, 3520),
        "d128 5 sources": _real("CSG window 1280x704, 1.3B", calls["d128 5 sources"], 12, *[3520] * 5),
        "d128 block window": _real("640x352, 81 frames", calls["d128 block window"], 12, 18_480, 512),
    }
    return [
        Case(f"segment_attention {name}", segment_attention, inputs, _work, real.get(name))
        for name, inputs in calls.items()
    ]


def _real(shape: str, inputs: _Inputs, heads: int, *key_lens: int) -> RealSize:
    """As many queries as keys, or those of the first source under a window of 3 of its 21 blocks."""
    queries = key_lens[0] if inputs.window else sum(key_lens)
    window = None if inputs.window is None else BlockWindow(queries // 21, 1, 1)
    whole = inputs._replace(
        batch=1, heads=heads, query_lens=(queries,), key_lens=key_lens, window=window, new=torch.empty
    )
    pairs = None if window is None else queries * (3 * queries // 21 + sum(key_lens[1:]))
    return RealSize(shape, whole, cost(1, heads, inputs.head_dim, queries, sum(key_lens), pairs=pairs))


CASES = _cases()
