"""``python -m bench attention``: what it does without a GPU, and its measuring parts, on the CPU with small shapes."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import attention as bench
from bench.__main__ import main
from bench.attention_providers import SHAPES, Provider, Shape, Unavailable, inputs, providers
from bench.plot import plot_attention
from model import InputError
from swifti2v_kernels import segment_attention

CPU = torch.device("cpu")
BAR = SimpleNamespace(set_description=lambda text: None, update=lambda n=1: None)
SMALL = Shape("small", 2, 16, 9, (9, 5))


def timer(call: Any) -> tuple[float, float, float]:
    call()
    return 0.5, 0.4, 0.6


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


def measured() -> list[dict[str, Any]]:
    found = [Provider(call.__name__, call, ours=call is right) for call in (right, wrong, missing, hungry, broken)]
    return bench.measure(SMALL, found, CPU, timer, 2.0, BAR)


def test_what_is_wrong_is_not_timed_and_what_fails_is_a_row() -> None:
    rows = {row["provider"]: row for row in measured()}
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


def test_inputs_that_do_not_fit_are_rows_too(monkeypatch) -> None:
    monkeypatch.setattr(bench, "inputs", lambda *args: hungry(None, None))
    rows = bench.measure(SMALL, [Provider("right", right)], CPU, timer, 2.0, BAR)
    assert [(row["status"], row["reason"]) for row in rows] == [("out of memory", "the inputs alone do not fit")]


def test_table_and_plot(tmp_path) -> None:
    result = {"environment": {"device": "card"}, "matmul_tflops": 2.0, "rows": measured()}
    table = bench.format_table(result)
    assert "out of memory: no memory left" in table
    assert "Measured on card; bf16 matrix product in the same run: 2 TFLOP/s." in table
    assert plot_attention(result, tmp_path / "a.png").stat().st_size > 1000


def test_a_run_leaves_table_json_and_plot(tmp_path) -> None:
    shapes = [SMALL, Shape("dense", 1, 16, 7, (7,))]
    found = [Provider("right", right, ours=True), Provider("missing", missing)]
    result = bench.run_shapes(shapes, found, CPU, timer, tmp_path / "a" / "b", matmul_size=16)
    folder = tmp_path / "a" / "b"
    assert json.loads((folder / "result.json").read_text()) == result
    assert result["environment"]["device_type"] == "cpu"
    assert [row["status"] for row in result["rows"]] == ["ok", "not available"] * 2
    assert result["matmul_tflops"] == 2 * 16**3 / 0.5 / 1e12
    assert "concatenates" not in (folder / "table.md").read_text()
    assert (folder / "attention.png").stat().st_size > 1000
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InputError, match="out: cannot make the directory"):
        bench.run_shapes(shapes, found, CPU, timer, blocked / "x", matmul_size=16)


def test_providers_compute_the_same() -> None:
    """Those that run on a CPU: torch's efficient path there is its flash one, and the math fallback."""
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
    result = {"environment": {"device": "new", "gpu": {"capability": [9, 0]}}, "rows": rows}
    old = {"capability": 90, "dtype": "bfloat16", "head_dim": 128, "tokens": 100, "card": "old", "seconds": {}}
    kept = {**old, "capability": 89}
    table = bench.merge_table({"schema": "s", "entries": [old, kept]}, result, shapes)
    assert table["schema"] == "s"
    assert table["entries"][0] == kept
    assert table["entries"][1]["card"] == "new"
    assert table["entries"][1]["seconds"] == {"swifti2v": 2.0, "sdpa-cudnn": 1.0}
    assert len(table["entries"]) == 2


def test_without_cuda_it_says_what_it_would_run_and_checks(capfd) -> None:
    assert main(["attention", "--quick", "--device", "cpu"]) == 0
    out = capfd.readouterr().out
    assert "nothing is timed" in out
    assert "CSG window 1280x704, 3 sources" in out
    assert "3,520 + 3,520 + 10,560" in out
    assert out.count(" ok") == 4
    assert main(["attention", "--quick", "--json", "--device", "cpu"]) == 0
    checked = json.loads(capfd.readouterr().out)["interpreter_check"]
    assert len(checked) == 4
    assert all(row["ok"] for row in checked)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "nothing"], "no shape contains 'nothing'"),
        (["--device", "cuda"], "torch sees no GPU"),
        (["--update-table"], "expected a CUDA device"),
        (["--milliseconds", "0"], "milliseconds: expected at least 1, got 0"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["attention", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_reduced_shapes_are_small_and_keep_their_structure() -> None:
    for shape in SHAPES:
        small = shape.reduced(150)
        assert len(small.keys) == len(shape.keys)
        assert max(small.queries, *small.keys) <= 152
        assert min(small.queries, *small.keys) >= 1
