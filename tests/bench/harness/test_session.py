"""The benchmark: its files, its figures' arithmetic, its memory counter, and bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from xml.etree import ElementTree

import av
import pytest
import torch

from bench.__main__ import main
from bench.csg import whole
from bench.harness.environment import capture
from model.csg.sampler import MODES
from model.machine.counted import TensorMemory
from model.machine.measure import StageTimer
from model.streaming.placement import Placement
from tests.support.bench_session import CPU, read_section, rows_of
from tests.support.memory_requests import predict_nothing

FILES = [
    "csg_bidirectional.mp4", "csg_causal.mp4", "end_to_end.mp4", "plan.svg", "result.json", "table.md",
    "whole-peak_bytes.svg", "whole-stage_two_seconds.svg",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        predict_nothing(patch)
        assert main(["--quick", "--frames", "5,25", "--size", "64x48", "--repeats", "2", "--out", str(folder)]) == 0
    return folder


def test_a_run_leaves_clips_table_json_and_plots(finished):
    assert sorted(path.name for path in finished.iterdir()) == FILES
    for name in FILES[:3]:
        with av.open(str(finished / name)) as container:
            stream = container.streams.video[0]
            assert (sum(1 for _ in container.decode(stream)), stream.width, stream.height) == (25, 64, 48)
    for name in (name for name in FILES if name.endswith(".svg")):
        root = ElementTree.parse(finished / name).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        # A figure names the machine that it is of; a plan has none.
        assert (capture(CPU)["device"] in root[1].text) == (name != "plan.svg")


def test_rows_are_complete_and_consistent(finished):
    modes = {label: mode for mode, label in whole.LABELS.items()}
    rows = {(row["frames"], modes[row["mode"]]): row for row in rows_of(finished, "whole")}
    assert set(rows) == {(frames, mode) for frames in (5, 25) for mode in MODES}
    for (frames, mode), row in rows.items():
        assert row["status"] == "ok"
        assert row["runs"] == 2
        assert 0 < row["stage_two_seconds_low"] <= row["stage_two_seconds"] <= row["stage_two_seconds_high"]
        assert row["window_tokens"] == row["window_blocks"] * 12
        assert row["window_blocks"] == (row["num_blocks"] if mode == "end_to_end" else min(row["num_blocks"], 5))
        base = rows[frames, "end_to_end"]
        assert row["speedup"] == base["stage_two_seconds"] / row["stage_two_seconds"]
        assert row["memory_ratio"] == base["peak_bytes"] / row["peak_bytes"]
        stages = ("stage_one_seconds", "reference_seconds", "stage_two_seconds", "decode_seconds", "file_seconds")
        if frames == 25:
            assert row["total_seconds"] == pytest.approx(sum(row[name] for name in stages))
    assert rows[5, "bidirectional"]["difference"] == 0  # one segment of all blocks: the same computation
    assert rows[25, "bidirectional"]["difference"] > 0
    assert rows[25, "bidirectional"]["peak_bytes"] < rows[25, "end_to_end"]["peak_bytes"]


def test_the_environment_is_recorded(finished):
    environment = json.loads((finished / "result.json").read_text())["environment"]
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["device"]
    assert set(environment["git"]) == {"commit", "dirty"}
    assert read_section(finished)["settings"]["dtype"] == "float32"


def test_out_of_memory_is_a_row_and_the_run_goes_on(tmp_path, monkeypatch):
    """The second pass fails as the CPU allocator does; the other modes and the files are still there."""
    predict_nothing(monkeypatch)
    sample, calls = whole.sample_latents, []

    def failing(*args, mode, **options):
        calls.append(mode)
        if mode == "end_to_end":
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: 9 bytes")
        return sample(*args, mode=mode, **options)

    monkeypatch.setattr(whole, "sample_latents", failing)
    assert main(["--frames", "9", "--size", "64x48", "--repeats", "1", "--out", str(tmp_path)]) == 0
    rows = {row["mode"]: row for row in rows_of(tmp_path, "whole")}
    assert rows["end-to-end"]["status"] == "out of memory"
    assert "can't allocate memory" in rows["end-to-end"]["reason"]
    assert rows["CSG, bidirectional"]["status"] == rows["CSG, causal"]["status"] == "ok"
    assert "speedup" not in rows["CSG, causal"]
    assert calls.count("end_to_end") == 1  # not tried again
    assert not (tmp_path / "end_to_end.mp4").exists()
    assert (tmp_path / "csg_causal.mp4").exists()


@pytest.mark.slow
def test_out_of_memory_in_the_decode_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    def failing(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 38 GiB")

    monkeypatch.setattr(whole, "decode_frames", failing)
    assert main(["--frames", "5", "--size", "64x48", "--repeats", "1", "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path, "whole")
    assert all(row["status"] == "ok" and row["stage_two_seconds"] > 0 for row in rows)
    assert all(row["warning"].startswith("decode: out of memory: CUDA out of memory") for row in rows)
    assert capsys.readouterr().out.count("decode: out of memory") == len(rows)


@pytest.mark.slow
def test_where_the_card_has_too_little_all_modes_stream_the_same_layers(tmp_path, monkeypatch):
    """One plan serves all modes, and the settings tell it; the clips are those of resident weights."""
    plan_memory, asked = whole.plan_memory, []

    def small(request):
        plan, asked[:] = plan_memory(request), [request]
        return replace(plan, stage_two=replace(plan.stage_two, placement=Placement(resident=0)))

    options = ["--frames", "9", "--size", "64x48", "--repeats", "1", "--out"]
    assert main([*options, str(tmp_path / "resident")]) == 0
    monkeypatch.setattr(whole, "plan_memory", small)
    assert main([*options, str(tmp_path / "streamed")]) == 0
    assert (asked[0].mode, asked[0].num_frames) == ("end_to_end", 9)  # the largest window
    told = [read_section(tmp_path / name)["settings"]["stage_two_weights"] for name in ("resident", "streamed")]
    assert told[0] == "all 2 layers on the device; as they are"
    assert told[1] == "0 of 2 layers on the device, 2 from pinned host memory; as they are"
    resident, streamed = (rows_of(tmp_path / name, "whole") for name in ("resident", "streamed"))
    assert [row["difference"] for row in streamed] == [row["difference"] for row in resident]
    for name in FILES[:3]:
        assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "resident" / name).read_bytes()


def test_tensor_memory_counts_every_storage_once_and_until_it_dies():
    with TensorMemory() as memory:
        first = torch.zeros(1000)  # 4,000 bytes
        view = first[10:]
        second = torch.ones(500)  # 2,000 more
        del first
        assert memory.live == 6000  # the view keeps the first storage alive
        del view
        assert memory.live == 2000
        third = torch.empty(250, dtype=torch.float64)
        assert memory.live == 4000
        del second, third
    assert memory.live == 0
    assert memory.peak == 6000


def test_tensor_memory_counts_given_tensors_from_the_start_and_once():
    weight = torch.zeros(1000)
    with TensorMemory([weight, weight[:10]]) as memory:
        assert memory.live == 4000
        product = weight.view(10, 100) @ torch.ones(100, 1)  # 400 and 40 bytes more
        assert memory.live == 4040
    assert memory.peak == 4440
    assert product.shape == (10, 1)


def test_stage_timer_charges_the_innermost_stage(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0, 21.0, 28.0])
    monkeypatch.setattr("model.machine.measure.time.perf_counter", lambda: next(clock))
    timer = StageTimer(torch.device("cpu"))
    with timer.stage("outer"):  # 0
        for _ in timer.iterate("inner", [None]):  # 1-3, then the end of the iterator 6-10
            pass
    assert timer.seconds == {"outer": 1 + 3 + 5, "inner": 2 + 4}
