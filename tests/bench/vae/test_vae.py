"""``python -m bench vae``: what it does without a GPU, and its measuring parts, on the CPU with small shapes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from bench.__main__ import main
from bench.harness.timing import without_tf32
from bench.records.markdown import format_section, format_verdicts
from bench.records.outcome import Unavailable
from bench.records.package_tables import merge
from bench.vae import command as bench
from bench.vae import layers as vae_layers
from bench.vae import measure as vae_measure
from bench.vae.layers import call, make_inputs, measure_layer, settled_layers, table_entries, unique_layers
from bench.vae.measure import clip_for, measure, save_differences, seam, targets
from bench.vae.providers import PROVIDERS, Provider, Runner, own_runner
from bench.vae.shapes import PARTS, SHAPES
from model import VAEPlan, plan_vae
from tests.support.bench_session import CPU, read_section, rows_of, session, timer

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


def broken(*given: Any) -> Runner:
    raise NotImplementedError("not for this shape")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["encode", "decode"])
def test_what_is_wrong_is_not_timed_and_what_fails_is_a_row(part: str) -> None:
    rows: list[dict[str, Any]] = []
    failing = [Provider(load.__name__, load) for load in (wrong, empty, missing, hungry, broken)]
    measure(SHAPE, part, CPU, providers=[*PROVIDERS, *failing], repeats=1, report=rows.append)
    statuses = ["ok"] * 4 + ["wrong", "wrong", "not available", "out of memory", "failed"]
    assert [row["status"] for row in rows] == statuses
    assert [row["error"] for row in rows[4:6]] == [pytest.approx(0.01, rel=1e-2), None]
    assert [row.get("reason") for row in rows[6:]] == ["not installed", "no memory left", "not for this shape"]
    assert all(("seconds" in row) == (row["status"] == "ok") for row in rows)
    ours, tiles, theirs, theirs_tiled = rows[:4]
    assert max(ours["error"], tiles["error"]) < 1e-5
    assert all("note" not in row for row in rows)
    assert theirs["error"] == 0
    assert theirs_tiled["error"] > 1e-3
    assert min(row["peak_bytes"] for row in rows[:4]) > 10**5
    if part == "decode":
        assert tiles["seam"] == pytest.approx(tiles["seam_untiled"], rel=1e-4)
        assert theirs_tiled["seam"] != pytest.approx(theirs_tiled["seam_untiled"], rel=1e-4)
    json.dumps(rows, allow_nan=False)


@pytest.mark.slow
def test_without_diffusers_ours_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae_measure, "diffusers_runner", missing)
    assert vae_measure.reference(SHAPE, "decode", CPU)[1] == "swifti2v by torch, float32"
    rows: list[dict[str, Any]] = []
    measure(SHAPE, "decode", CPU, providers=PROVIDERS[1:2], repeats=1, report=rows.append)
    assert rows[0]["status"] == "ok"
    monkeypatch.setattr(vae_measure, "own_runner", hungry)
    measure(SHAPE, "decode", CPU, providers=PROVIDERS[:1], repeats=1, report=rows.append)
    reasons = "diffusers, float32: not installed; swifti2v by torch, float32: no memory left"
    assert rows[1]["note"] == f"checked against nothing ({reasons})"
    assert rows[1]["error"] is None
    assert rows[1]["status"] == "ok"


@pytest.mark.slow
def test_implementations_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each implementation runs once alone, which gives its peak, and then in rounds; the spread is that of its runs."""
    order: list[str] = []
    stock = vae_measure._Run._pass
    names = {id(provider.load): provider.name for provider in PROVIDERS}
    assert len(names) == 4

    def noted(self: Any, clip: torch.Tensor) -> float:
        order.append("tiles" if any(self.runner.borders) else "whole")
        return stock(self, clip)

    monkeypatch.setattr(vae_measure._Run, "_pass", noted)
    rows: list[dict[str, Any]] = []
    measure(SHAPE, "decode", CPU, providers=PROVIDERS[:2], repeats=3, report=rows.append)
    # On a CPU the first pass of each is counted, with no time.
    assert order == ["whole"] * 2 + ["tiles"] * 2 + ["whole", "tiles"] * 3
    for row in rows:
        assert row["runs"] == 3
        assert 0 < row["seconds_low"] <= row["seconds"] <= row["seconds_high"]


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


def test_the_seam_measure_sees_seams() -> None:
    frames = torch.randn(1, 3, 2, 40, 60)
    borders = ([10, 20], [15, 30, 45])
    assert seam(frames, borders) == pytest.approx(1, abs=0.1)
    for row in borders[0]:
        frames[..., row:, :] += 5
    assert seam(frames, borders) > 2
    assert seam(frames, ([], [15, 30, 45])) < 1.1


def test_the_figures_are_judged() -> None:
    def row(provider: str, seconds: float, peak: int, **extra: Any) -> dict[str, Any]:
        base = {"version": "2.1", "size": "2K", "frames": 81, "part": "decode", "status": "ok", "limit_bytes": None}
        base |= {"provider": provider, "ours": "swifti2v" in provider, "seconds": seconds, "peak_bytes": peak}
        return {**base, "seam": None, "seam_untiled": None, **extra}

    tiles = row("swifti2v, tiles", 12.0, 4, seam=1.0, seam_untiled=1.0001, limit_bytes=4)
    rows = [row("swifti2v", 10.0, 30), tiles, row("diffusers", 21.0, 50), row("diffusers, tiles", 40.0, 11)]
    verdicts = targets(rows)
    assert [round(v["value"], 4) for v in verdicts] == [2.1, 0.3636, 0.0001, 1.0]
    assert [v["met"] for v in verdicts] == [True, False, True, True]
    assert "MISSED" in format_verdicts([{**v, "basis": "measured"} for v in verdicts])
    assert targets([{**r, "size": "720p"} for r in rows]) == []
    assert targets(rows[:1]) == []


def test_layers_are_those_of_the_model() -> None:
    """The layers of a settled latent frame have the sizes of the clip, the history before it, and every operator."""
    layers = settled_layers(LARGE, "decode")
    large = max(layers, key=lambda layer: (layer.height, layer.channels))
    assert (large.width, large.height, large.frames, large.past) == (2560, 1408, 4, 2)
    assert {layer.operator for layer in layers} == {"causal_conv3d", "upsample_conv2d", "frames_out"}


@pytest.mark.slow
@pytest.mark.parametrize("reduced", [False, True])
def test_layers_are_told_apart_by_their_names(reduced: bool) -> None:
    """Two layers that differ have different names, by which a table tells its rows apart."""
    layers = [layer for layer, _, _ in unique_layers([s.reduced() if reduced else s for s in SHAPES], PARTS)]
    assert len(layers) > 50
    assert len({str(layer) for layer in layers}) == len(set(layers)) == len(layers)


@pytest.mark.parametrize("version", ["2.1", "2.2"])
def test_layers_can_be_called(version: str) -> None:
    """Every layer of a small VAE gives results of the recorded size, and as large as its inputs."""
    shape = next(s for s in SHAPES if s.version == version).reduced()
    for layer, _, where in unique_layers([shape], PARTS):
        assert where.startswith(f"{version}, ")
        results = call(layer, make_inputs(layer, torch.float32, CPU), "torch")
        assert len(results) == (2 if layer.norm and layer.keep_sum else 1)
        frames, rows, columns = layer.result_size
        size = (1, frames, rows * layer.patch_size, columns * layer.patch_size)
        assert {tuple(y.shape[:4]) for y in results} == {size}, layer
        assert 0.2 < results[0].std() < 3, layer


def test_layers_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are checked and timed in turns; both implementations are torch's here, since kernels need a GPU."""
    by_torch = vae_layers.call
    monkeypatch.setattr(vae_layers, "call", lambda layer, arguments, backend: by_torch(layer, arguments, "torch"))
    layers = unique_layers([SHAPE], PARTS)[:5]
    rows = [row for layer in layers for row in measure_layer(*layer, torch.bfloat16, CPU, timer, 1.0)]
    assert [(row["provider"], row["status"]) for row in rows] == [("swifti2v", "ok"), ("cudnn", "ok")] * 5
    assert {row["seconds"] for row in rows} == {0.5}
    assert rows[1]["tflops"] == layers[0][0].flops / 0.5 / 1e12
    assert all(1e-4 < row["error"] < 1e-2 for row in rows[::2])
    monkeypatch.setattr(vae_layers, "call", lambda layer, arguments, backend: hungry())
    failed = measure_layer(*layers[0], torch.bfloat16, CPU, timer, 1.0)
    assert [row["status"] for row in failed] == ["out of memory"] * 2
    calls = iter((1.0, 1.1))
    monkeypatch.setattr(
        vae_layers, "call", lambda layer, arguments, backend: [next(calls) * by_torch(layer, arguments, "torch")[0]]
    )
    wrong_rows = measure_layer(*layers[0], torch.bfloat16, CPU, timer, 1.0)
    assert {row["status"] for row in wrong_rows} == {"wrong"}
    assert all("seconds" not in row for row in wrong_rows)


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
    old = {**base, "capability": 90, "seconds": {"swifti2v": 9.0, "cudnn": 9.0}, "card": "a card"}
    other = {**old, "capability": 89}
    table = merge({"entries": [old, other]}, table_entries(environment, measured))
    assert len(table["entries"]) == 3
    found = {(e["capability"], str(e["kernel"])): e["seconds"] for e in table["entries"]}
    assert found[90, "[3, 3, 3]"] == {"swifti2v": 2.0, "cudnn": 2.0}
    assert found[90, "upsample"] == {"swifti2v": 1.0, "cudnn": 0.5}
    assert found[89, "[3, 3, 3]"] == old["seconds"]


def test_the_table_is_read_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's rows, written by the benchmark, are what the operator finds."""
    from swifti2v_kernels import causal_conv3d, explain, pretend_gpu
    from swifti2v_kernels.common import tables

    layer = next(layer for layer in settled_layers(SHAPE, "decode") if layer.operator == "causal_conv3d")
    row = {**layer.table_key, "dtype": "bfloat16", "calls": 1, "status": "ok"}
    rows = [{**row, "provider": name, "seconds": s} for name, s in (("swifti2v", 2.0), ("cudnn", 1.0))]
    environment = {"gpu": {"capability": [9, 0]}, "device": "a card"}
    entries = table_entries(environment, rows)
    monkeypatch.setattr(tables, "load_table", lambda name: entries)
    with pretend_gpu(90):
        arguments = make_inputs(layer, torch.bfloat16, torch.device("cpu"))
        arguments = {name: t.to("meta") if isinstance(t, torch.Tensor) else t for name, t in arguments.items()}
        arguments.pop("keep_sum")
        choice = explain(causal_conv3d, arguments.pop("x"), arguments.pop("weight"), **arguments)
    assert choice.backend == "torch"
    assert "a card" in choice.reason


@pytest.mark.slow
def test_without_cuda_it_runs_a_small_vae(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "QUICK_SHAPES", [SHAPES[0]])
    assert main(["vae", "--quick", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "no CUDA device" in out
    names = {path.name for path in tmp_path.iterdir()}
    charts = {"clips-frames_per_second.svg", "clips-peak_bytes.svg", "difference-2.1-80x40.png"}
    assert names == {"result.json", "table.md", *charts}
    tables = read_section(tmp_path)["tables"]
    assert [row["status"] for row in tables["clips"]["rows"]] == ["ok"] * 8
    arguments = ["vae", "--quick", "--part", "encode", "--only", "swifti2v", "--json", "--out", str(tmp_path)]
    assert main(arguments) == 0
    rows = rows_of(tmp_path, "clips")
    assert {(row["part"], row["ours"]) for row in rows} == {("encode", True)}
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "result.json").read_text())


def test_a_run_with_layers_leaves_tables_and_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    by_torch = vae_layers.call
    monkeypatch.setattr(vae_layers, "call", lambda layer, arguments, backend: by_torch(layer, arguments, "torch"))
    layers = unique_layers([SHAPE], ("decode",))[:2]
    with session(tmp_path) as found:
        bench.measure_layers(found, layers, 1, copied_bytes=64, size=16)
    rows = rows_of(tmp_path, "layers")
    assert [row["status"] for row in rows] == ["ok"] * 4
    assert str(layers[0][0]) in format_section(found.section.data)
    assert read_section(tmp_path)["ceilings"]["matmul_tflops"] > 0


def test_what_there_is_so_far_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stop(*given: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    stock = bench.measure
    monkeypatch.setattr(
        bench, "measure", lambda *given, **options: (stop if given[1] == "encode" else stock)(*given, **options)
    )
    with pytest.raises(KeyboardInterrupt), session(tmp_path) as found:
        bench.measure_clips(found, [SHAPE], PARTS, PROVIDERS[:1], repeats=1)
    section = read_section(tmp_path)
    assert section["status"] == "interrupted"
    assert len(section["tables"]["clips"]["rows"]) == 1


def test_a_moving_picture_is_the_same_whatever_its_length() -> None:
    long, short = clip_for(SHAPE, "encode", 3, CPU), clip_for(SHAPE, "encode", 2, CPU)
    assert torch.equal(long[:, :, :5], short)
    assert long.abs().max() <= 0.8 + 1e-6
    assert (long[:, :, 0] - long[:, :, 4]).abs().mean() > 0.05


def test_a_difference_has_the_brightness_of_its_logarithm(tmp_path: Path) -> None:
    """A picture of tiles that change nothing is black, and one of 1e-4 is half as bright as one of 1."""
    frame = torch.full((3, 2, 3), -1.0)
    save_differences(frame, {"same": frame, "near": frame + 1e-4, "far": frame + 1}, tmp_path / "d.png")
    image = Image.open(tmp_path / "d.png")
    assert image.size == (12, 2)
    assert [image.getpixel((x, 0)) for x in (0, 3, 6, 9)] == [(n, n, n) for n in (0, 0, 127, 255)]
