"""``python -m bench vae``: what it does without a GPU, and its measuring parts, on the CPU with small shapes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.__main__ import main
from bench.harness.timing import Ceilings, without_tf32
from bench.records.markdown import format_verdicts
from bench.records.outcome import Unavailable
from bench.vae import command as bench
from bench.vae import measure as vae_measure
from bench.vae.layers import layer_rows, settled_layers, table_entries, unique_layers
from bench.vae.measure import measure, targets
from bench.vae.providers import PROVIDERS, Provider, Runner, own_runner
from bench.vae.shapes import PARTS, SHAPES
from model import VAEPlan, plan_vae
from swifti2v_kernels import causal_conv3d, explain, pretend_gpu
from swifti2v_kernels.common import configs
from tests.support.bench_session import CPU, rows_of, timer

CEILINGS = Ceilings(1e12, 1.0, "bfloat16")
REDUCED = SHAPES[0].reduced()
SHAPE = replace(REDUCED, num_frames=5, config=replace(REDUCED.config, num_res_blocks=1))
LARGE = next(shape for shape in SHAPES if str(shape) == "2.1, 2K, 81 frames")


def wrong(shape: Any, part: str, dtype: torch.dtype, device: torch.device, limit: int | None) -> Runner:
    runner = own_runner(shape, part, dtype, device, VAEPlan())
    return replace(runner, exact=lambda clip: 1.01 * runner.exact(clip))


def empty(*given: Any) -> Runner:
    runner = own_runner(*given[:4], VAEPlan())
    return replace(runner, exact=lambda clip: float("nan") * runner.exact(clip))


def missing(*given: Any) -> Runner:
    raise Unavailable("not installed")


def hungry(*given: Any) -> Runner:
    raise torch.OutOfMemoryError("no memory left\nsecond line")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["encode", "decode"])
def test_what_is_wrong_is_not_timed_and_what_fails_is_a_row(part: str) -> None:
    rows: list[dict[str, Any]] = []
    failing = [Provider(load.__name__, load) for load in (wrong, empty, missing, hungry)]
    measure(SHAPE, part, CPU, providers=[*PROVIDERS, *failing], repeats=1, report=rows.append)
    assert [row["status"] for row in rows] == ["ok"] * 4 + ["wrong", "wrong", "not available", "out of memory"]
    assert [row["error"] for row in rows[4:6]] == [pytest.approx(0.01, rel=1e-2), None]
    assert [row.get("reason") for row in rows[6:]] == ["not installed", "no memory left"]
    assert all(("seconds" in row) == (row["status"] == "ok") for row in rows)
    ours, tiles, theirs, theirs_tiled = rows[:4]
    assert max(ours["error"], tiles["error"]) < 1e-5
    assert all("note" not in row for row in rows)
    assert theirs["error"] < 1e-5
    assert theirs_tiled["error"] > 1e-3
    assert min(row["peak_bytes"] for row in rows[:4]) > 10**5
    json.dumps(rows, allow_nan=False)


@pytest.mark.slow
def test_without_a_reference_it_is_timed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae_measure, "own_runner", hungry)
    rows: list[dict[str, Any]] = []
    measure(SHAPE, "decode", CPU, providers=PROVIDERS[2:3], repeats=1, report=rows.append)
    assert (rows[0]["status"], rows[0]["error"], rows[0]["note"]) == ("ok", None, "not checked: no memory left")


def test_references_are_float32_by_cudnn_all_the_same() -> None:
    given = torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32
    with without_tf32():
        assert (torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32) == (given[0], False)
    assert (torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32) == given


@pytest.mark.slow
def test_a_limit_is_planned_for() -> None:
    rows: list[dict[str, Any]] = []
    whole = plan_vae(SHAPE.config, "decode", SHAPE.width, SHAPE.height, dtype=torch.float32, capability=None)
    for limit in (None, whole.peak.total, 1000):
        measure(SHAPE, "decode", CPU, providers=PROVIDERS[1:2], limit=limit, repeats=1, report=rows.append)
    assert [row["limit_bytes"] for row in rows] == [None, whole.peak.total, 1000]
    assert "peak_bytes_predicted" not in rows[0]
    # A reserve for fragments is left.
    assert rows[1]["peak_bytes_predicted"] <= 0.93 * whole.peak.total
    assert rows[1]["peak_bytes"] == pytest.approx(rows[1]["peak_bytes_predicted"], rel=0.1)
    assert VAEPlan(**rows[1]["plan"]) != VAEPlan()
    assert rows[2]["status"] == "failed"
    assert "the smallest plan needs" in rows[2]["reason"]


def test_the_figures_are_judged() -> None:
    def row(provider: str, seconds: float, peak: int, **extra: Any) -> dict[str, Any]:
        base = {"version": "2.1", "size": "2K", "frames": 81, "part": "decode", "status": "ok", "limit_bytes": None}
        base |= {"provider": provider, "ours": "swifti2v" in provider, "seconds": seconds, "peak_bytes": peak}
        return {**base, **extra}

    tiles = row("swifti2v, tiles", 12.0, 4, limit_bytes=4)
    rows = [row("swifti2v", 10.0, 30), tiles, row("diffusers", 21.0, 50), row("diffusers, tiles", 40.0, 11)]
    verdicts = targets(rows)
    assert [round(v["value"], 4) for v in verdicts] == [2.1, 0.3636, 1.0]
    assert [v["met"] for v in verdicts] == [True, False, True]
    assert "MISSED" in format_verdicts([{**v, "basis": "measured"} for v in verdicts])
    assert targets([{**r, "size": "720p"} for r in rows]) == []
    assert targets(rows[:1]) == []


def test_layers_are_those_of_the_model() -> None:
    """The layers of a settled latent frame have the sizes of the clip, the history before it, and every operator."""
    layers = settled_layers(LARGE, "decode")
    large = max(layers, key=lambda layer: layer.arguments["x"].shape[2:])
    assert large.arguments["x"].shape == (1, 4, 1408, 2560, 96)
    assert large.arguments["past"].shape[1] == 2
    assert {layer.operator for layer in layers} == {"causal_conv3d", "upsample_conv2d", "frames_out"}
    assert large.cost.flops == 2 * 27 * 96 * large.row()["channels"][1] * large.row()["pixels"]


@pytest.mark.parametrize("version", ["2.1", "2.2"])
def test_layers_are_compared(version: str) -> None:
    """Every layer of a small VAE is checked and timed in turns; both are torch's here, since kernels need a GPU."""
    shape = next(s for s in SHAPES if s.version == version).reduced()
    layers = unique_layers([shape], PARTS)
    for layer in layers:
        layer.arguments["backend"] = "torch"
        rows = layer_rows(layer, CPU, timer, CEILINGS)
        assert [(row["provider"], row["status"], row["seconds"]) for row in rows] == [
            ("swifti2v", "ok", 0.5), ("cudnn", "ok", 0.5),
        ]  # fmt: skip
        assert rows[0]["where"].startswith(f"{version}, ")
        assert rows[1]["tflops"] == layer.cost.flops / 0.5 / 1e12
        assert layer.operator == "frames_out" or rows[0]["error"] > 1e-4  # whole numbers may be exact
    assert len(layers) > 15


def test_a_layer_that_is_wrong_or_does_not_fit_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = unique_layers([SHAPE], ["decode"])[0]
    rows = layer_rows(layer, CPU, timer, CEILINGS)  # whose kernel does not run on a CPU
    assert [row["status"] for row in rows] == ["failed", "ok"]
    assert "seconds" not in rows[0]
    assert table_entries({"gpu": {"capability": [9, 0]}, "device": "a card"}, rows) == []


def test_the_table_takes_the_mean_of_a_layer_s_calls() -> None:
    base = {"dtype": "bfloat16", "kernel": [3, 3, 3], "channels": [96, 96], "pixels": 10}

    def rows(calls: int, seconds: dict[str, float], **changed: Any) -> list[dict[str, Any]]:
        return [
            {**base, "calls": calls, "status": "ok", "provider": name, "seconds": s, **changed}
            for name, s in seconds.items()
        ]

    measured = rows(3, {"swifti2v": 1.0, "cudnn": 2.0}) + rows(1, {"swifti2v": 5.0, "cudnn": 2.0})
    measured += rows(1, {"swifti2v": 0.0}, status="failed")
    measured += rows(2, {"swifti2v": 1.0, "cudnn": 0.5}, kernel="upsample")
    environment = {"gpu": {"capability": [9, 0]}, "device": "a card"}
    entry = {**base, "capability": 90, "card": "a card"}
    assert table_entries(environment, measured) == [
        {**entry, "seconds": {"swifti2v": 2.0, "cudnn": 2.0}},
        {**entry, "kernel": "upsample", "seconds": {"swifti2v": 1.0, "cudnn": 0.5}},
    ]


def test_the_table_is_read_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's rows, written by the benchmark, are what the operator finds."""
    layer = next(layer for layer in settled_layers(SHAPE, "decode") if layer.operator == "causal_conv3d")
    rows = [layer.row() | {"status": "ok", "provider": "swifti2v", "seconds": 2.0}]
    rows += [rows[0] | {"provider": "cudnn", "seconds": 1.0}]
    entries = table_entries({"gpu": {"capability": [9, 0]}, "device": "a card"}, rows)
    monkeypatch.setattr(configs, "load_table", lambda name: entries)
    with pretend_gpu(90), torch.no_grad():
        choice = explain(causal_conv3d, **layer.arguments | {"backend": "auto"})
    assert choice.backend == "torch"
    assert "a card" in choice.reason


@pytest.mark.slow
def test_without_cuda_it_runs_a_small_vae(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "QUICK_SHAPES", [SHAPES[0]])
    assert main(["vae", "--quick", "--out", str(tmp_path)]) == 0
    assert "no CUDA device" in capsys.readouterr().out
    charts = {"clips-frames_per_second.svg", "clips-peak_bytes.svg"}
    assert {path.name for path in tmp_path.iterdir()} == {"result.json", "table.md", *charts}
    assert [row["status"] for row in rows_of(tmp_path, "clips")] == ["ok"] * 8
    assert main(["vae", "--quick", "--part", "layers", "--directions", "encode", "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path, "layers")
    assert {row["where"] for row in rows} == {"2.1, encode, 360P"}
    assert {(row["basis"], row["provider"]) for row in rows} == {("counted", "swifti2v")}
