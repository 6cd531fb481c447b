"""The Triton kernel of ``rms_norm_silu``: a program owns a few whole pixels of one frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import triton
import triton.language as tl

from ..common.configs import configured
from ..common.frames import frame_strides, pixels
from ..common.target import capability_of


@dataclass(frozen=True)
class NormConfig:
    """The share of a program: ``block_m`` pixels, computed by ``num_warps`` warps."""

    block_m: int
    num_warps: int

    SPACE: ClassVar = {"block_m": (1, 2, 4, 8, 16, 32, 64), "num_warps": (2, 4, 8)}

    @classmethod
    def heuristic(cls, block_c: int) -> NormConfig:
        """Returns the configuration for pixels padded to ``block_c`` channels, with 32 values a thread.

        They are loaded 16 bytes at a time.
        """
        return cls(max(4096 // block_c, 1), 4)


@triton.jit(do_not_specialize=["height", "width"])
def rms_norm_silu_fwd_kernel(
    X, WEIGHT, OUT,  # [B, T, h, w, C], [C], [B, T, h, w, C]
    x_strides, out_strides,  # (batch, frame, row, column)
    height, width,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Computes the formula of ``rms_norm_silu.py`` for BLOCK_M pixels."""
    t, b = tl.program_id(1), tl.cast(tl.program_id(2), tl.int64)
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = tl.arange(0, BLOCK_C)
    row, column = o_m // width, o_m % width
    m_c = o_c < C
    m = (o_m < height * width)[:, None] & m_c[None, :]
    x = tl.load(pixels(X, x_strides, b, t, row, column)[:, None] + o_c[None, :], mask=m, other=0.0).to(tl.float32)
    weight = tl.load(WEIGHT + o_c, mask=m_c, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.maximum(tl.sum(x * x, 1), 1e-24) / C)
    y = x * factor[:, None] * weight[None, :]
    y = y * tl.sigmoid(y)
    p_out = pixels(OUT, out_strides, b, t, row, column)
    tl.store(p_out[:, None] + o_c[None, :], y.to(OUT.dtype.element_ty), mask=m)


def launch(call: Any) -> None:
    """Writes ``out`` of a checked ``SiluCall``."""
    x, weight, out = call
    batch, frames, height, width, channels = x.shape
    block_c = triton.next_power_of_2(channels)
    key = {"block_c": block_c, "itemsize": x.element_size()}
    config = configured("rms_norm_silu", capability_of(x.device), NormConfig.heuristic(block_c), **key)
    rms_norm_silu_fwd_kernel[(triton.cdiv(height * width, config.block_m), frames, batch)](
        x, weight, out, *frame_strides(x, out), height, width,
        C=channels, BLOCK_C=block_c, BLOCK_M=config.block_m, num_warps=config.num_warps, enable_fp_fusion=True,
    )  # fmt: skip
