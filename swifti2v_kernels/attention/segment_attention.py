"""Bidirectional attention over keys and values that live in several buffers.

    out = softmax(scale * q @ concat(k_1 .. k_n)^T) @ concat(v_1 .. v_n)
    lse = log(sum(exp(scale * q @ concat(k_1 .. k_n)^T)))

A window of Conditional Segment-wise Generation, a cached context, the text of an MMDiT layer and plain cross-attention
are all this one operation: the softmax runs over the union of the sources, so their order does not matter, and nothing
is concatenated. Queries and outputs may be several views too.

| tensor        | shape          | dtype                        | layout                                       |
|---------------|----------------|------------------------------|----------------------------------------------|
| q, one or n   | [B, Lq, H, D]  | fp16, bf16 (fp32, fp64: torch) | any batch, token and head strides; D contiguous |
| k_i, v_i      | [B, L_i, H, D] | as q                         | the same; strides may differ between sources |
| valid_lengths | [B]            | int32 or int64               | per source, optional                         |
| out, one or n | [B, Lq, H, D]  | as q                         | as q; contiguous if not given                |
| lse, one or n | [B, H, Lq]     | fp32                         | contiguous                                   |

Both matrix multiplications accumulate in float32, the softmax is float32 and base 2; its weights p are rounded to the
inputs' dtype for ``p @ v``, as in every fused attention. Sums run in the order of tiles, so results of different
backends differ by rounding only.

FLOPs: 4 * B * H * D * (query, key pairs seen). Least traffic: q, every k_i and v_i read once, out written once.

Which kernel serves a call, and what they do not take, is in docs/operators/attention.md. q, k and v have the same
number of heads. Masks are given by structure (``valid_lengths``, ``attends``, ``window``), never as a tensor; there is
no causal mask over tokens and no dropout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.dispatch import Choice, Question, derivative_obstacle, pick_backend, public_operator
from ..common.registration import add_op_namespace_prefix, kernel_operator
from ..common.target import device_obstacle, interpreting, on_device
from .arguments import BlockWindow, SegmentCall, Source, check_call
from .choice import choose_kernel, launch, sdpa
from .reference import segment_attention_reference

KERNEL_HEAD_DIMS = (64, 96, 128)


# Registration. Lists are flat, as the dispatcher wants them: out and lse in one, the window as no or three integers.
# The variant that writes into given outputs returns nothing: mutating operators that return lists cannot be
# functionalised.


def _new_lses(q: Sequence[Tensor], wanted: bool) -> list[Tensor]:
    return [x.new_empty((x.shape[0], x.shape[2], x.shape[1]), dtype=torch.float32) for x in q] if wanted else []


def _new_results(q: Sequence[Tensor], return_lse: bool) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in q] + _new_lses(q, return_lse)


# Schemas are spelled out because torch 2.6 cannot read them from ``list[Tensor]``.
_ARGUMENTS = (
    "Tensor[] q, Tensor[] k, Tensor[] v, Tensor?[] valid_lengths, float scale, SymInt[] attends, SymInt[] window"
)


@torch.library.custom_op(
    add_op_namespace_prefix("segment_attention"), mutates_args=(), schema=f"({_ARGUMENTS}, bool return_lse) -> Tensor[]"
)
def _segment_attention_op(*args: Any) -> list[Tensor]:
    call, return_lse = SegmentCall(*args[:-1]), args[-1]
    kernel = choose_kernel(call, return_lse)[0]
    if kernel.startswith("sdpa") and len(call.q) == 1:
        with on_device(call.q[0].device):
            return [sdpa(kernel, call.q[0], call.k[0], call.v[0], call.scale).contiguous()]
    results = _new_results(call.q, return_lse)
    launch(call._replace(out=results[: len(call.q)], lse=results[len(call.q) :]), kernel)
    return results


_segment_attention_op.register_fake(lambda q, *args: _new_results(q, args[-1]))
_segment_attention_out_op = kernel_operator(
    "segment_attention_out", f"({_ARGUMENTS}, Tensor(a!)[] out, Tensor(b!)[] lse)", SegmentCall, f"{__package__}.choice"
)


@public_operator
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
    """Computes the attention of ``q`` to the union of several key/value sources, which are read where they are.

    The result is ``softmax(scale * q @ concat(k_1 .. k_n)^T) @ concat(v_1 .. v_n)``, and nothing is concatenated.

    Args:
        q: queries ``[B, Lq, H, D]`` with contiguous D, or a list of such views.
        sources: pairs ``(k, v)``, each ``[B, L_i, H, D]`` in the dtype of ``q``; ``L_i`` may differ and may be 0, but
            not all of them. At most 24 pairs.
        scale: factor on the logits, positive; default ``D ** -0.5``.
        valid_lengths: per source None or integers ``[B]`` on the device: only the first so many of its keys count
            (padded text). A batch entry without any valid key gets output 0 and log-sum-exp -inf. A length that is not
            in ``0 .. L_i`` is an error on the CPU and counts as the nearer of the two on a GPU.
        attends: for a list of queries, the indices of the sources that each view sees; default all. Conditioning
            queries that must not see noisy keys are ``q=[q_given, q_noisy], attends=[[0], [0, 1]]``.
        window: a local mask over blocks (:class:`swifti2v_kernels.BlockWindow`), for one query view as long as the
            first source.
        return_lse: also return the logarithm (base e) of the sum of exponentials, for
            :func:`swifti2v_kernels.merge_attention`.
        out: where to write, views shaped as ``q`` that overlap neither each other nor an input.
        backend: ``auto``, ``torch`` or ``triton`` (see :mod:`swifti2v_kernels.common.dispatch`).

    Returns:
        ``[B, Lq, H, D]`` in the dtype of ``q`` (``out`` if given); a list if ``q`` is one. With ``return_lse`` a pair
        with the log-sum-exp, ``[B, H, Lq]`` float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: an argument breaks the contract; the message names it, with what was given and allowed.

    Examples:
        >>> q = torch.randn(1, 5, 2, 8)
        >>> window, text = torch.randn(2, 1, 7, 2, 8), torch.randn(2, 1, 3, 2, 8)
        >>> segment_attention(q, [tuple(window), tuple(text)]).shape
        torch.Size([1, 5, 2, 8])

    Source: CSG self-attention of SwiftI2V (arXiv 2605.06356); joint attention of MMDiT models; FlashAttention-2
    (arXiv 2307.08691) for the online softmax.
    """
    call = check_call(q, sources, scale, valid_lengths, attends, window, out)
    chosen, reason = pick_backend(backend, _obstacle(call))
    if isinstance(backend, Question):
        told = ("reference", reason) if chosen == "torch" else choose_kernel(call, return_lse)
        return Choice(chosen, *told)  # type: ignore[return-value]
    if chosen == "torch":
        call.check_lengths()
        results, lses = segment_attention_reference(call, return_lse)
        if call.out is not None:
            call.check_written()
            results = [target.copy_(result) for target, result in zip(call.out, results, strict=True)]
    elif call.out is None:
        both = _segment_attention_op(*call[:7], return_lse)
        results, lses = both[: len(call.q)], both[len(call.q) :]
    else:
        results, lses = call.out, _new_lses(call.q, return_lse)
        _segment_attention_out_op(*call[:7], results, lses)
    if isinstance(q, Tensor):
        return (results[0], lses[0]) if return_lse else results[0]
    return (results, lses) if return_lse else results


def _obstacle(call: SegmentCall) -> str | None:
    """Returns why the kernels cannot take this call, or None if they can."""
    q, views = call.q[0], (*call.q, *call.k, *call.v, *(call.out or ()))
    reason = derivative_obstacle(views) or device_obstacle(q.device)
    if reason is not None:
        return reason
    if q.shape[3] not in KERNEL_HEAD_DIMS:
        return f"kernels exist for head_dim {', '.join(map(str, KERNEL_HEAD_DIMS))}, got {q.shape[3]}"
    if q.dtype not in (torch.float16, torch.bfloat16) and not (q.dtype == torch.float32 and interpreting()):
        return f"kernels exist for float16 and bfloat16, got {q.dtype}"
    # Within one tile offsets are 32-bit.
    if any(x.stride(1) >= 2**23 for x in views):
        return "a token stride of 2**23 elements or more"
    return "a view of 2**26 tokens or more" if any(x.shape[1] >= 2**26 for x in (*call.q, *call.k)) else None
