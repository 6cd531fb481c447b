"""The benchmark of whole clips: its files, its figures' arithmetic, and what does not fit."""

from __future__ import annotations

from xml.etree import ElementTree

import av
import pytest
import torch

from bench.__main__ import main
from bench.csg import whole
from bench.harness.environment import capture
from model.csg.sampler import MODES
from model.machine.measure import StageTimer
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


def test_stage_timer_charges_the_innermost_stage(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0, 21.0, 28.0])
    monkeypatch.setattr("model.machine.measure.time.perf_counter", lambda: next(clock))
    timer = StageTimer(torch.device("cpu"))
    with timer.stage("outer"):  # 0
        for _ in timer.iterate("inner", [None]):  # 1-3, then the end of the iterator 6-10
            pass
    assert timer.seconds == {"outer": 1 + 3 + 5, "inner": 2 + 4}
