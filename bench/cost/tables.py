"""Rows to print: flat dictionaries, one table a function. Nothing is formatted or printed here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from bench.cost.calibration import calibration
from bench.cost.paper import Consistent, Ratio, baseline
from model.config import PRESETS
from model.cost.gpus import GPUS
from model.cost.pipeline import Configuration, parts, predict
from model.cost.profiles import PROFILES, get_profile

Row = dict[str, Any]


def headline() -> dict[str, Configuration]:
    """What tables are about unless told otherwise: the presets for GPUs, and the 14B end to end, by name."""
    found = {name: Configuration.for_preset(name) for name, preset in PRESETS.items() if preset.width == 2560}
    return {**found, "14B end to end": baseline()}


def gpu_rows() -> list[Row]:
    """The cards."""
    return [asdict(gpu) for gpu in GPUS.values()]


def profile_rows() -> list[Row]:
    """The fractions of every profile on every card, for long attention and for narrow and wide convolutions."""
    rows = []
    for profile in PROFILES.values():
        for gpu in GPUS.values():
            rates = profile.rates_for(gpu)
            row = {"profile": profile.name, "gpu": gpu.name, "attention": rates.attention.points[-1][1]}
            row |= {"linear": rates.linear, "convolution_narrow": rates.convolution.points[0][1]}
            row |= {"convolution_wide": rates.convolution.points[-1][1], "bandwidth": rates.bandwidth}
            rows.append({**row, "basis": rates.basis})
    return rows


def calibration_rows() -> list[Row]:
    """Known times, their predictions and the ratio of the two."""
    return [{**asdict(case), "ratio": case.ratio} for case in calibration()]


def part_rows(configurations: Mapping[str, Configuration] | None = None) -> list[Row]:
    """Operations by kind, bytes and peak memory of every part, untiled."""
    rows = []
    for name, configuration in (headline() if configurations is None else configurations).items():
        for part in parts(configuration):
            row = {"configuration": name, "stage": part.stage, "part": part.name, "flops": part.work.total_flops}
            row |= {f"flops_{kind}": flops for kind, flops in part.flops.items()}
            rows.append({**row, "bytes": part.bytes, "peak_bytes": part.peak_bytes})
    return rows


def prediction_rows(
    configurations: Mapping[str, Configuration] | None = None,
    gpus: Iterable[str] = tuple(GPUS),
    profile: str = "swifti2v",
) -> list[Row]:
    """Predicted seconds of every configuration on every card: in all and by stage; the peak, and whether it fits."""
    code, rows = get_profile(profile), []
    for name, configuration in (headline() if configurations is None else configurations).items():
        for gpu in gpus:
            prediction = predict(configuration, GPUS[gpu], code)
            row = {"configuration": name, "gpu": gpu, "profile": profile, "seconds_predicted": prediction.seconds}
            row |= {f"{stage}_predicted": needed for stage, needed in prediction.by_stage.items()}
            row |= {"peak_bytes_predicted": prediction.peak_bytes, "fits": all(p.fits for p in prediction.parts)}
            rows.append(row)
    return rows


def ratio_rows(ratios: Iterable[Ratio]) -> list[Row]:
    """Of :func:`bench.cost.paper.ratios`."""
    return [{**asdict(r), "flop_ratio": r.flop_ratio, "time_ratio_predicted": r.time_ratio} for r in ratios]


def consistent_rows(found: Iterable[Consistent]) -> list[Row]:
    """Of :func:`bench.cost.paper.consistent`."""
    return [{**asdict(c), "encode_dtype": str(c.encode_dtype).removeprefix("torch.")} for c in found]
