"""``python -m bench tune``: what a search leaves, what it takes over, and what it does without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.__main__ import main
from bench.harness.session import RESULT, Session
from bench.records import package_tables
from bench.records.read import read_result
from bench.records.write import Record
from bench.tuning import command as tune
from bench.tuning import search
from bench.tuning.space import Target, targets
from tests.support.bench_session import read_section, rows_of, session
from tests.support.result_samples import environment, sample
from tests.support.tuned_operator import Config, by_config, case, never, prepared


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> Target:
    return prepared(monkeypatch)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package's table, empty and elsewhere."""
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "tuned.json").write_text('{"entries": []}\n')
    monkeypatch.setattr(package_tables, "CONFIGS", folder)
    return folder / "tuned.json"


@pytest.mark.parametrize("write", [True, False])
def test_a_search_leaves_rows_entries_and_the_table(
    write: bool, target: Target, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "timer", lambda self, milliseconds: by_config)
    slow = Target("scaled", 90, {"width": 16}, Config(2, 4), (case(1),))
    with session(tmp_path / "out", "tune", write=write, jobs=1, minutes=1.0) as found:
        tune._search(found.args, found, [target, slow], None)
    read_result(tmp_path / "out" / RESULT)
    best, none = rows_of(tmp_path / "out", "tuned")
    assert (best["target"], best["heuristic"]) == ("scaled width: 8", "block=1 warps=2 fixed=stays")
    assert (best["best"], best["gain"]) == ("block=2 warps=4 fixed=stays", pytest.approx(2.0))
    assert (best["seconds"], best["best_seconds"]) == (2.0, pytest.approx(1.0))
    assert (best["tried"], best["dropped"], best["basis"]) == (5, 0, "measured")
    assert (none["target"], none["gain"]) == ("scaled width: 16", pytest.approx(0.625 / 0.35))
    section = read_section(tmp_path / "out")
    entries = section["package_entries"]["tuned"]
    assert [e["config"] for e in entries] == [{"block": 2, "warps": 4}, {"block": 4, "warps": 2}]
    assert entries[0] | {"provenance": None} == {
        "capability": 90, "kernel": "scaled", "key": {"width": 8}, "config": {"block": 2, "warps": 4}, "gain": 2.0,
        "card": found.environment["device"], "provenance": None,
    }  # fmt: skip
    assert entries[0]["provenance"]["torch"] == torch.__version__
    written = json.loads(table.read_text())["entries"]
    assert sorted(written, key=str) == (sorted(entries, key=str) if write else [])
    assert ("2 entries written" if write else "tune --from") in section["notes"][0]


def test_targets_that_the_time_does_not_reach_are_rows_that_say_so(
    target: Target, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "timer", lambda self, milliseconds: never)
    with session(tmp_path / "out", "tune", write=True, jobs=1, minutes=1e-9) as found:
        tune._search(found.args, found, [target], None)
    (row,) = rows_of(tmp_path / "out", "tuned")
    assert (row["status"], row["reason"]) == ("not reached", "the time given was over")
    assert json.loads(table.read_text()) == {"entries": []}


def test_choices_of_a_result_file_are_taken_over(table: Path, tmp_path: Path) -> None:
    """The choices of all sections are taken, and replace other choices for the same."""

    def choice(width: int, block: int) -> dict[str, Any]:
        key = {"width": width}
        return {"capability": 90, "card": "a card", "kernel": "scaled", "key": key, "config": {"block": block}}

    table.write_text(json.dumps({"entries": [choice(8, 1), choice(32, 1)]}))
    record = Record(tmp_path / "result.json", environment())
    for name, entries in (("tune", [choice(8, 2)]), ("more", [choice(16, 4)])):
        with record.section(name, name, {}) as section:
            section.package_entries("tuned", entries)
    assert main(["tune", "--from", str(record.path), "--out", str(tmp_path / "out")]) == 0
    expected = [choice(8, 2), choice(16, 4), choice(32, 1)]
    assert sorted(json.loads(table.read_text())["entries"], key=lambda e: e["key"]["width"]) == expected
    (row,) = rows_of(tmp_path / "out", "written")
    assert (row["table"], row["entries"]) == ("tuned", 2)


@pytest.mark.slow
def test_a_real_candidate_compiles_and_one_that_cannot_is_out() -> None:
    """Candidates of a real kernel are compiled in processes of their own, for a card that is not there."""
    target = next(target for target in targets(89) if target.kernel == "rms_norm_silu")
    candidates = [target.candidates()[0], dict.fromkeys(target.candidates()[0], 3)]
    found = dict(search.compile_all(target, candidates, 1))
    assert found[0] is None
    assert isinstance(found[1], str)


def test_choices_are_taken_from_a_file_that_has_some(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = sample(tmp_path / "sample.json")
    assert main(["tune", "--from", str(file), "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    assert "holds no measured choices (sections: attention, dit, csg, compile)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert table.read_text() == '{"entries": []}\n'
