"""The paper's figures, and the configurations of this project's model that explain them.

SwiftI2V (arXiv 2605.06356) reports about 111 s for 81 frames of 2560x1408 on one H800, and 202 times less than
CineScale, a large DiT end to end, with 22,400 GPU-seconds. It does not say which DiT is Stage II's, how many steps it
takes, whether with guidance, or by which attention. So these are tried: a Stage I of 14B with 4 steps, a Stage II of
1.3B or 5B, and eager code (this project's own code is not the paper's).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from model.config import PRESETS
from model.errors import InputError
from model.memory.cost.configuration import Configuration
from model.memory.cost.gpus import get_gpu
from model.memory.cost.pipeline import parts, predict
from model.memory.cost.profiles import get_profile

#: The profiles of predictions: the paper's code is not known, and is not this project's.
PROFILES = ("reference", "reference, FlashAttention-3")
STAGE_TWO = ("1.3B", "5B")
STEPS = range(2, 13)


@dataclass(frozen=True)
class Reported:
    """The figures that the paper reports; seconds are those of one ``gpu``."""

    gpu: str = "H800"
    width: int = 2560
    height: int = 1408
    num_frames: int = 81
    seconds: float = 111.0
    baseline_seconds: float = 22400.0
    ratio: float = 202.0


REPORTED = Reported()


def two_stage(stage_two: str, steps: int, *, guidance: bool = False, **changes: Any) -> Configuration:
    """Returns the paper's clip with a Stage I of 14B and a Stage II of ``1.3B`` or ``5B``, which brings its own VAE.

    Raises:
        InputError: another Stage II, or a change to a field of :class:`Configuration` that does not fit.
    """
    if stage_two not in STAGE_TWO:
        raise InputError(f"stage_two: expected one of {', '.join(STAGE_TWO)}, got {stage_two!r}")
    large, small = PRESETS["14b-1.3b"], PRESETS["14b-1.3b" if stage_two == "1.3B" else "5b"]
    clip = {"width": REPORTED.width, "height": REPORTED.height, "num_frames": REPORTED.num_frames}
    options = {**clip, "stage_one_vae": large.vae, "steps": steps, "guidance": guidance, **changes}
    return Configuration(large.stage_one, small.stage_two, small.vae, **options)


def baseline(**changes: Any) -> Configuration:
    """Returns a stand-in for CineScale: a 14B DiT end to end at the target size, 50 steps with guidance by default."""
    clip = {"width": REPORTED.width, "height": REPORTED.height, "num_frames": REPORTED.num_frames}
    preset = PRESETS["14b-1.3b"]
    return Configuration.end_to_end(preset.stage_one, preset.vae, **{**clip, **changes})


def stated(**changes: Any) -> dict[str, Configuration]:
    """Returns the configurations for which ratios are given, by name."""
    cases = (("1.3B", 4), ("1.3B", 8), ("5B", 4), ("5B", 8), ("5B", 12))
    return {f"14B + {name}, {steps} steps": two_stage(name, steps, **changes) for name, steps in cases}


@dataclass(frozen=True)
class Ratio:
    """The ratio of end to end over two stages, in operations, which are exact, and in seconds, which are predicted."""

    name: str
    baseline_flops: int
    flops: int
    baseline_seconds: float
    seconds: float

    @property
    def flop_ratio(self) -> float:
        """The ratio of operations."""
        return self.baseline_flops / self.flops

    @property
    def time_ratio(self) -> float:
        """The ratio of predicted seconds."""
        return self.baseline_seconds / self.seconds


def ratios(
    configurations: Mapping[str, Configuration] | None = None,
    *,
    gpu: str = REPORTED.gpu,
    profile: str = "reference",
    encode_dtype: torch.dtype = torch.bfloat16,
) -> list[Ratio]:
    """Returns the ratios of :func:`baseline` over each configuration, both on one card by code of one profile.

    Args:
        configurations: the configurations by name; None: those of :func:`stated`.
        gpu, profile: names in the tables of cards and profiles.
        encode_dtype: dtype of the VAE's encoder in the baseline and in :func:`stated`.

    Raises:
        InputError: a name is unknown.
    """
    card, code = get_gpu(gpu), get_profile(profile)
    whole = baseline(encode_dtype=encode_dtype)
    given = stated(encode_dtype=encode_dtype) if configurations is None else configurations
    reference = _flops(whole), predict(whole, card, code).seconds
    return [
        Ratio(name, reference[0], _flops(c), reference[1], predict(c, card, code).seconds) for name, c in given.items()
    ]


def _flops(configuration: Configuration) -> int:
    return sum(part.work.total_flops for part in parts(configuration))


@dataclass(frozen=True)
class Consistent:
    """A configuration whose predicted time is near a reported one; ``deviation`` is predicted over reported, less 1."""

    stage_two: str
    steps: int
    guidance: bool
    profile: str
    encode_dtype: torch.dtype
    seconds: float
    deviation: float


def consistent(
    seconds: float = REPORTED.seconds,
    gpu: str = REPORTED.gpu,
    tolerance: float = 0.15,
    *,
    steps: Iterable[int] = STEPS,
    profiles: Iterable[str] = PROFILES,
    encode_dtypes: Iterable[torch.dtype] = (torch.bfloat16, torch.float32),
) -> list[Consistent]:
    """Returns the configurations whose predicted time is within ``tolerance`` of ``seconds``, the nearest first.

    Raises:
        InputError: ``seconds`` or ``tolerance`` is not positive, or a name is unknown.
    """
    for name, value in (("seconds", seconds), ("tolerance", tolerance)):
        if not value > 0:
            raise InputError(f"{name}: expected a positive number, got {value}")
    card, counts, dtypes = get_gpu(gpu), list(steps), list(encode_dtypes)
    found = []
    for profile in profiles:
        code = get_profile(profile)
        for stage_two in STAGE_TWO:
            for count in counts:
                for guidance in (False, True):
                    for dtype in dtypes:
                        configuration = two_stage(stage_two, count, guidance=guidance, encode_dtype=dtype)
                        predicted = predict(configuration, card, code).seconds
                        case = (stage_two, count, guidance, profile, dtype, predicted, predicted / seconds - 1)
                        found.append(Consistent(*case))
    return sorted((c for c in found if abs(c.deviation) <= tolerance), key=lambda c: abs(c.deviation))
