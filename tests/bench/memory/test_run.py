"""The command ``python -m bench memory`` works without a GPU: it counts within limits, and runs on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.__main__ import main
from bench.harness.session import RESULT
from bench.memory import clip
from bench.records.read import read_result
from model.machine.measure import format_bytes
from tests.support.bench_session import read_section, rows_of

SMALL = ["memory", "--preset", "tiny", "--size", "64x48", "--frames", "9", "--device", "cpu"]
STAGES = {"load", "Stage I", "reference", "Stage II", "decode"}


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results within a limit that is enough, a lower one with another plan, and one for which there is no plan."""
    folder = tmp_path_factory.mktemp("memory")
    assert main([*SMALL, "--limit", "4MB,3MB,4000kB,1MB", "--quick", "--out", str(folder)]) == 0
    return folder


@pytest.mark.slow
def test_a_limit_is_kept_or_without_a_plan_and_one_named_twice_is_one(counted: Path) -> None:
    assert read_result(counted / RESULT)["sections"]["memory"]["status"] == "complete"
    assert (counted / "timeline-2.svg").read_text().startswith("<svg ")
    enough, tight, without = rows_of(counted, "clips")
    for row, limit in ((enough, 4_000_000), (tight, 3_000_000)):
        assert (row["limit"], row["status"], row["basis"]) == (f"{limit / 1e6:g} MB", "ok", "counted")
        assert row["peak_bytes"] <= row["limit_bytes"] == limit
        assert row["peak_bytes"] == pytest.approx(row["peak_bytes_predicted"], rel=0.05)
        assert row["frames_made"] == 9
        assert (row["card"], row["stage1"]) == ("RTX 4060", "2 in 16 bits")
        assert row["reference_tiles"] == "1x1 float32"
    assert tight["peak_bytes"] < enough["peak_bytes"]
    assert (without["limit"], without["status"], without["basis"]) == ("1 MB", "failed", "counted")
    assert without["reason"].startswith("vram: ")
    assert "peak_bytes" not in without
    found = read_section(counted)["verdicts"]
    assert [(v["shape"], v["met"], v["basis"]) for v in found] == [
        (limit, True, "counted") for limit in ("4 MB", "4 MB", "3 MB", "3 MB")
    ]
    assert [v["value"] for v in found[::2]] == [row["peak_bytes"] / row["limit_bytes"] for row in (enough, tight)]


@pytest.mark.slow
def test_a_stage_that_exceeds_the_limit_is_named_with_its_own_peak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage is named where a plan is wrong, which is made for twice the memory here."""
    monkeypatch.setattr("model.memory.request.USABLE", 2.0)
    assert main([*SMALL, "--limit", "2MB", "--out", str(tmp_path)]) == 0
    (row,) = rows_of(tmp_path, "clips")
    stages = {found["stage"]: found["peak_bytes"] for found in rows_of(tmp_path, "stages")}
    assert set(stages) == STAGES
    over = next(stage for stage, peak in stages.items() if peak > 2_000_000)
    assert row["status"] == "out of memory"
    assert row["reason"] == f"in {over}: {format_bytes(stages[over])} counted"


@pytest.mark.slow
def test_stages_holders_and_timelines_agree_with_the_clips_peak(counted: Path) -> None:
    clips = {row["limit"]: row["peak_bytes"] for row in rows_of(counted, "clips") if "peak_bytes" in row}
    timelines = read_section(counted)["timelines"]
    assert len(clips) == len(timelines) == 2
    for (limit, peak), timeline in zip(clips.items(), timelines, strict=True):
        stages, held = ([r for r in rows_of(counted, name) if r["limit"] == limit] for name in ("stages", "holders"))
        assert max(row["peak_bytes"] for row in stages) == peak
        assert sum(row["held_bytes"] for row in held) == peak
        assert sum(row["share"] for row in held) == pytest.approx(1)
        assert max(live for _, live in timeline["points"]) == peak
        assert (timeline["basis"], timeline["limit"]) == ("counted", 1e6 * float(limit.split()[0]))
        assert {label for _, label in timeline["marks"]} == STAGES - {"Stage II"} | {"Stage II 1"}


@pytest.mark.slow
def test_on_a_cpu_it_can_be_run(tmp_path: Path) -> None:
    assert main([*SMALL, "--measure", "--out", str(tmp_path)]) == 0
    (row,) = rows_of(tmp_path, "clips")
    assert (row["status"], row["basis"], row["limit"], row["steps"]) == ("ok", "measured", "none", 1)
    stages = ("stage_one_seconds", "reference_seconds", "stage_two_seconds", "decode_seconds")
    assert 0 < sum(row[stage] for stage in stages) < row["total_seconds"]
    assert all(row[stage] > 0 for stage in stages)
    assert {row["stage"]: row["seconds"] for row in rows_of(tmp_path, "stages")}["decode"] == row["decode_seconds"]
    assert row["frames_made"] == 9
    assert read_section(tmp_path)["verdicts"] == []


def test_an_interrupted_run_keeps_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A run that is interrupted within the first of two limits keeps its findings and does not begin the second."""

    def make_frames(*given: Any) -> Iterator[torch.Tensor]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(clip, "make_frames", make_frames)
    assert main([*SMALL, "--limit", "1GB,2GB", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert read_result(tmp_path / RESULT)
    section = read_section(tmp_path)
    assert (section["status"], len(section["timelines"])) == ("interrupted", 1)
    (row,) = rows_of(tmp_path, "clips")
    assert (row["limit"], row["status"], row["reason"]) == ("1 GB", "failed", "interrupted")
    assert row["peak_bytes"] == max(found["peak_bytes"] for found in rows_of(tmp_path, "stages"))
    assert {found["stage"] for found in rows_of(tmp_path, "stages")} == {"load", "Stage I", "reference"}
    assert section["verdicts"][0]["met"] is None
