"""``python -m bench dit``: what it does without a GPU, and its measuring parts, on the CPU with small shapes."""

from __future__ import annotations

import functools
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.__main__ import main
from bench.dit import measure as dit_measure
from bench.dit.command import LINEAR_GELU, compared_cases, measure_layers, measure_ops
from bench.dit.layer import COMPILED, LAYER_PROVIDERS, TIMESTEPS, LayerProvider, OwnLayer, layer_inputs
from bench.dit.measure import measure_layer, targets
from bench.dit.shapes import QUICK_SHAPES, SHAPES, Shape
from bench.dit.split import group_of, split_seconds
from bench.harness.timing import Ceilings
from bench.operators.peers import PEERS
from bench.records.markdown import format_section
from swifti2v_kernels.common.shapes import WINDOWS
from tests.support.bench_session import CPU, read_section, session, timer

#: A window of Wan 1.3B with one head and a part that is no whole block.
SMALL = Shape(
    "small", replace(SHAPES[0].config, num_heads=1, num_layers=1, ffn_dim=747, text_dim=16, freq_dim=32), 4, 3, 5, 3,
    text=9, part=20,
)  # fmt: skip


def layers(*found: LayerProvider, timesteps: str = "one", dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    return measure_layer(SMALL, timesteps, found, dtype, CPU, timer)


class WrongLayer(OwnLayer):
    """Our layer without its update."""

    def step(self) -> tuple[torch.Tensor, ...]:
        assert self.workspace is not None
        return (self.workspace.take("x", *self.inputs.x.shape),)


def test_a_layer_is_held_against_float64_too(monkeypatch) -> None:
    """One that is wrong is not timed, one that is not there says so, and the time of the others is split."""
    monkeypatch.setitem(sys.modules, "diffusers.models.transformers.transformer_wan", None)
    rows = layers(LAYER_PROVIDERS[0], LayerProvider("no update", WrongLayer), LAYER_PROVIDERS[1])
    assert [row["status"] for row in rows] == ["ok", "wrong", "not available"]
    assert rows[0]["tflops"] == SMALL.layer_flops / 0.5 / 1e12
    assert rows[1]["error"] == pytest.approx(1.0)
    assert rows[2]["reason"].startswith("diffusers is not installed")
    assert {"self-attention", "cross-attention", "linear"} <= set(rows[0]["split"])
    parts = rows[0]["attention_seconds"], rows[0]["linear_seconds"], rows[0]["other_seconds"]
    assert sum(parts) == pytest.approx(sum(rows[0]["split"].values()))


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
        peers = PEERS[case.operator]
        measure_ops(found, [(small, peers)], timer, Ceilings(1e9, 2.0, ""))
        measure_layers(found, [SMALL], LAYER_PROVIDERS, TIMESTEPS[:1], timer, torch.float32)
    section = read_section(tmp_path)
    assert section["status"] == "complete"
    rows = [row for table in section["tables"].values() for row in table["rows"]]
    assert len(rows) == len(peers) + len(LAYER_PROVIDERS)
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["op"] for row in section["tables"]["operators"]["rows"]} == {case.name}
    assert "1.000 x compiled diffusers" in format_section(found.section.data)


def test_shapes_are_those_of_real_models() -> None:
    for shape in (*SHAPES, *QUICK_SHAPES):
        window = WINDOWS[shape.name]
        assert (shape.tokens, shape.config.dim, shape.config.ffn_dim, shape.config.num_heads) == (
            window.tokens, window.model.width, window.model.hidden, window.model.heads
        )  # fmt: skip
    flops, moved = (2 * 1536 + 8) * 70400 * 8960, 2 * (70400 * 1536 + 1536 * 8960 + 8960 + 70400 * 8960)
    assert (LINEAR_GELU.real.cost.flops, LINEAR_GELU.real.cost.bytes) == (flops, moved)


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


def test_our_torch_paths_are_not_measured_as_kernels(capsys, monkeypatch) -> None:
    monkeypatch.setenv("SWIFTI2V_BACKEND", "torch")
    assert main(["dit", "--device", "cpu"]) == 2
    assert "SWIFTI2V_BACKEND: expected auto or triton" in capsys.readouterr().err
