"""Merging of attention results: the attention to a union of keys, from the attentions to its parts.

    lse = log(sum_i exp(lse_i))
    out = sum_i exp(lse_i - lse) * out_i

The result is exact: with the parts' own log-sum-exps it is the attention to all keys at once. It serves contexts whose
part was computed before, sources on other devices (context parallelism), and results of different kernels.

| tensor       | shape        | dtype            | layout                                              |
|--------------|--------------|------------------|-----------------------------------------------------|
| out_i        | [B, L, H, D] | fp32, fp16, bf16 | any batch, token and head strides; D contiguous     |
| lse_i        | [B, H, L]    | fp32             | any strides; natural logarithm, -inf for no keys    |
| out, lse     | as out_0, lse_0 | as out_0; fp32 | contiguous                                          |

Sums are float32. The kernel makes one pass: it reads n * B * H * L * (D + 1) elements and writes B * H * L * (D + 1),
where plain PyTorch also writes every weighted part and reads it again. FLOPs: about 2 * n * B * H * L * D. It takes any
head_dim and has no derivative. Timed on an NVIDIA H200 only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.checks import Spec, check_tensor
from ..common.dispatch import compute, kernel_obstacle, public_operator
from ..common.registration import add_op_namespace_prefix
from ..common.target import on_device

MAX_PARTS = 24
_OUTPUT = Spec(("B*", "L*", "H*", "D"), None, last="head_dim")


def _new_results(outputs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    return outputs[0].new_empty(outputs[0].shape), lses[0].new_empty(lses[0].shape)


# It returns what is always new: writing into given memory would cost a third more of the host's time.
@torch.library.custom_op(
    add_op_namespace_prefix("merge_attention"),
    mutates_args=(),
    schema="(Tensor[] outputs, Tensor[] lses) -> (Tensor, Tensor)",
)
def _merge_attention_op(outputs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    out, lse = _new_results(outputs, lses)
    if out.numel():
        from .merge_attention_kernel import launch_merge

        with on_device(out.device):
            launch_merge(outputs, lses, out, lse)
    return out, lse


_merge_attention_op.register_fake(_new_results)


class MergeCall(NamedTuple):
    """The arguments of the registered operator."""

    outputs: Sequence[Tensor]
    lses: Sequence[Tensor]

    def check(self) -> None:
        outputs, lses = self
        if isinstance(outputs, Tensor) or isinstance(lses, Tensor):
            raise TypeError("outputs, lses: expected sequences of tensors, got a tensor")
        if not 1 <= len(outputs) <= MAX_PARTS or len(outputs) != len(lses):
            raise ValueError(
                f"outputs, lses: expected 1 to {MAX_PARTS} of both, equally many, got {len(outputs)} and {len(lses)}"
            )
        first = outputs[0]
        check_tensor("outputs[0]", first, _OUTPUT)
        batch, length, heads, _ = first.shape
        spec, device = Spec(first.shape, first.dtype, last="head_dim"), first.device
        lse_spec = Spec((batch, heads, length), torch.promote_types(first.dtype, torch.float32), last="")
        for i, (o, s) in enumerate(zip(outputs, lses, strict=True)):
            if i:
                check_tensor(f"outputs[{i}]", o, spec, device)
            check_tensor(f"lses[{i}]", s, lse_spec, device)

    def obstacle(self) -> str | None:
        return kernel_obstacle((*self.outputs, *self.lses))

    def by_torch(self) -> tuple[Tensor, Tensor]:
        """Computes the formula above in PyTorch, differentiable."""
        stacked = torch.stack(list(self.lses))  # [n, B, H, L]
        # The output of a part without keys does not count, even where it is NaN.
        empty = stacked.isneginf()
        none = empty.all(0)
        lse = stacked.masked_fill(none, 0.0).logsumexp(0)
        weights, lse = (stacked - lse).exp(), lse.masked_fill(none, float("-inf"))
        weights, empty = (x.transpose(2, 3).unsqueeze(-1) for x in (weights, empty))  # [n, B, L, H, 1]
        parts = zip(weights, empty, self.outputs, strict=True)
        out = sum(weight * part.to(weight.dtype).masked_fill(e, 0.0) for weight, e, part in parts)
        return out.to(self.outputs[0].dtype).contiguous(), lse

    def by_kernel(self) -> tuple[Tensor, Tensor]:
        return _merge_attention_op(*map(list, self))


@public_operator
def merge_attention(
    outputs: Sequence[Tensor], lses: Sequence[Tensor], *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Merges attentions to parts of the keys into the attention to all of them.

    With ``lse_i`` the log-sum-exp of part i, the result is ``lse = log(sum_i exp(lse_i))`` and
    ``out = sum_i exp(lse_i - lse) * out_i``.

    Args:
        outputs: the attention to each part, ``[B, L, H, D]``, all of one dtype; at most 24.
        lses: the log-sum-exp of each part, ``[B, H, L]`` float32 (float64 for float64 outputs): natural logarithm of
            the sum of exponentials, -inf where the part has no keys, whose output then does not count, even if it is
            NaN. ``segment_attention(..., return_lse=True)`` returns both.
        backend: ``auto``, ``torch`` or ``triton`` (see :mod:`swifti2v_kernels.common.dispatch`).

    Returns:
        The pair ``(out, lse)``, shaped as one part, so that merges can be nested.

    Raises:
        TypeError, ValueError: an argument breaks the contract; the message names it.

    Examples:
        >>> q, k, v = torch.randn(3, 1, 6, 2, 8).unbind(0)
        >>> parts = [segment_attention(q, [(k[:, s], v[:, s])], return_lse=True) for s in (slice(0, 2), slice(2, 6))]
        >>> out, lse = merge_attention(*zip(*parts))
        >>> torch.allclose(out, segment_attention(q, [(k, v)]), atol=1e-6)
        True

    Source: FlashAttention-2 (arXiv 2307.08691) 3.1; Ring Attention (arXiv 2310.01889).
    """
    return compute(MergeCall(outputs, lses), backend)
