"""The rates at which this project's code runs matmuls and moves bytes, as fractions of a card's data sheet.

    seconds = sum over matmuls of flops / (peak * fraction)  +  bytes between matmuls / (bandwidth * fraction)

A fraction depends on an extent: between given points it is linear in its logarithm, and constant beyond. Nothing
overlaps: kernels of one stream run one after another. Float32 runs on the tensor cores as TF32, at half the rate of
bf16 on every card of the table, and moves twice the bytes.

On Hopper the numbers are measured, on an NVIDIA H200 (2026-11-26, torch 2.11, triton 3.6; the card's bf16 matmul in the
same run: 795 TFLOP/s, its copy: 4,239 of 4,800 GB/s): attention 640 TFLOP/s over 70,400 keys and 573 over 17,600;
linear layers 770 to 800; norms at 0.85 to 0.95 of the copy; convolutions, upsampling, last convolution and frame
attention from the decoder's split at 2560x1408. Attention to 512 keys was not timed alone: its fraction is fitted to
whole layers and stands for what else a layer has. Float32 in the VAE is cuDNN's; its rates are fitted to the reference
of a 2K clip, measured.

**On other architectures everything is assumed**, from published peers. Attention is that of torch's own kernels, which
one dense source takes until a measured table says otherwise: A100 0.68 (FlashAttention-2 is published at 0.6 to 0.7),
GeForce 0.88 to 0.90 (at 0.9 to 0.99), L40S 0.60 (it has the A100's ratio of exponentials to matmuls, and less clock
under load), B200 0.60 (cuDNN is published at 0.6 to 0.7). Linear layers are what published matmuls reach (A100 267,
B200 1,722 TFLOP/s), less a tenth; bandwidth is nine tenths of published copies (A100 1.70, RTX 5090 1.51, B200 5.98
TB/s). Convolutions are near Hopper's, and less where the kernel does not use the card's own matmuls (B200); in float32
they are taken to be those of cuDNN in bf16.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections import Counter
from typing import NamedTuple

from bench.cost.work import Work
from swifti2v_kernels.common.cards import Card

#: Extents, growing, and the fractions there.
Points = tuple[tuple[int, float], ...]
#: Float32 without tensor cores has between a half (GeForce) and a 28th (B200) of the bf16 peak. One fraction is assumed
#: for all: it decides about a tenth of a second of a clip at 2K.
RESIZE = 1 / 32
#: The channels up to which convolutions are narrow, and from which on they are wide.
NARROW, WIDE = 192, 256
#: Keys of cross-attention.
_SHORT = 512
#: The last convolution: a program multiplies 16 columns, however few there are, so that the rate grows with them.
_LAST: Points = ((3, 0.021), (12, 0.084))


class Rates(NamedTuple):
    """The fractions on one architecture; ``narrow`` and ``wide`` are those of convolutions.

    ``float32`` has those of linear layers, narrow and wide convolutions and frame attention of a VAE in float32.
    """

    attention: Points
    linear: float
    narrow: float
    wide: float
    frame_attention: float
    bandwidth: float
    float32: tuple[float, float, float, float]
    last: Points = _LAST
    basis: str = "assumed"

    def fraction(self, kind: str, extent: int, float32: bool) -> float:
        """Returns the fraction of the dense peak for matmuls of a kind."""
        linear, narrow, wide, frame_attention = (
            self.float32 if float32 else (self.linear, self.narrow, self.wide, self.frame_attention)
        )
        if kind == "last_convolution":
            return narrow if float32 else _at(self.last, extent)
        if kind in ("convolution", "upsample"):
            return _at(((NARROW, narrow), (WIDE, wide)), extent)
        if kind in ("self_attention", "cross_attention"):
            return _at(self.attention, extent)
        return {"linear": linear, "frame_attention": frame_attention, "resize": RESIZE}[kind]


def _at(points: Points, extent: int) -> float:
    i = bisect([known for known, _ in points], extent)
    if i in (0, len(points)):
        return points[min(i, len(points) - 1)][1]
    (left, low), (right, high) = points[i - 1 : i + 1]
    return low + (high - low) * math.log(extent / left) / math.log(right / left)


def _long(fraction: float) -> Points:
    """Returns attention on cards that were not measured: short keys cost what they cost on Hopper, in proportion."""
    return ((_SHORT, round(0.3 * fraction, 3)), (8192, fraction))


_HOPPER = ((_SHORT, 0.10), (17600, 573 / 989.4), (70400, 640 / 989.4))
_ADA = Rates(_long(0.90), 0.90, 0.60, 0.75, 0.30, 0.77, (0.90, 0.60, 0.80, 0.30))
#: By architecture.
RATES = {
    "hopper": Rates(_HOPPER, 0.78, 0.475, 0.71, 0.14, 0.80, (0.60, 0.235, 0.56, 0.20), basis="measured on an H200"),
    "ampere": Rates(_long(0.68), 0.77, 0.45, 0.60, 0.14, 0.75, (0.78, 0.45, 0.60, 0.20)),
    "ada-geforce": _ADA,
    "ampere-geforce": _ADA,
    "ada": Rates(_long(0.60), 0.70, 0.45, 0.60, 0.20, 0.77, (0.70, 0.45, 0.60, 0.20)),
    "blackwell-geforce": Rates(_long(0.88), 0.88, 0.60, 0.75, 0.30, 0.76, (0.88, 0.60, 0.80, 0.30)),
    "blackwell": Rates(_long(0.60), 0.69, 0.25, 0.40, 0.14, 0.67, (0.60, 0.25, 0.50, 0.10), ((3, 0.010), (12, 0.042))),
}


def seconds(work: Work, gpu: Card, itemsize: int = 2) -> float:
    """Predicts the seconds of work on a card.

    Args:
        work: matmuls and bytes, those of elements of ``itemsize`` bytes.
        gpu: the card.
        itemsize: 2 for float16 and bfloat16, 4 for float32.
    """
    rates, float32 = RATES[gpu.architecture], itemsize == 4 and "convolution" in work.flops
    spent: Counter[str] = Counter()
    for kind, flops, extent in work.matmuls:
        # Interpolation is float32 whatever the rest is, and its fraction is of the bf16 peak.
        peak = 1e12 * gpu.bf16 * (1 if kind == "resize" else 2 / itemsize)
        spent[kind] += flops / (peak * rates.fraction(kind, extent, float32))
    moved = work.separate if float32 else work.fused
    return sum([*spent.values(), moved / (1e12 * gpu.bandwidth * rates.bandwidth)])
