"""The table of real sizes: its order, what is kept of a run that is cut short or fails, and whole runs at toy size on a
clock that runs by what is computed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.__main__ import main
from bench.csg import extrapolated, vae_time, window
from bench.csg.extrapolated import END_TO_END, END_TO_END_FEW, FLASH_2, TWO_STAGE, Measurement
from bench.csg.setups import BASELINE_STEPS, Setup, setups, variants
from bench.csg.window import WindowClock, WindowTime, plan_seconds
from bench.harness.session import RESULT
from bench.records.read import read_result
from model.csg.denoiser import Denoiser
from model.csg.schedule import flow_sigmas
from tests.support.bench_session import CPU, read_section, rows_of, session, timer
from tests.support.operation_clock import OperationClock

FEW = END_TO_END_FEW.format(4)
PAPER = "SwiftI2V (paper, H800)"
CHECK = setups(["1.3b"], ["720p"], 81, 4)[0]
SMALL = CHECK.reduced()
EXTRAPOLATED = re.compile(
    r"from \d+ of \d+ (layers|latent frames|frames)(, 1 of \d+ (steps|forwards)(, \d+ of \d+ windows)?)?"
)
Fake = Callable[[Measurement, Setup], None]


@pytest.fixture
def measurement(tmp_path: Path) -> Iterator[Measurement]:
    with session(tmp_path, "csg") as found:
        yield Measurement(found.section, CPU, torch.float32, timer, layers=(1, 2))


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The list of what was begun, in order; a clip in two stages takes 10 s, end-to-end 50 s for every head."""
    order: list[str] = []

    def two_stage(self: Measurement, setup: Setup) -> None:
        order.append(f"CSG {setup.name}")
        self.clips.add({"model": setup.model, "size": setup.size, "method": TWO_STAGE, "total_seconds": 10.0})

    def end_to_end(self: Measurement, setup: Setup) -> None:
        order.append(f"end-to-end {setup.name}")
        row = {"model": setup.model, "size": setup.size, "method": END_TO_END}
        self.clips.add(row | {"total_seconds": 50.0 * setup.dit.num_heads})

    def validate(self: Measurement, setup: Setup) -> None:
        order.append(f"check {setup.name}")
        row = {"model": setup.model, "size": setup.size, "what": "decode", "difference": 0.01}
        self.validation.add(row)

    monkeypatch.setattr(Measurement, "_two_stage", two_stage)
    monkeypatch.setattr(Measurement, "_end_to_end", end_to_end)
    monkeypatch.setattr(Measurement, "validate", validate)
    monkeypatch.setattr(Measurement, "ablation", lambda self, setup: order.append(f"ways {setup.name}"))
    monkeypatch.setattr(extrapolated, "release", lambda device: None)
    return order


def run(measurement: Measurement, found: list[Setup], ablated: Setup | None = None) -> list[str]:
    """Runs all of it; returns a list that is as long as it has advanced."""
    advanced: list[str] = []
    measurement.run(found, CHECK, ablated, lambda: advanced.append("clip"))
    return advanced


def failing_at(begun: list[str], number: int, error: BaseException, patch: pytest.MonkeyPatch) -> None:
    """The clip of this number fails instead."""
    for name in ("_two_stage", "_end_to_end"):
        stock = getattr(Measurement, name)

        def method(self: Measurement, setup: Setup, stock: Any = stock) -> None:
            if sum(not entry.startswith("check") for entry in begun) == number - 1:
                begun.append("the one that fails")
                raise error
            stock(self, setup)

        patch.setattr(Measurement, name, method)


# The order


def test_what_the_paper_compares_comes_first_then_the_check_and_the_largest_size_before_others(
    measurement: Measurement, begun: list[str]
) -> None:
    found = setups(["14b", "1.3b", "5b"], ["720p", "2K"], 81, 4)
    advanced = run(measurement, found, ablated=found[-1])
    assert begun == [
        "CSG 1.3b, 2K", "end-to-end 14b, 2K", "check 1.3b, 720p",
        "end-to-end 1.3b, 2K", "end-to-end 5b, 2K", "CSG 5b, 2K", "CSG 14b, 2K",
        "CSG 1.3b, 720p", "end-to-end 14b, 720p",
        "end-to-end 1.3b, 720p", "end-to-end 5b, 720p", "CSG 5b, 720p", "CSG 14b, 720p",
        "ways 5b, 2K",
    ]  # fmt: skip
    assert len(advanced) == 2 * len(found) + 2  # as the command tells its progress bar
    # Times faster are over the same model and size, of 12, 24 and 40 heads.
    ours = [row for row in measurement.clips.rows if row["model"] != PAPER and row["method"] == TWO_STAGE]
    assert {(row["model"], row["speedup"]) for row in ours} == {("1.3b", 60.0), ("5b", 120.0), ("14b", 200.0)}
    # A single clip is checked too.
    for before in (begun, measurement.clips.rows, measurement.validation.rows):
        before.clear()
    assert len(run(measurement, [CHECK])) == 3
    assert begun == ["CSG 1.3b, 720p", "end-to-end 1.3b, 720p", "check 1.3b, 720p"]


# Cut short


def test_an_interrupted_run_has_ratios_the_papers_rows_and_verdicts(
    tmp_path: Path, begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is interrupted in its third clip keeps what the paper compares."""
    failing_at(begun, 3, KeyboardInterrupt(), monkeypatch)
    with pytest.raises(KeyboardInterrupt), session(tmp_path, "csg") as found:
        run(Measurement(found.section, CPU, torch.float32, timer), setups(["1.3b", "14b"], ["2K"], 81, 4))
    assert begun == ["CSG 1.3b, 2K", "end-to-end 14b, 2K", "check 1.3b, 720p", "the one that fails"]
    section = read_section(tmp_path)
    assert section["status"] == "interrupted"
    read_result(tmp_path / RESULT)
    clips = {(row["model"], row["method"]): row for row in rows_of(tmp_path, "clips")}
    assert clips["14b", END_TO_END]["speedup"] == 1.0
    assert clips[PAPER, TWO_STAGE]["speedup"] == pytest.approx(22_400 / 111)
    assert clips[PAPER, "CineScale, end-to-end"]["basis"] == "reported"
    assert [(v["what"], v["shape"], v["value"], v["met"]) for v in section["verdicts"]] == [
        (f"14b {END_TO_END} over 1.3b {TWO_STAGE}", "2K", 200.0, False),
        ("extrapolation of decode, deviation", "1.3b, 720p", 0.01, True),
    ]


def test_a_clip_that_fails_is_a_row_and_the_others_go_on(
    measurement: Measurement, begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory.\nTried")
    failing_at(begun, 2, error, monkeypatch)
    run(measurement, setups(["1.3b", "14b"], ["2K"], 81, 4))
    rows = {(row["model"], row["method"]): row for row in measurement.clips.rows if row["model"] != PAPER}
    failed = rows.pop(("14b", END_TO_END))
    assert (failed["status"], failed["reason"]) == ("out of memory", "CUDA out of memory.")
    assert "total_seconds" not in failed
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert set(rows) == {("1.3b", TWO_STAGE), ("1.3b", END_TO_END), ("14b", TWO_STAGE)}
    assert "speedup" not in rows["14b", TWO_STAGE]
    assert rows["1.3b", TWO_STAGE]["speedup"] == 60.0


def test_after_the_deadline_nothing_is_begun_and_what_was_is_kept(
    measurement: Measurement, begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check's own parts and every way to cut the clip are rows as well."""
    monkeypatch.undo()  # the check and the ablations as they are
    clock = OperationClock().install(monkeypatch, extrapolated)
    measurement.deadline = 100.0

    def two_stage(setup: Setup) -> None:
        clock.elements = 101
        measurement.clips.add({"model": setup.model, "size": setup.size, "method": TWO_STAGE, "total_seconds": 10.0})

    monkeypatch.setattr(measurement, "_two_stage", two_stage)
    found = setups(["1.3b", "14b"], ["2K"], 81, 4)
    run(measurement, found, ablated=found[0])
    first, *clips = [row for row in measurement.clips.rows if row["model"] != PAPER]
    assert (first["status"], len(clips)) == ("ok", 3)
    for row in [*clips, *measurement.validation.rows, *measurement.ablations.rows]:
        assert (row["status"], row["reason"]) == ("not reached", "the time given was over")
    assert [row["what"] for row in measurement.validation.rows] == ["Stage II, CSG", "decode"]
    assert [row["variant"] for row in measurement.ablations.rows] == [v.name for v in variants(21)]


# The baseline on FlashAttention-2


def whole_window(setup: Setup, *given: Any) -> WindowTime:
    return WindowTime(600, 0.1, 2.0, {"attention": 0.75, "linear": 0.15, "other": 0.1}, 7, 2, setup.dit.num_layers)


def test_end_to_end_is_two_forwards_a_step_and_its_attention_can_be_replaced(
    measurement: Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measurement, "_whole_window", whole_window)
    monkeypatch.setattr(extrapolated, "FLASH_QUERIES", 60)
    measurement._end_to_end(CHECK)
    measurement._flash_two(CHECK, whole_window(CHECK))
    rows = {row["method"]: row for row in measurement.clips.rows}
    assert rows[END_TO_END]["total_seconds"] == 2 * BASELINE_STEPS * 2.0
    assert rows[FEW]["total_seconds"] == 4 * 2.0
    assert rows[END_TO_END]["attention_seconds"] == 150.0
    # Half a second for a tenth of the queries of each of 30 layers, and what is not attention.
    assert rows[FLASH_2]["attention_seconds"] == pytest.approx(100 * 30 * 0.5 * 10)
    assert rows[FLASH_2]["total_seconds"] == pytest.approx(100 * (0.25 * 2.0 + 30 * 0.5 * 10))
    assert "on 60 of its queries" in rows[FLASH_2]["basis_note"]


# Ways to cut the clip


def small_clock() -> WindowClock:
    return WindowClock(SMALL.dit, SMALL.latent_size, SMALL.num_blocks, CPU, torch.float32, layers=(4, 4))


@pytest.mark.slow
def test_ways_to_cut_the_clip_are_plans_seconds_over_the_papers(
    measurement: Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [variants(9)[i] for i in (0, 1, 7)]
    with OperationClock().install(monkeypatch, window, extrapolated):
        measurement.ablation(SMALL, chosen)
        clock = small_clock()
        expected = [plan_seconds(clock, v.plan, 4, v.mode, split=False)[0] for v in chosen]
    rows = measurement.ablations.rows
    assert [row["variant"] for row in rows] == ["M=3, N=1", "M=1, N=1", "M=3, N=1, causal"]
    assert [row["stage_two_seconds"] for row in rows] == pytest.approx(expected)
    assert [row["ratio"] for row in rows] == pytest.approx([seconds / expected[0] for seconds in expected])
    assert rows[1]["ratio"] > 1  # eight windows of three blocks, of which two are given, for three of five
    assert rows[1]["basis_note"] == "from 2 of 4 layers, 1 of 4 steps, 2 of 8 windows"


def test_without_the_papers_setting_other_ways_have_no_ratio(
    measurement: Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ratios need the paper's setting, whose window may be the one that does not fit."""
    stock, calls = plan_seconds, []

    def failing(*given: Any, **options: Any) -> Any:
        calls.append(given)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return stock(*given, **options)

    monkeypatch.setattr(extrapolated, "plan_seconds", failing)
    with OperationClock().install(monkeypatch, window, extrapolated):
        measurement.ablation(SMALL, variants(9)[:3])
    assert [row["status"] for row in measurement.ablations.rows] == ["out of memory", "ok", "ok"]
    assert all("ratio" not in row for row in measurement.ablations.rows)


# Whole runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("csg")
    arguments = ["--quick", "--models", "1.3b", "--sizes", "720p", "--no-ablations", "--out", str(folder)]
    with pytest.MonkeyPatch.context() as patch, OperationClock().install(patch, window, vae_time, extrapolated):
        assert main(["csg", "--extrapolate", *arguments]) == 0
    return folder


@pytest.mark.slow
def test_a_run_is_complete_and_says_from_what_it_is_extrapolated(finished: Path) -> None:
    (section,) = read_result(finished / RESULT)["sections"].values()
    assert (section["status"], section["settings"]["frames"]) == ("complete", 33)
    assert {row["status"] for table in section["tables"] for row in table["rows"]} == {"ok"}
    methods = [row["method"] for row in rows_of(finished, "clips")]
    assert methods == [TWO_STAGE, END_TO_END, FEW, TWO_STAGE, "CineScale, end-to-end"]
    rows = [row for name in ("stages", "clips", "validation") for row in rows_of(finished, name)]
    ours = [row for row in rows if row["model"] != PAPER]
    assert len(ours) == 9
    for row in ours:
        assert row["basis"] == "extrapolated"
        assert EXTRAPOLATED.fullmatch(row["basis_note"]), row["basis_note"]
        assert row["size"] == "small 720p"  # nobody takes it for a card's
    assert (finished / "table.md").read_text().count("extrapolated from") == len(ours)


@pytest.mark.slow
def test_a_clip_is_the_sum_of_its_stages(finished: Path) -> None:
    stages = {row["stage"]: row for row in rows_of(finished, "stages")}
    assert [*stages] == ["Stage I", "reference", "Stage II", "decode"]
    clip, end_to_end, few = rows_of(finished, "clips")[:3]
    assert clip["total_seconds"] == pytest.approx(sum(row["seconds"] for row in stages.values()))
    assert sum(row["share"] for row in stages.values()) == pytest.approx(1)
    parts = ("attention_seconds", "linear_seconds", "other_seconds")
    assert sum(clip[part] for part in parts) == pytest.approx(stages["Stage II"]["seconds"])
    assert sum(end_to_end[part] for part in parts) == pytest.approx(end_to_end["total_seconds"])
    assert end_to_end["total_seconds"] == pytest.approx(25 * few["total_seconds"])
    assert end_to_end["tokens"] > clip["tokens"]


@pytest.mark.slow
def test_the_extrapolation_is_that_of_the_whole_run(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers, steps and latent frames are measured whole, by the functions that make a clip."""
    denoise, decode = rows = rows_of(finished, "validation")
    assert [row["what"] for row in rows] == ["Stage II, CSG", "decode"]
    # The text's keys and values and the modulation are made once a clip: much at toy size and nothing at a real one.
    with OperationClock().install(monkeypatch, window) as clock:
        dit = small_clock()
        latents, start = torch.zeros(1, 16, 3, *SMALL.latent_size), clock.seconds()
        Denoiser(dit.dit, dit.text, None, latents=latents, reference=latents, sigmas=flow_sigmas(4, 5.0), max_blocks=5)
        once = clock.seconds() - start
    assert denoise["seconds"] + once == pytest.approx(denoise["whole_seconds"], rel=0.005)
    assert once < 0.06 * denoise["seconds"]
    assert decode["seconds"] == pytest.approx(decode["whole_seconds"], rel=0.001)
    found = read_section(finished)["verdicts"]
    assert [v["value"] for v in found] == [row["difference"] for row in rows]
    assert [row["difference"] for row in rows] == [abs(row["seconds"] / row["whole_seconds"] - 1) for row in rows]
