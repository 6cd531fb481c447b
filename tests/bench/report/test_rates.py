"""The rates of plans are those of committed results, and the estimate by them is near the times they come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.records.read import read_result, shipped_results
from bench.report import command
from bench.report.rates import measured_rates, rates_file
from model.memory.plan import plan_memory
from swifti2v_kernels.common.cards import CARDS
from tests.support.memory_requests import request


def test_the_shipped_table_is_what_the_results_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``--check`` passes as shipped and refuses another table, which ``--rates`` then makes right."""
    assert main(["report", "--rates", "--check"]) == 0
    stale = tmp_path / "rates.json"
    stale.write_text("{}\n")
    monkeypatch.setattr(command, "rates_file", lambda: stale)
    assert main(["report", "--rates", "--check"]) == 2
    assert f"rates: {stale} is not what the results give; run python -m bench report --rates" in capsys.readouterr().err
    assert main(["report", "--rates"]) == 0
    assert stale.read_text() == rates_file().read_text()


def test_a_rate_is_operations_over_seconds_of_measured_rows() -> None:
    """The rate of layers is that of all measured layers of this project together, recomputed from the result file."""
    rates = {
        row["part"]: row for row in json.loads(measured_rates({p: read_result(p) for p in shipped_results()}))["rates"]
    }
    (path,) = [path for path in shipped_results() if path.as_posix().endswith(rates["dit"]["results"])]
    (table,) = [t for t in read_result(path)["sections"]["dit"]["tables"] if t["name"] == "layer"]
    rows = [row for row in table["rows"] if row["provider"] == "swifti2v"]
    expected = sum(row["flops"] for row in rows) / sum(row["seconds"] for row in rows) / 1e12
    assert rates["dit"]["tflops"] == pytest.approx(expected, abs=0.05)
    assert rates["dit"]["card"] == "H200"
    assert rates["dit"]["tflops"] > rates["decode"]["tflops"] > rates["encode"]["tflops"]


def test_the_estimate_is_near_the_times_of_an_h200() -> None:
    """Each stage of the 14B and 1.3B at 2K is within a sixth of what an H200's measurements come to."""
    plan = plan_memory(request("14b-1.3b", 141, gpu=CARDS["H200"], capability=90))
    measured = {"Stage I": 4.90, "reference": 14.10, "Stage II": 45.41, "decode": 7.43}
    for stage, seconds in measured.items():
        assert plan.estimate.work[stage] == pytest.approx(seconds, rel=1 / 6), stage
    assert not any(plan.estimate.copies.values())
    # Another Hopper card reaches as much of its peak; a GeForce more of a smaller one.
    hopper = plan_memory(request("14b-1.3b", None, gpu=CARDS["H100"], capability=90))
    geforce = plan_memory(request("14b-1.3b", None, gpu=CARDS["RTX 4090"], capability=90))
    assert hopper.seconds == pytest.approx(plan.seconds)
    assert geforce.seconds == pytest.approx(plan.seconds * 989.4 / 165.2 / 1.5)
