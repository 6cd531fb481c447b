"""bench/NOTES.md says of the committed measurements what is in them: its tables, its sentences, its commands."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import build_parser, main
from bench.records.read import ROOT, SHIPPED

NOTES = ROOT / "bench" / "NOTES.md"
V1, V2, V3 = (
    SHIPPED / "nvidia-h200" / name for name in ("2026-11-26-33c59a6.json", "2026-11-27-f0f8a72.json",
                                                "2026-11-27-7cbf2a6.json")
)  # fmt: skip


def text() -> str:
    return " ".join(NOTES.read_text().split())


def rows(file: Path, section: str, table: str) -> list[dict[str, Any]]:
    tables = json.loads(file.read_text())["sections"][section]["tables"]
    return next(t for t in tables if t["name"] == table)["rows"]


def ceilings() -> tuple[float, float]:
    """The copy, bytes a second, and the product rate, TFLOP/s, that v1 measured first."""
    found = json.loads(V1.read_text())["sections"]["attention"]["ceilings"]
    return found["copy_bytes_per_second"], found["matmul_tflops"]


def attention() -> dict[str, dict[str, dict[str, Any]]]:
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows(V2, "attention", "attention"):
        found.setdefault(row["shape"], {})[row["provider"]] = row
    return found


def span(values: list[float], form: str = ".2f") -> str:
    return f"{min(values):{form}} to {max(values):{form}}"


def test_tables_are_those_of_the_results() -> None:
    assert main(["report", "--readme", str(NOTES), "--check"]) == 0


def test_the_measured_column_of_the_bounds_is_the_measurement_over_its_ceiling() -> None:
    copy, product = ceilings()
    assert f"copy {copy / 1e12:.2f} TB/s, bfloat16 product {product:.0f} TFLOP/s" in text()
    timed = {row["case"]: row for row in rows(V2, "operators", "timings")}
    listed = re.findall(
        r"^\| ([\w ]+?) \| [\d.]+ (memory|issue|latency|tensor) \| ([\d.]+) \|$", NOTES.read_text(), re.M
    )
    assert len(listed) == 19
    reached = 0
    for case, _, said in listed:
        products = case.startswith("causal_conv3d")
        row = timed[case]
        found = row["tflops"] / product if products else row["bytes_per_second"] / copy
        assert said == f"{found:.2f}", case
        reached += not products and round(found, 2) >= 0.85
    assert f"reached by {reached} of {sum(not case.startswith('causal_conv3d') for case, _, _ in listed)};" in text()


def test_sentences_about_attention() -> None:
    found, product = attention(), ceilings()[1]
    peer = {shape: min(r["seconds"] for p, r in by.items() if p.startswith("sdpa")) for shape, by in found.items()}

    def over(provider: str) -> dict[str, float]:
        return {shape: peer[shape] / by[provider]["seconds"] for shape, by in found.items()}

    own, public = over("swifti2v"), over("swifti2v, public function")
    cross = "CSG cross-attention 2560x1408"
    itself = [value for shape, value in own.items() if shape != cross]
    assert f"| v2: {span(list(public.values()))} of it;" in text()
    assert f"| v2: {span(itself)} for self-attention, {own[cross]:.2f} for cross-attention |" in text()
    assert f"cuDNN does it {1 / own[cross]:.2f} times faster" in text()
    several, one = found["CSG window 2560x1408, 3 sources"], found["CSG window 2560x1408, 1.3B"]
    assert f"| v2: {several['swifti2v']['seconds'] / one['swifti2v']['seconds']:.2f} of one source's time |" in text()
    rates = [by["swifti2v"]["tflops"] / product for shape, by in found.items() if shape != cross]
    assert f"self-attention at {span(rates)} of the measured product rate" in text()
    portable = over("swifti2v, portable kernel")
    assert f"stays at {span(list(portable.values()))} of cuDNN:" in text()
    rates = [by["swifti2v, portable kernel"]["tflops"] for by in found.values()]
    assert f"{span(rates, '.0f')} TFLOP/s, of a bound" in text()
    wrong = [row["error"] for row in rows(V2, "operators", "checks") if row["status"] == "wrong"]
    assert f"relative error {span(wrong, '.1f')}, found by v2's checks" in text()


def test_sentences_about_the_layer_and_the_decode() -> None:
    layer = {(r["shape"], r["timesteps"], r["provider"]): r for r in rows(V1, "dit", "layer")}
    window = "CSG window 2560x1408, 1.3B"
    ours, compiled = (layer[window, "one", name] for name in ("swifti2v", "diffusers, torch.compile"))
    assert f"| layer: 1.25 times compiled diffusers | | v1: {compiled['seconds'] / ours['seconds']:.2f} |" in text()
    assert f"| counted 0.49 | v1: {ours['peak_bytes'] / compiled['peak_bytes']:.2f} |" in text()
    stage_one = layer["Stage I 640x352, 14B", "per block", "swifti2v"]
    parts = stage_one["split"]["self-attention"] * 1e3, stage_one["seconds"] * 1e3
    assert "({:.1f} of a layer's {:.1f} ms)".format(*parts) in text()
    decode = {(r["version"], r["provider"]): r["seconds"] for r in rows(V1, "vae", "decode")}
    ratios = [decode[v, "diffusers"] / decode[v, "swifti2v"] for v in ("2.1", "2.2")]
    assert "Wan2.1 {:.2f}, Wan2.2 {:.2f} |".format(*ratios) in text()


def test_sentences_about_convolutions() -> None:
    by: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows(V1, "vae", "layers"):
        if row["where"].startswith("2.2"):
            by.setdefault(row["layer"], {})[row["provider"]] = row

    def pick(kernel: Any, least: int) -> list[dict[str, dict[str, Any]]]:
        return [b for b in by.values() if b["cudnn"]["kernel"] == kernel and b["cudnn"]["channels"][0] >= least]

    def gain(some: list[dict[str, dict[str, Any]]]) -> list[float]:
        return [b["cudnn"]["seconds"] / b["swifti2v"]["seconds"] for b in some]

    wide = pick([3, 3, 3], 512)
    assert f"our kernel has {span(gain(wide))} of cuDNN's speed" in text()
    theirs, ours = ([b[p]["fraction_of_matmul"] for b in wide] for p in ("cudnn", "swifti2v"))
    assert f"cuDNN runs at {span(theirs)} of the product rate, ours at {span(ours)}" in text()
    (pointwise,) = gain(pick([1, 1, 1], 512))
    in_time, upsampling = span(gain(pick([3, 1, 1], 512))), span(gain(pick("upsample", 512)))
    assert (
        f"({in_time} times), on the wide pointwise one ({pointwise:.2f}) and on upsampling ones ({upsampling})"
        in text()
    )


def test_sentences_about_the_clip() -> None:
    stages = {row["stage"]: row["seconds"] for row in rows(V3, "csg", "stages")}
    clips = {(row["model"], row["method"]): row for row in rows(V3, "csg", "clips")}
    clip, base = clips["1.3b", "two stages, CSG"], clips["14b", "end-to-end, 50 steps, guidance, FlashAttention-2"]
    own, total = clips["14b", "end-to-end, 50 steps, guidance"]["total_seconds"], clip["total_seconds"]
    seconds = base["total_seconds"]
    ratios = seconds / total, own / total
    assert "{:.0f} s, {:.0f} against FlashAttention-2, {:.0f} against our own".format(total, *ratios) in text()
    said = f"with the baseline of {seconds:,.0f} s, 404 needs {seconds / 404:.1f} s, and the clip takes {total:.1f}"
    assert said in text()
    for name, there in (
        ("reference", "**The reference, {:.1f} s.**"), ("Stage II", "**Stage II, {:.1f} s**"),
        ("decode", "**Decode, {:.1f} s**"), ("Stage I", "**Stage I, {:.1f} s**"), ("file", "The file's {:.1f} s"),
    ):  # fmt: skip
        assert there.format(stages[name]) in text()
    assert f"of which attention {clip['attention_seconds']:.1f}" in text()
    assert f"of a latent frame's {stages['decode'] / 21 * 1e3:.0f} (extrapolated);" in text()
    # Five seconds instead of the encoder's, and Stage I's latents decoded beside them, a sixteenth of a decode.
    sooner = total - stages["reference"] + 5 + stages["decode"] / 16
    assert f"which alone makes {round(seconds / sooner, -1):.0f}" in text()


def commands() -> list[str]:
    return re.findall(r"`(python -m bench [^`]+)`", NOTES.read_text().split("## Not measured yet")[1])


@pytest.mark.parametrize("command", commands())
def test_what_is_left_to_measure_is_a_command_line_that_exists(command: str) -> None:
    args = build_parser().parse_args(shlex.split(command)[3:])
    assert args.command in ("campaign", "memory", "tune", "operators", "dit")


def test_files_that_hold_what_was_mended_exist() -> None:
    named = set(re.findall(r"\b(?:tests|bench|swifti2v_kernels)/[\w/]+\.(?:py|json)", NOTES.read_text()))
    assert len(named) >= 8
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
