"""The Triton kernel of ``merge_attention``: one program owns ``BLOCK`` tokens of one head."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

#: Tokens a program: 16 rows of 128 elements are 4 128-bit loads a thread and part with 4 warps.
BLOCK = 16


@triton.jit(do_not_specialize=["length", "heads"])
def merge_attention_fwd_kernel(
    OUTS, LSES,  # per part: [B, L, H, D], [B, H, L] float32
    OUT, LSE,  # [B, L, H, D], [B, H, L] float32, contiguous
    out_strides, lse_strides,  # per part: (batch, token, head), (batch, head, token)
    length, heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Computes the formula of ``merge_attention.py`` for one tile of tokens."""
    i_l, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = tl.cast(i_b, tl.int64), tl.cast(i_h, tl.int64)
    o_l, o_d = (i_l * BLOCK + tl.arange(0, BLOCK)).to(tl.int64), tl.arange(0, BLOCK_D)
    m_l = o_l < length
    m_out = m_l[:, None] & (o_d < HEAD_DIM)[None, :]
    # Two passes over the few lse values, so that every part's output is scaled once.
    top = tl.full([BLOCK], -1.0e38, tl.float32)  # finite, so that a row without keys makes no NaN
    for i in tl.static_range(len(LSES)):
        p_lse = LSES[i] + b * lse_strides[i][0] + h * lse_strides[i][1] + o_l * lse_strides[i][2]
        top = tl.maximum(top, tl.load(p_lse, mask=m_l, other=float("-inf")))
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for i in tl.static_range(len(OUTS)):
        p_lse = LSES[i] + b * lse_strides[i][0] + h * lse_strides[i][1] + o_l * lse_strides[i][2]
        lse = tl.load(p_lse, mask=m_l, other=float("-inf"))
        weight = tl.exp(lse - top)
        p_out = OUTS[i] + b * out_strides[i][0] + o_l[:, None] * out_strides[i][1] + h * out_strides[i][2]
        # What a part without keys holds does not count, even where it is NaN, so it is not read.
        m_part = m_out & (lse != float("-inf"))[:, None]
        part = tl.load(p_out + o_d[None, :], mask=m_part, other=0.0).to(tl.float32)  # [BLOCK, BLOCK_D]
        total += weight
        acc += weight[:, None] * part
    none = total == 0.0
    total = tl.where(none, 1.0, total)
    acc = acc / total[:, None]
    p_out = OUT + ((b * length + o_l[:, None]) * heads + h) * HEAD_DIM + o_d[None, :]
    tl.store(p_out, acc.to(OUT.dtype.element_ty), mask=m_out)
    tl.store(LSE + (b * heads + h) * length + o_l, tl.where(none, float("-inf"), top + tl.log(total)), mask=m_l)


def launch_merge(outputs: Sequence[Tensor], lses: Sequence[Tensor], out: Tensor, lse: Tensor) -> None:
    """Writes ``out`` and ``lse``, both contiguous and not empty; arguments are checked by the caller."""
    batch, length, heads, head_dim = out.shape
    merge_attention_fwd_kernel[(triton.cdiv(length, BLOCK), heads, batch)](
        tuple(outputs), tuple(lses), out, lse,
        tuple(x.stride()[:3] for x in outputs), tuple(x.stride() for x in lses), length, heads,
        HEAD_DIM=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
