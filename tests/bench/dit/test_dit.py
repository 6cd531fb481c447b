"""``python -m bench dit``: what it does without a GPU, and its measuring parts, on the CPU with small shapes."""

from __future__ import annotations

import functools
import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.__main__ import main
from bench.dit import measure as dit_measure
from bench.dit import providers as dit_providers
from bench.dit.command import count_ops, measure_all
from bench.dit.count import compiled_peak, count_layer, eager_bytes, layer_rows, op_rows, peak_of_events, proportions
from bench.dit.layer import COMPILED, LAYER_PROVIDERS, TIMESTEPS, LayerProvider, OwnLayer, exact_rows, layer_inputs
from bench.dit.measure import Machine, measure_layer, measure_op, targets
from bench.dit.ops import OPS, Op, relative_error
from bench.dit.providers import Provider, providers
from bench.dit.shapes import QUICK_SHAPES, SHAPES
from bench.dit.split import group_of, split_seconds
from bench.records.markdown import format_section
from bench.records.outcome import Unavailable
from bench.records.plot import plot_layers, plot_operators
from tests.support.bench_session import CPU, read_section, rows_of, session, timer

SMALL = SHAPES[0].reduced()
NORM = OPS[0]


MACHINE = Machine(CPU, timer, copy_bytes_per_second=1e5, matmul_tflops=1.0)


@pytest.fixture(autouse=True)
def _without_kernels(monkeypatch) -> None:
    """Our operators take their PyTorch paths, and compiled code needs no compiler."""
    monkeypatch.setattr(dit_providers, "BACKEND", "auto")
    traced = functools.cache(functools.partial(torch.compile, backend="eager", dynamic=False))
    monkeypatch.setattr(dit_providers, "compiled", traced)


def right(inputs: Any) -> Any:
    return lambda: NORM.run(inputs.arguments)


def wrong(inputs: Any) -> Any:
    return lambda: (inputs.arguments["x"],)


def empty(inputs: Any) -> Any:
    return lambda: (inputs.arguments["x"] * float("nan"),)


def missing(inputs: Any) -> Any:
    raise Unavailable("not installed")


def hungry(inputs: Any) -> Any:
    raise torch.OutOfMemoryError("no memory left")


def broken(inputs: Any) -> Any:
    raise NotImplementedError("not for this shape\nsecond line")


ALL = (right, wrong, empty, missing, hungry, broken)
STATUSES = ["ok", "wrong", "wrong", "not available", "out of memory", "failed"]


def measured(op: Op = NORM) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    found = [Provider(call.__name__, call, f"note of {call.__name__}", call is right) for call in ALL]
    measure_op(op, SMALL, found, torch.float32, MACHINE, rows.append)
    return rows


def layers(*found: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    measure_layer(SMALL, "one", found, torch.float32, MACHINE, rows.append)
    return rows


class WrongLayer(OwnLayer):
    """Our layer without its update."""

    def step(self) -> tuple[torch.Tensor, ...]:
        assert self.workspace is not None
        return (self.workspace.take("x", *self.inputs.x.shape),)


def test_what_is_wrong_is_not_timed_and_what_fails_is_a_row() -> None:
    rows = measured()
    assert [row["status"] for row in rows] == STATUSES
    nbytes = 2 * 2 * SMALL.tokens * SMALL.config.dim
    assert rows[0]["bytes"] == nbytes
    assert rows[0]["bytes_per_second"] == nbytes / 0.5
    assert rows[0]["fraction_of_copy"] == nbytes / 0.5 / 1e5
    assert rows[0]["memory_bound"]
    assert rows[0]["error"] < 1e-6
    assert all("seconds" not in row for row in rows[1:])
    assert rows[2]["error"] is None
    assert [row["reason"] for row in rows[3:]] == ["not installed", "no memory left", "not for this shape"]
    json.dumps(rows, allow_nan=False)


def test_a_layer_is_held_against_float64_too() -> None:
    found = [LayerProvider("swifti2v", OwnLayer, True), LayerProvider("no update", WrongLayer)]
    found += [LayerProvider(call.__name__, call) for call in ALL[3:]]
    rows = layers(*found)
    assert [row["status"] for row in rows] == ["ok", *STATUSES[2:]]
    assert rows[0]["tflops"] == SMALL.layer_flops / 0.5 / 1e12
    assert rows[1]["error"] == pytest.approx(1.0)
    assert {"self-attention", "cross-attention", "linear"} <= set(rows[0]["split"])
    parts = rows[0]["attention_seconds"], rows[0]["linear_seconds"], rows[0]["other_seconds"]
    assert sum(parts) == pytest.approx(sum(rows[0]["split"].values()))


def test_where_all_together_fail_each_is_timed_alone(monkeypatch) -> None:
    def cramped(calls: Any) -> Any:
        if len(calls) > 1:
            raise torch.OutOfMemoryError("no memory left")
        return timer(calls)

    rows: list[dict[str, Any]] = []
    found = [Provider("first", right, ours=True), Provider("second", right)]
    measure_op(NORM, SMALL, found, torch.float32, Machine(CPU, cramped, 1e5, 1.0), rows.append)
    assert [row["seconds"] for row in rows] == [0.5, 0.5]
    assert {row["warning"] for row in rows} == {"timed alone (no memory left)"}


def test_inputs_that_do_not_fit_are_rows_too(monkeypatch) -> None:
    op = Op("hungry", NORM.function, lambda *args: hungry(None), NORM.cost)
    assert {row["status"] for row in measured(op)} == {"out of memory"}
    assert {row["reason"] for row in measured(op)} == {"the inputs alone do not fit"}
    monkeypatch.setattr(dit_measure, "layer_inputs", lambda *args: hungry(None))
    assert [row["reason"] for row in layers(*LAYER_PROVIDERS)] == ["the inputs alone do not fit"] * len(LAYER_PROVIDERS)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_implementations_compute_the_same(op: Op) -> None:
    """All implementations agree, in float32 all but exactly, and in bf16 within what is timed."""
    for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, dit_measure.TOLERANCE)):
        rows = op.rows(SMALL, CPU)
        expected = op.exact(op.make(SMALL, CPU, dtype), rows)
        for provider in providers(op):
            inputs = op.make(SMALL, CPU, dtype)
            if provider.name == "liger":
                with pytest.raises(Unavailable, match="liger-kernel is not installed"):
                    provider.prepare(inputs)
                continue
            with torch.no_grad():
                results = provider.prepare(inputs)()
            assert relative_error(op.sample(inputs, results, rows), expected) < limit, provider.name


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
        rows: list[dict[str, Any]] = []
        measure_layer(SMALL, timesteps, LAYER_PROVIDERS, dtype, MACHINE, rows.append)
        assert [row["status"] for row in rows] == ["ok"] * len(LAYER_PROVIDERS)
        assert max(row["error"] for row in rows) < limit


def test_the_exact_layer_is_diffusers_in_float64() -> None:
    inputs = layer_inputs(SMALL, CPU, torch.float32, "one")
    inputs = type(inputs)(
        **{
            name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in vars(inputs).items()
        }
    )
    inputs.layer.double()
    with torch.no_grad():
        runner = LAYER_PROVIDERS[1].prepare(inputs)
        runner.load()
        (theirs,) = runner.step()
        exact, _ = exact_rows(inputs, torch.arange(SMALL.tokens))
    # diffusers' norms are float32 whatever the input.
    assert (theirs - exact).norm() / exact.norm() < 1e-6


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


def test_a_run_leaves_tables_json_and_plots(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda layer, **options: layer)
    ops = [(op, providers(op)) for op in (NORM, OPS[-1])]
    with session(tmp_path) as found:
        options = {"dtype": torch.float32, "copied_bytes": 64, "size": 16}
        measure_all(found, [SMALL], ops, LAYER_PROVIDERS, TIMESTEPS[:1], timer, **options)
    section = read_section(tmp_path)
    assert section["status"] == "complete"
    assert section["ceilings"]["copy_bytes_per_second"] == 2 * 64 / 0.5
    rows = [row for table in section["tables"].values() for row in table["rows"]]
    assert len(rows) == 5 + 4 + len(LAYER_PROVIDERS)
    assert {row["status"] for row in rows if row["provider"] != "liger"} == {"ok"}
    text = format_section(found.section.data)
    assert "liger-kernel is not installed" in text
    assert "1.000 x compiled diffusers" in text
    for name in ("operators", "layer"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000


def test_plots_of_failures(tmp_path) -> None:
    rows = layers(LayerProvider("swifti2v", OwnLayer, True), LayerProvider("hungry", hungry))
    assert plot_operators(measured(), "card", tmp_path / "op.png").stat().st_size > 1000
    assert plot_layers(rows, "card", tmp_path / "layer.png").stat().st_size > 1000


def test_bytes_are_counted_at_the_real_size(tmp_path) -> None:
    rows = {row["op"]: row for row in op_rows(OPS, SHAPES[:1])}
    elements = 70_400 * 1536
    assert rows["gated_residual"]["bytes"] == 6 * elements
    # x to float32 (2 + 4), update * gate (2 + 4), their sum (8 + 4), and back (4 + 2); the gate is small.
    assert rows["gated_residual"]["eager_bytes"] == pytest.approx(30 * elements, rel=1e-3)
    hidden = 2 * 70_400 * 8960
    assert rows["linear_gelu"]["eager_bytes"] - rows["linear_gelu"]["bytes"] == 2 * hidden
    assert rows["gated_residual"]["ratio"] == pytest.approx(5.0, rel=1e-3)
    with session(tmp_path) as found:
        count_ops(found, SHAPES[:1], OPS)
    kept = {row["op"]: row for row in rows_of(tmp_path, "counted operators")}
    assert kept["gated_residual"]["bytes"] == 6 * elements
    assert {row["basis"] for row in kept.values()} == {"counted"}
    assert "diffusers; liger" in kept["norm_modulate"]["implementations"]


def test_counts_on_meta_tensors_are_those_of_real_ones() -> None:
    eager = LAYER_PROVIDERS[1].prepare
    for timesteps in TIMESTEPS:
        counts = [count_layer(eager, SMALL, timesteps, torch.device(name)) for name in ("meta", "cpu")]
        assert counts[0] == counts[1]
    assert eager_bytes(NORM, SMALL) == pytest.approx(36 * SMALL.tokens * SMALL.config.dim, rel=0.2)
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
    row: list[dict[str, Any]] = []
    measure_layer(SMALL, "one", LAYER_PROVIDERS[1:2], torch.float32, MACHINE, row.append)
    assert (row[0]["status"], row[0]["reason"][:26]) == ("not available", "diffusers is not installed")


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
    assert [row["status"] for row in rows_of(tmp_path / "ops", "interpreted")] == ["ok"] * 6
    assert main([*arguments, "--json", "--ops", "gated_residual", "--out", str(tmp_path / "all")]) == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed == json.loads((tmp_path / "all" / "result.json").read_text())
    tables = read_section(tmp_path / "all")["tables"]
    assert len(tables["counted operators"]["rows"]) == 3
    assert [row["op"] for row in tables["interpreted"]["rows"]][-1] == "layer"
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
