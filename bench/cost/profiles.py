"""The rates at which code of three kinds runs matmuls and moves bytes, as fractions of a card's data sheet.

    seconds = sum over matmuls of flops / (peak * fraction)  +  bytes between matmuls / (bandwidth * fraction)

A fraction depends on an extent (:class:`Curve`). Nothing overlaps: kernels of one stream run one after another. Float32
runs on the tensor cores as TF32, at half the rate of bf16 on every card of the table, and moves twice the bytes.

``reference``: eager PyTorch with FlashAttention-2. On Hopper, A100 and RTX 4090 attention, linear layers and bandwidth
were fitted, together with :data:`bench.cost.dit.EAGER_BYTES`, to the times that the Wan2.1 and Wan2.2
repositories publish; convolutions on Hopper to diffusers' decoder, measured on an NVIDIA H200 (2026-11-26, torch 2.11).

``reference, FlashAttention-3``: the same with FlashAttention-3, which exists for Hopper only; fitted to the times that
Wan2.2 publishes for it.

``swifti2v``: this project. On Hopper its numbers are measured, on an NVIDIA H200 (2026-11-26, torch 2.11, triton 3.6;
the card's bf16 matmul in the same run: 795 TFLOP/s, its copy: 4,239 of 4,800 GB/s): attention 640 TFLOP/s over
70,400 keys and 573 over 17,600; linear layers 770 to 800; norms at 0.85 to 0.95 of the copy; convolutions, upsampling,
last convolution and frame attention from the decoder's split at 2560x1408. Attention to 512 keys was not timed alone:
its fraction is fitted to whole layers and stands for what else a layer has.

Float32 in the VAE is cuDNN's in all profiles; on Hopper its rates are fitted to the reference of a 2K clip, measured.

**On other architectures everything of ``swifti2v`` is assumed**, from published peers. Attention is that of torch's own
kernels, which one dense source takes until a measured table says otherwise: A100 0.68 (FlashAttention-2 is published at
0.6 to 0.7), GeForce 0.88 to 0.90 (at 0.9 to 0.99), L40S 0.60 (it has the A100's ratio of exponentials to matmuls, and
less clock under load), B200 0.60 (cuDNN is published at 0.6 to 0.7). Linear layers are what published matmuls
reach (A100 267, B200 1,722 TFLOP/s), less a tenth; bandwidth is nine tenths of published copies (A100 1.70, RTX 5090
1.51, B200 5.98 TB/s). Convolutions are near Hopper's, and less where the kernel does not use the card's own matmuls
(B200). ``reference`` is assumed on RTX 5090, L40S and B200.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from bench.cost.work import UNFOLDED, Work
from model.errors import InputError
from swifti2v_kernels.common.cards import Card


@dataclass(frozen=True)
class Curve:
    """A fraction that depends on an extent: given points, linear in its logarithm between them, constant beyond."""

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        extents = [extent for extent, _ in self.points]
        if not extents or extents != sorted(set(extents)) or extents[0] < 1:
            raise ValueError(f"points: expected one or more with growing positive extents, got {self.points}")
        if not all(0 < fraction <= 1 for _, fraction in self.points):
            raise ValueError(f"points: expected fractions above 0 and up to 1, got {self.points}")

    @classmethod
    def constant(cls, fraction: float) -> Curve:
        """Returns a curve with the same fraction for every extent."""
        return cls(((1, fraction),))

    def at(self, extent: int) -> float:
        """Returns the fraction for an extent."""
        i = bisect([known for known, _ in self.points], extent)
        if i in (0, len(self.points)):
            return self.points[min(i, len(self.points) - 1)][1]
        (left, low), (right, high) = self.points[i - 1 : i + 1]
        return low + (high - low) * math.log(extent / left) / math.log(right / left)


@dataclass(frozen=True)
class Rates:
    """The fractions on one architecture; ``basis`` says in a few words where they come from."""

    attention: Curve
    linear: float
    convolution: Curve
    last_convolution: Curve
    frame_attention: float
    bandwidth: float
    basis: str

    def fraction(self, kind: str, extent: int) -> float:
        """Returns the fraction of the dense bf16 peak."""
        if kind in ("self_attention", "cross_attention"):
            return self.attention.at(extent)
        if kind in ("convolution", "upsample"):
            return self.convolution.at(extent)
        if kind == "last_convolution":
            return self.last_convolution.at(extent)
        if kind == "resize":
            return RESIZE
        return self.linear if kind == "linear" else self.frame_attention


#: Float32 without tensor cores has between a half (GeForce) and a 28th (B200) of the bf16 peak. One fraction is assumed
#: for all: it decides about a tenth of a second of a clip at 2K.
RESIZE = 1 / 32
#: The channels up to which convolutions are narrow, and from which on they are wide.
NARROW, WIDE = 192, 256


def _rates(
    attention: float | tuple[tuple[int, float], ...],
    linear: float,
    convolution: tuple[float, float],
    last: float | tuple[tuple[int, float], ...],
    frame_attention: float,
    bandwidth: float,
    basis: str,
) -> Rates:
    narrow, wide = convolution
    curves = [Curve.constant(x) if isinstance(x, float) else Curve(x) for x in (attention, last)]
    return Rates(
        curves[0], linear, Curve(((NARROW, narrow), (WIDE, wide))), curves[1], frame_attention, bandwidth, basis
    )


_WAN = "fitted to published Wan times and to diffusers' decoder, measured"
_WAN_DIT = "DiT fitted to published Wan times, VAE assumed"
_ASSUMED = "assumed"
_REFERENCE = {
    "hopper": _rates(0.40, 0.60, (0.28, 0.66), 0.28, 0.20, 0.70, _WAN),
    "ampere": _rates(0.68, 0.78, (0.45, 0.60), 0.45, 0.20, 0.75, _WAN_DIT),
    "ada-geforce": _rates(0.90, 0.90, (0.60, 0.80), 0.60, 0.30, 0.80, _WAN_DIT),
    "ampere-geforce": _rates(0.90, 0.90, (0.60, 0.80), 0.60, 0.30, 0.80, _ASSUMED),
    "ada": _rates(0.60, 0.70, (0.45, 0.60), 0.45, 0.20, 0.80, _ASSUMED),
    "blackwell-geforce": _rates(0.88, 0.88, (0.60, 0.80), 0.60, 0.30, 0.80, _ASSUMED),
    "blackwell": _rates(0.20, 0.60, (0.25, 0.50), 0.25, 0.10, 0.70, _ASSUMED),
}
#: cuDNN's convolutions in float32 (TF32) on Hopper, where the 2K encoder was measured; elsewhere as in bf16.
_FLOAT32 = {**_REFERENCE, "hopper": _rates(0.40, 0.60, (0.235, 0.56), 0.235, 0.20, 0.70, "measured on an H200")}
_SHORT = 512


def _attention(long: float) -> tuple[tuple[int, float], ...]:
    """Returns the curve of cards that were not measured: short keys cost what they cost on Hopper, in proportion."""
    return ((_SHORT, round(0.3 * long, 3)), (8192, long))


# A program multiplies 16 columns, however few there are: the rate grows with them.
_LAST = ((3, 0.021), (12, 0.084))
_SWIFTI2V = {
    "hopper": _rates(
        ((_SHORT, 0.10), (17600, 573 / 989.4), (70400, 640 / 989.4)),
        0.78,
        (0.475, 0.71),
        _LAST,
        0.14,
        0.80,
        "measured on an H200",
    ),
    "ampere": _rates(_attention(0.68), 0.77, (0.45, 0.60), _LAST, 0.14, 0.75, _ASSUMED),
    "ada-geforce": _rates(_attention(0.90), 0.90, (0.60, 0.75), _LAST, 0.30, 0.77, _ASSUMED),
    "ampere-geforce": _rates(_attention(0.90), 0.90, (0.60, 0.75), _LAST, 0.30, 0.77, _ASSUMED),
    "ada": _rates(_attention(0.60), 0.70, (0.45, 0.60), _LAST, 0.20, 0.77, _ASSUMED),
    "blackwell-geforce": _rates(_attention(0.88), 0.88, (0.60, 0.75), _LAST, 0.30, 0.76, _ASSUMED),
    "blackwell": _rates(_attention(0.60), 0.69, (0.25, 0.40), ((3, 0.010), (12, 0.042)), 0.14, 0.67, _ASSUMED),
}


@dataclass(frozen=True)
class Profile:
    """A kind of code. ``form`` is the field of :class:`bench.cost.work.Traffic` that it moves between
    matmuls."""

    name: str
    form: str
    folded: bool
    rates: Mapping[str, Rates]
    #: The same for the VAE in float32, where all profiles use cuDNN's convolutions.
    float32: str
    description: str

    def rates_for(self, gpu: Card) -> Rates:
        """Returns the fractions on a card."""
        return self.rates[gpu.architecture]


PROFILES: Mapping[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile("reference", "eager", False, _REFERENCE, "eager", "eager PyTorch with FlashAttention-2"),
        Profile(
            "reference, FlashAttention-3",
            "eager",
            False,
            {**_REFERENCE, "hopper": _rates(0.66, 0.60, (0.28, 0.66), 0.28, 0.20, 0.70, _WAN)},
            "eager",
            "eager PyTorch with FlashAttention-3 on Hopper, FlashAttention-2 elsewhere",
        ),
        Profile("swifti2v", "fused", True, _SWIFTI2V, "separate", "the kernels and the model of this project"),
    )
}


def get_profile(name: str) -> Profile:
    """Returns the profile called ``name``.

    Raises:
        InputError: there is none; the message lists those that exist.
    """
    if name not in PROFILES:
        raise InputError(f"profile: unknown {name!r}; choose one of {', '.join(PROFILES)}")
    return PROFILES[name]


def seconds_by_kind(work: Work, gpu: Card, profile: Profile, itemsize: int = 2) -> dict[str, float]:
    """Predicts seconds by kind of matmul, and ``between`` matmuls.

    Args:
        work: matmuls and bytes, those of elements of ``itemsize`` bytes.
        gpu: the card.
        profile: the kind of code.
        itemsize: 2 for float16 and bfloat16, 4 for float32.

    Raises:
        InputError: another ``itemsize``.
    """
    if itemsize not in (2, 4):
        raise InputError(f"itemsize: expected 2 or 4, got {itemsize}")
    rates, form = profile.rates_for(gpu), profile.form
    bandwidth = rates.bandwidth
    if itemsize == 4 and "convolution" in work.flops:
        rates, form = _FLOAT32[gpu.architecture], profile.float32
    spent: dict[str, float] = defaultdict(float)
    for matmul in work.matmuls:
        flops = matmul.flops * (UNFOLDED if matmul.kind == "upsample" and not profile.folded else 1)
        # Interpolation is float32 whatever the rest is, and its fraction is of the bf16 peak.
        peak = 1e12 * gpu.bf16 * (1 if matmul.kind == "resize" else 2 / itemsize)
        spent[matmul.kind] += flops / (peak * rates.fraction(matmul.kind, matmul.extent))
    spent["between"] = getattr(work.between, form) / (1e12 * gpu.bandwidth * bandwidth)
    return dict(spent)


def seconds(work: Work, gpu: Card, profile: Profile, itemsize: int = 2) -> float:
    """Predicts the seconds of all work; arguments as for :func:`seconds_by_kind`."""
    return sum(seconds_by_kind(work, gpu, profile, itemsize).values())
