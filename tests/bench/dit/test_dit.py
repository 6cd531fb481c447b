"""``python -m bench dit``: what it does without a GPU, and its measuring parts, on the CPU with small shapes."""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.__main__ import main
from bench.dit import measure as dit_measure
from bench.dit.command import compared_cases, count_ops, measure_all
from bench.dit.count import compiled_peak, count_layer, layer_rows, op_rows, peak_of_events, proportions
from bench.dit.layer import COMPILED, LAYER_PROVIDERS, TIMESTEPS, LayerProvider, OwnLayer, layer_inputs
from bench.dit.measure import measure_layer, targets
from bench.dit.shapes import QUICK_SHAPES, SHAPES
from bench.dit.split import group_of, split_seconds
from bench.operators.peers import PEERS
from bench.records.markdown import format_section
from bench.records.outcome import Unavailable
from swifti2v_kernels.common.shapes import WINDOWS
from tests.support.bench_session import CPU, read_section, rows_of, session, timer

SMALL = SHAPES[0].reduced()


def missing(inputs: Any) -> Any:
    raise Unavailable("not installed")


def broken(inputs: Any) -> Any:
    raise NotImplementedError("not for this shape\nsecond line")


def hungry(*inputs: Any) -> Any:
    raise torch.OutOfMemoryError("no memory left")


def layers(*found: LayerProvider, timesteps: str = "one", dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    return measure_layer(SMALL, timesteps, found, dtype, CPU, timer)


class WrongLayer(OwnLayer):
    """Our layer without its update."""

    def step(self) -> tuple[torch.Tensor, ...]:
        assert self.workspace is not None
        return (self.workspace.take("x", *self.inputs.x.shape),)


def test_a_layer_is_held_against_float64_too() -> None:
    found = [LayerProvider("swifti2v", OwnLayer, True), LayerProvider("no update", WrongLayer)]
    found += [LayerProvider(call.__name__, call) for call in (missing, hungry, broken)]
    rows = layers(*found)
    assert [row["status"] for row in rows] == ["ok", "wrong", "not available", "out of memory", "failed"]
    assert rows[0]["tflops"] == SMALL.layer_flops / 0.5 / 1e12
    assert rows[1]["error"] == pytest.approx(1.0)
    assert {"self-attention", "cross-attention", "linear"} <= set(rows[0]["split"])
    parts = rows[0]["attention_seconds"], rows[0]["linear_seconds"], rows[0]["other_seconds"]
    assert sum(parts) == pytest.approx(sum(rows[0]["split"].values()))


def test_inputs_that_do_not_fit_are_rows_too(monkeypatch) -> None:
    monkeypatch.setattr(dit_measure, "layer_inputs", hungry)
    assert [row["reason"] for row in layers(*LAYER_PROVIDERS)] == ["the inputs alone do not fit"] * len(LAYER_PROVIDERS)


@pytest.mark.parametrize(
    ("timesteps", "traced"),
    [("per block", False), *(pytest.param(t, True, marks=pytest.mark.slow) for t in ("per block", "one"))],
)
def test_layers_compute_the_same(timesteps: str, traced: bool, monkeypatch) -> None:
    """Our layer, diffusers' and the exact one agree, on parts that do not begin with a block."""
    how = functools.partial(torch.compile, backend="eager") if traced else lambda layer, **options: layer
    monkeypatch.setattr(torch, "compile", how)
    monkeypatch.setattr(dit_measure, "split_seconds", lambda *args: {})
    assert SMALL.part < 2 * SMALL.block_len
    for dtype, limit in ((torch.float32, 2e-6), (torch.bfloat16, dit_measure.LAYER_TOLERANCE)):
        rows = layers(*LAYER_PROVIDERS, timesteps=timesteps, dtype=dtype)
        assert [row["status"] for row in rows] == ["ok"] * len(LAYER_PROVIDERS)
        assert max(row["error"] for row in rows) < limit


def test_figures_to_be_reached() -> None:
    op = {"status": "ok", "ours": True, "memory_bound": True, "op": "o", "provider": "p", "shape": "s"}
    layer = {"status": "ok", "ours": True, "provider": "swifti2v", "shape": "s", "timesteps": "one"}
    layer |= {"tokens": 70_400, "seconds": 1.0, "peak_bytes": 60}
    theirs = {**layer, "ours": False, "provider": COMPILED, "seconds": 1.3, "peak_bytes": 100}
    ops = [{**op, "fraction_of_copy": 0.86}, {**op, "fraction_of_copy": 0.84}, {**op, "memory_bound": False}]
    ops += [{**op, "ours": False}, {**op, "status": "wrong"}]
    found = targets(ops, [
        layer, theirs, {**layer, "shape": "short", "tokens": 9}, {**theirs, "shape": "short"},
        {**layer, "shape": "alone"},
    ])  # fmt: skip
    assert [(t["value"], t["met"]) for t in found] == [
        (0.86, True), (0.84, False), (1.3, True), (0.6, False), (1.3, True), (0.6, None),
    ]  # fmt: skip


def test_a_run_leaves_tables_and_json(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda layer, **options: layer)
    case = next(case for case in compared_cases() if case.real is not None and case.name.startswith("gated_residual C"))
    small = replace(case, real=replace(case.real, inputs=case.inputs))
    with session(tmp_path) as found:
        options = {"dtype": torch.float32, "copied_bytes": 64, "size": 16}
        peers = PEERS[case.operator]
        measure_all(found, [SMALL], [(small, peers)], LAYER_PROVIDERS, TIMESTEPS[:1], timer, **options)
    section = read_section(tmp_path)
    assert section["status"] == "complete"
    assert section["ceilings"]["copy_bytes_per_second"] == 2 * 64 / 0.5
    rows = [row for table in section["tables"].values() for row in table["rows"]]
    assert len(rows) == len(peers) + len(LAYER_PROVIDERS)
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["op"] for row in section["tables"]["operators"]["rows"]} == {case.name}
    assert "1.000 x compiled diffusers" in format_section(found.section.data)


def test_bytes_are_counted_at_the_real_size(tmp_path) -> None:
    """The traffic of plain PyTorch is that counted by hand, in bf16, where the operator's least is what it must be."""
    cases = {case.name: case for case in compared_cases()}
    with session(tmp_path) as found:
        count_ops(found, [cases["gated_residual C 5120 bfloat16"], cases["linear_gelu c1536"]])
    residual, linear = rows_of(tmp_path, "counted operators")
    elements = 18_480 * 5120
    assert residual["bytes"] == pytest.approx(6 * elements, rel=1e-2)
    # x to float32 (2 + 4), update * gate (2 + 4), their sum (8 + 4), and back (4 + 2); the gate is small.
    assert residual["eager_bytes"] == pytest.approx(30 * elements, rel=1e-3)
    assert residual["ratio"] == pytest.approx(5.0, rel=1e-2)
    assert linear["eager_bytes"] - linear["bytes"] == 2 * 2 * 70_400 * 8960
    assert (residual["basis"], residual["implementations"]) == ("counted", "swifti2v; eager; torch.compile; diffusers")


def test_every_eager_operator_can_be_counted() -> None:
    assert all(row["ratio"] > 1.3 for row in op_rows(compared_cases()))


def test_counts_on_meta_tensors_are_those_of_real_ones() -> None:
    eager = LAYER_PROVIDERS[1].prepare
    for timesteps in TIMESTEPS:
        counts = [count_layer(eager, SMALL, timesteps, torch.device(name)) for name in ("meta", "cpu")]
        assert counts[0] == counts[1]
    rows = layer_rows(SHAPES[:1], with_compiled=False)
    assert len(rows) == 2 * len(LAYER_PROVIDERS)
    peaks = {(row["provider"], row["timesteps"]): row.get("streams") for row in rows}
    # The stream before and after attention, the norm, and the hidden features before and after GELU.
    assert peaks["diffusers, eager", "one"] > 3 + 2 * 8960 / 1536
    assert peaks[COMPILED, "one"] is peaks["swifti2v", "one"] is None
    assert {row["reason"] for row in rows if row.get("status")} == {"not counted"}


def test_without_diffusers_its_layers_are_not_counted(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers.models.transformers.transformer_wan", None)
    rows = layer_rows(QUICK_SHAPES, with_compiled=False)
    assert {row["status"] for row in rows} == {"not available"}
    assert {row["provider"] for row in rows} == {p.name for p in LAYER_PROVIDERS}
    with pytest.warns(RuntimeWarning, match="torch.compile's peak is not counted: diffusers is not installed"):
        assert compiled_peak.__wrapped__(proportions(QUICK_SHAPES[0]), "one") is None
    (row,) = layers(LAYER_PROVIDERS[1])
    assert (row["status"], row["reason"][:26]) == ("not available", "diffusers is not installed")


def test_what_an_operator_frees_itself_is_not_counted() -> None:
    def event(name: str, start: int, duration: int = 0, nbytes: int = 0) -> Any:
        values = {"name": name, "start_ns": start, "duration_ns": duration, "nbytes": nbytes}
        return SimpleNamespace(**{key: functools.partial(lambda x: x, value) for key, value in values.items()})

    events = [
        event("[memory]", 0, nbytes=10), event("aten::addmm", 5, 10), event("aten::mm", 6, 3),
        event("[memory]", 7, nbytes=100), event("[memory]", 8, nbytes=-100), event("[memory]", 9, nbytes=3),
        event("[memory]", 20, nbytes=-10), event("aten::mm", 30, 5), event("[memory]", 31, nbytes=50),
    ]  # fmt: skip
    assert peak_of_events(events[:-2]) == 13
    assert peak_of_events(events) == 53


def test_small_layers_have_the_proportions_of_large_ones() -> None:
    for shape in (*SHAPES, *QUICK_SHAPES):
        small = proportions(shape)
        assert small.config.ffn_dim / small.config.dim == pytest.approx(
            shape.config.ffn_dim / shape.config.dim, rel=0.01
        )
        assert small.text / small.tokens == pytest.approx(shape.text / shape.tokens, rel=0.1)
        window = WINDOWS[shape.name]
        assert (shape.tokens, shape.config.dim, shape.config.ffn_dim, shape.config.num_heads) == (
            window.tokens, window.model.width, window.model.hidden, window.model.heads
        )  # fmt: skip
        reduced = shape.reduced()
        assert reduced.tokens <= 60
        assert 0 < reduced.given < reduced.blocks


def test_operators_are_grouped_and_a_layer_is_split() -> None:
    assert group_of(["aten::_flash_attention_forward", "swifti2v::segment_attention_out"]) == "attention"
    assert group_of(["aten::copy_", "swifti2v::segment_attention_out", "layer part: cross"]) == "cross-attention"
    assert group_of(["swifti2v::norm_rope", "layer part: self"]) == "fused norms and rotations"
    assert group_of(["aten::addmm.out"]) == "linear"
    assert group_of(["aten::native_layer_norm"]) == "other"
    with torch.no_grad():
        runner = LAYER_PROVIDERS[1].prepare(layer_inputs(SMALL, CPU, torch.float32, "one"))
        runner.load()
        split = split_seconds(runner.step, runner.attentions(), CPU)
    assert list(split) == ["self-attention", "cross-attention", "linear", "other"]
    assert min(split.values()) > 0
    assert all(name not in vars(owner) for owner, name in runner.attentions().values())


@pytest.mark.slow
def test_without_cuda_it_counts_and_checks(capfd, tmp_path) -> None:
    arguments = ["dit", "--quick", "--device", "cpu"]
    assert main([*arguments, "--part", "ops", "--ops", "norm_modulate", "--out", str(tmp_path / "ops")]) == 0
    out = capfd.readouterr().out
    assert "nothing is timed" in out
    assert "eager PyTorch moves" in out
    assert [row["status"] for row in rows_of(tmp_path / "ops", "checks")] == ["ok"] * 2
    assert main([*arguments, "--json", "--ops", "gated_residual", "--out", str(tmp_path / "all")]) == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed == json.loads((tmp_path / "all" / "result.json").read_text())
    tables = read_section(tmp_path / "all")["tables"]
    assert len(tables["counted operators"]["rows"]) == 2
    assert {row["status"] for row in tables["interpreted"]["rows"]} == {"ok"}
    ours, eager = (
        next(row for row in tables["counted layer"]["rows"] if row["provider"] == name)
        for name in ("swifti2v", "diffusers, eager")
    )
    # Our kernels' own path: the planned workspace and nothing beyond it.
    part, config = 1760, QUICK_SHAPES[0].config
    workspace = 4 * 17_600 * config.dim + part * (2 * config.dim + config.ffn_dim)
    assert ours["peak_bytes"] == 2 * workspace
    assert ours["other_bytes"] < 0.2 * eager["other_bytes"]


def test_our_torch_paths_are_not_measured_as_kernels(capsys, monkeypatch) -> None:
    monkeypatch.setenv("SWIFTI2V_BACKEND", "torch")
    assert main(["dit", "--device", "cpu"]) == 2
    assert "SWIFTI2V_BACKEND: expected auto or triton" in capsys.readouterr().err
