"""``python -m bench attention``: what it does without a GPU, and its measuring parts, on the CPU with small shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.__main__ import main
from bench.attention import measure as bench
from bench.attention.providers import SHAPES, Provider, Shape, inputs, providers
from bench.records.markdown import format_section
from bench.records.outcome import Unavailable
from bench.records.package_tables import merge
from bench.records.plot import plot_attention
from swifti2v_kernels import segment_attention
from tests.support.bench_session import BAR, CPU, new_table, read_section, rows_of, session, timer

SMALL = Shape("small", 2, 16, 9, (9, 5))


def right(q: Tensor, sources: Any) -> Tensor:
    return segment_attention(q, sources)


def wrong(q: Tensor, sources: Any) -> Tensor:
    return segment_attention(q, sources[:1])


def missing(q: Tensor, sources: Any) -> Tensor:
    raise Unavailable("not installed")


def hungry(q: Tensor, sources: Any) -> Tensor:
    raise torch.OutOfMemoryError("no memory left")


def broken(q: Tensor, sources: Any) -> Tensor:
    raise RuntimeError("not for this shape\nsecond line")


def measured(folder: Path, shapes: tuple[Shape, ...] = (SMALL,)) -> list[dict[str, Any]]:
    found = [Provider(call.__name__, call, ours=call is right) for call in (right, wrong, missing, hungry, broken)]
    table = new_table(folder, bench.IDENTITY, bench.METRICS)
    for shape in shapes:
        bench.measure(shape, found, CPU, timer, 2.0, table, BAR)
    return table.rows


def test_what_is_wrong_is_not_timed_and_what_fails_is_a_row(tmp_path) -> None:
    rows = {row["provider"]: row for row in measured(tmp_path)}
    assert rows_of(tmp_path, "rows") == list(rows.values())
    assert rows["right"]["status"] == "ok"
    assert rows["right"]["seconds"] == 0.5
    assert rows["right"]["flops"] == 4 * 2 * 16 * 9 * 14
    assert rows["right"]["tflops"] == rows["right"]["flops"] / 0.5 / 1e12
    assert rows["right"]["fraction_of_matmul"] == rows["right"]["tflops"] / 2.0
    assert rows["right"]["copied_bytes"] == 0
    assert rows["wrong"]["status"] == "wrong"
    assert "seconds" not in rows["wrong"]
    assert rows["wrong"]["copied_bytes"] == 2 * 2 * 2 * 16 * 14
    assert (rows["missing"]["status"], rows["missing"]["reason"]) == ("not available", "not installed")
    assert rows["hungry"]["status"] == "out of memory"
    assert (rows["broken"]["status"], rows["broken"]["reason"]) == ("failed", "not for this shape")


def test_inputs_that_do_not_fit_are_rows_too(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(bench, "inputs", lambda *args: hungry(None, None))
    rows = measured(tmp_path)
    assert {(row["status"], row["reason"]) for row in rows} == {("out of memory", "the inputs alone do not fit")}
    assert len(rows) == 5


def test_where_all_together_do_not_fit_each_is_timed_alone(tmp_path) -> None:
    def cramped(calls: dict[str, Any]) -> Any:
        if len(calls) > 1:
            raise torch.OutOfMemoryError("no memory left")
        return timer(calls)

    found = [Provider("first", right, ours=True), Provider("second", right)]
    table = new_table(tmp_path, bench.IDENTITY, bench.METRICS)
    bench.measure(SMALL, found, CPU, cramped, 2.0, table, BAR)
    assert [row["seconds"] for row in table.rows] == [0.5, 0.5]
    assert {row["note"] for row in table.rows} == {"timed alone: all together do not fit"}


def test_table_and_plot(tmp_path) -> None:
    with session(tmp_path) as found:
        rows = measured(tmp_path / "rows", (SMALL, Shape("dense", 1, 16, 7, (7,))))
        table = found.section.table("attention", "attention", identity=bench.IDENTITY, metrics=bench.METRICS)
        for row in rows:
            table.add(row)
    text = format_section(found.section.data)
    assert "out of memory: no memory left" in text
    assert "wrong: error" in text
    assert plot_attention(rows, 2.0, "card $\\frac$", tmp_path / "a.png").stat().st_size > 1000


def test_providers_compute_the_same() -> None:
    """All implementations that run on a CPU agree; torch's efficient path there is its flash one."""
    q, sources = inputs(SMALL, CPU, torch.float32)
    expected = bench.exact_rows(q, sources, torch.arange(9))
    for provider in providers(quick=False):
        if provider.name not in ("sdpa-flash", "swifti2v, public function"):
            continue
        assert (provider.call(q, sources) - expected).norm() / expected.norm() < 1e-5
    for name in ("flash-attn", "sageattention"):
        provider = next(p for p in providers(quick=False) if p.name == name)
        with pytest.raises(Unavailable, match="is not installed"):
            provider.call(q, sources)


def test_the_table_takes_dense_measurements_and_keeps_the_others() -> None:
    shapes = [Shape("dense", 2, 128, 100, (100,)), Shape("many", 2, 128, 100, (50, 50))]
    rows = [
        {"shape": shape.name, "provider": name, "status": status, "exact": True, "seconds": seconds}
        for shape in shapes
        for name, status, seconds in (
            ("swifti2v", "ok", 2.0),
            ("sdpa-cudnn", "ok", 1.0),
            ("sdpa-flash", "failed", None),
        )
    ]
    entries = bench.table_entries({"device": "new", "gpu": {"capability": [9, 0]}}, rows, shapes)
    old = {"capability": 90, "dtype": "bfloat16", "head_dim": 128, "tokens": 100, "card": "old", "seconds": {}}
    kept = {**old, "capability": 89}
    table = merge({"schema": "s", "entries": [old, kept]}, entries)
    assert table["schema"] == "s"
    assert table["entries"][0] == kept
    assert table["entries"][1]["card"] == "new"
    assert table["entries"][1]["seconds"] == {"swifti2v": 2.0, "sdpa-cudnn": 1.0}
    assert len(table["entries"]) == 2


@pytest.mark.slow
def test_without_cuda_it_says_what_it_would_run_and_checks(capfd, tmp_path) -> None:
    assert main(["attention", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    out = capfd.readouterr().out
    assert "nothing is timed" in out
    assert "3,520 + 3,520 + 10,560" in out
    tables = read_section(tmp_path)["tables"]
    assert [row["shape"] for row in tables["shapes"]["rows"]][1] == "CSG window 1280x704, 3 sources"
    checked = tables["interpreted"]["rows"]
    assert [row["status"] for row in checked] == ["ok"] * 4
    assert all(row["error"] < row["limit"] for row in checked)


def test_reduced_shapes_are_small_and_keep_their_structure() -> None:
    for shape in SHAPES:
        small = shape.reduced(150)
        assert len(small.keys) == len(shape.keys)
        assert max(small.queries, *small.keys) <= 152
        assert min(small.queries, *small.keys) >= 1
