"""The command ``python -m bench precision`` gives errors that another computation gives too, also for structure."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.__main__ import main
from bench.harness.session import RESULT
from bench.precision import window
from bench.precision.encoder import encoder_rows
from bench.precision.forms import FORMS, compared
from bench.precision.layers import LAYERS, activations, layer_rows
from bench.precision.weights import (
    LOW_RANK_SHARE,
    OUTLIER_SCALE,
    RANK,
    CheckpointWeights,
    Drawing,
    StructuredTensors,
    SyntheticWeights,
    structured_matrix,
)
from bench.precision.window import make_inputs, velocity, window_rows
from bench.records.read import read_result
from model.config import PRESETS
from model.dit.model import FLOAT32_PARAMETERS, WanDiT
from model.streaming.placement import Placement
from model.weights.load import load_dit, load_vae
from swifti2v_kernels import assemble_window
from tests.model.dit.test_model import saved_diffusers_dit
from tests.model.vae.test_model import saved_diffusers_vae
from tests.support.bench_session import CPU, read_section
from tests.support.tolerances import PARITY, relative_error

TINY = PRESETS["tiny"].stage_two
NAMES = list(FORMS)
ROWS, TOKENS = (12, 16), 64


def weights(kind: str) -> SyntheticWeights:
    return SyntheticWeights(kind, TINY, CPU)


def shapes(**changes: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in WanDiT(replace(TINY, **changes)).state_dict().items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on the CPU."""
    out = tmp_path_factory.mktemp("precision") / "results"
    options = ["--preset", "tiny", "--size", "64x48", "--device", "cpu", "--out", str(out)]
    assert main(["precision", *options]) == 0
    return out


# What a run leaves


def test_every_form_of_every_layer_and_window_has_a_row_with_all_figures(folder: Path) -> None:
    assert read_result(folder / RESULT)["sections"]["precision"]["status"] == "complete"
    tables = read_section(folder)["tables"]
    assert set(tables) == {"layers", "window", "encoder"}
    kinds = ("random", "structured")
    layers = ("attention 128x128", "feed-forward up 256x128", "feed-forward down 128x256")
    found = [tuple(row[name] for name in ("model", "weights", "layer", "form")) for row in tables["layers"]["rows"]]
    assert found == [("tiny", kind, layer, form) for kind in kinds for layer in layers for form in NAMES]
    found = [tuple(row[name] for name in (*window.IDENTITY, "tokens")) for row in tables["window"]["rows"]]
    assert found == [("tiny", kind, "64x48", 2, form, 5 * 3 * 4) for kind in kinds for form in NAMES]
    for row in (*tables["layers"]["rows"], *tables["window"]["rows"]):
        assert (row["status"], row["basis"]) == ("ok", "measured")
        assert 0 < row["error"] < row["largest_error"] < 2
        assert row["error_ratio"] == 1 if row["form"] == "bfloat16" else row["error_ratio"] > 1
    assert "no checkpoint" in tables["layers"]["note"]
    assert "no checkpoint" in tables["window"]["note"]


# By another computation


def rounded(x: np.ndarray, bits: int, least: int = -1000) -> np.ndarray:
    """Returns numbers rounded to ``bits`` bits of mantissa, the leading one included.

    Exponents below ``least`` have its steps.
    """
    exponent = np.maximum(np.frexp(x)[1] - 1, least)
    step = np.exp2(exponent.astype(np.float64) - (bits - 1))
    return np.round(x / step) * step


def quantized(x: np.ndarray, kind: str) -> np.ndarray:
    """Returns rows quantised to 8 bits and multiplied by their scales again, in float64."""
    largest = {"int8": 127.0, "float8": 448.0}[kind]
    scale = (np.abs(x).max(1, keepdims=True).astype(np.float32) / np.float32(largest)).astype(np.float64)
    values = np.round(x / scale) if kind == "int8" else rounded(x / scale, 4, -6)
    return values * scale


@pytest.mark.parametrize("form", NAMES)
def test_a_layers_error_is_that_of_numpy_in_float64(form: str) -> None:
    """A layer's error equals that of numpy, which quantises by definition and sums exactly, but for the last bit."""
    given = weights("structured")
    weight, bias = (t.numpy().astype(np.float64) for t in given.linears([LAYERS["attention"]])[0])
    x = rounded(activations("structured", TOKENS, TINY.dim).numpy().astype(np.float64), 8)
    expected = x @ weight.T + bias
    written, _, matmul = form.partition("-")
    if form == "bfloat16":
        matrix = rounded(weight, 8)
    else:
        matrix = quantized(weight, written)
        x, matrix = (quantized(x, written), matrix) if matmul else (x, rounded(matrix, 8))
    difference = rounded(x @ matrix.T + rounded(bias, 8), 8) - expected
    row, *_ = layer_rows(given, "tiny", [FORMS[form]], TOKENS)
    assert row["layer"] == "attention 128x128"
    assert row["error"] == pytest.approx(np.linalg.norm(difference) / np.linalg.norm(expected), rel=0.01)
    rms = math.sqrt((expected**2).mean())
    assert row["largest_error"] == pytest.approx(np.abs(difference).max() / rms, rel=0.05)


def test_a_windows_velocity_is_that_of_a_forward_pass_on_the_assembled_window() -> None:
    """The window has given blocks at timestep 0, noisy ones at the step's, and all at their places in the clip."""
    dit = weights("structured").build(torch.float32, Placement())
    inputs = make_inputs(TINY, ROWS)
    assert inputs.window.blocks == (0, 3, 4, 5, 6)
    x = assemble_window(inputs.reference, inputs.latents, inputs.window, mask_channels=4)
    timestep = torch.tensor([[0.0, 0.0, *[1000 * window.SIGMA] * 3]])
    with torch.no_grad():
        expected = dit(x, timestep, inputs.text, block_index=inputs.window.blocks)[:, :, 2:]
    assert relative_error(velocity(dit, inputs), expected) < PARITY


def forward(state: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Returns the velocity of a plain model with these weights in the window."""
    kept = {
        name: t.to(torch.float32 if any(part in name for part in FLOAT32_PARAMETERS) else dtype)
        for name, t in state.items()
    }
    with torch.device("meta"):
        dit = WanDiT(TINY)
    dit.load_state_dict(kept, assign=True)
    return velocity(dit.requires_grad_(False).eval(), make_inputs(TINY, ROWS))


def test_a_windows_errors_are_those_of_plain_models_with_the_quantised_weights() -> None:
    """A window's errors equal those of a model that knows nothing of 8 bits, with weights quantised by numpy."""
    with torch.device("meta"):
        names = WanDiT(TINY).state_dict()
    source = StructuredTensors(shapes(), CPU)
    state = {name: source.plain(name, torch.float32, CPU) for name in names}
    expected = forward(state, torch.float32)
    forms = list(FORMS.values())[:3]
    rows = {row["form"]: row for row in window_rows(weights("structured"), "tiny", (128, 96), ROWS, forms)}
    for form in ("bfloat16", "int8", "float8"):
        changed = {
            name: torch.from_numpy(quantized(t.numpy().astype(np.float64), form))
            for name, t in state.items()
            if form != "bfloat16" and name.startswith("blocks.") and t.ndim == 2
        }
        found = relative_error(forward(state | changed, torch.bfloat16), expected)
        assert rows[form]["error"] == pytest.approx(found, rel=0.02), form
        assert rows[form]["error_ratio"] == rows[form]["error"] / rows["bfloat16"]["error"]


# Structured weights


def test_a_structured_tensor_depends_on_its_name_and_not_on_who_asks_when() -> None:
    few, many = (StructuredTensors(shapes(num_layers=n), CPU) for n in (1, 3))
    names = [name for name in few.shapes if name.startswith("blocks.0.")]
    first = {name: few.plain(name, torch.float32, CPU) for name in names}
    for name in reversed(names):
        assert torch.equal(many.plain(name, torch.float32, CPU), first[name]), name
    again = many.plain("blocks.1.attn1.to_q.weight", torch.float32, CPU)
    assert not torch.equal(again, first["blocks.0.attn1.to_q.weight"])


def test_the_same_channel_is_the_largest_of_every_norm_s_scale() -> None:
    """The scales by which norms multiply, 1 + scale, have one outlier in all layers; the other tables have none."""
    source = StructuredTensors(shapes(), CPU)
    tables = [source.plain(f"blocks.{i}.scale_shift_table", torch.float32, CPU) for i in range(2)]
    largest = {int((1 + table[0, row]).abs().argmax()) for table in tables for row in (1, 4)}
    assert len(largest) == 1
    assert all(table[0, row].abs().max() < 2 for table in tables for row in (0, 2, 3, 5))


def test_heavy_tails_are_students() -> None:
    """Heavy tails have the 95 % and 99 % points of Student's t with 5 degrees of freedom, scaled to a variance of 1."""
    draw = Drawing("tails", CPU).heavy(1000, 1000)
    assert draw.var().item() == pytest.approx(1, abs=0.02)
    for point, share in ((2.5706, 0.05), (4.0321, 0.01)):
        assert (draw.abs() > point * math.sqrt(3 / 5)).double().mean().item() == pytest.approx(share, rel=0.03)


def test_structured_matrices_have_outlier_columns_uneven_rows_and_a_part_of_low_rank() -> None:
    rows, columns = 600, 1000
    matrix = structured_matrix(Drawing("matrix", CPU), rows, columns)
    by_column, by_row = (matrix.square().mean(axis).sqrt() for axis in (0, 1))
    order = by_column.sort(descending=True).values
    # Five of a thousand; the ratio is 8 but for their own log-normal scales.
    assert order[4] / order[5] > 1.2
    assert order[:5].mean() / order[5:].mean() == pytest.approx(OUTLIER_SCALE, rel=0.4)
    assert by_row.log().std().item() == pytest.approx(0.4, rel=0.15)
    # Divided by its scales, the matrix has more than the spectrum of one without the part of low rank.
    spectrum = torch.linalg.svdvals(matrix / by_row[:, None] / by_column)
    share = (spectrum[:RANK].square().sum() / spectrum.square().sum()).item()
    assert LOW_RANK_SHARE < share < 1.5 * LOW_RANK_SHARE
    assert matrix.square().mean().item() == pytest.approx(1 / columns, rel=1e-4)
    assert spectrum[RANK - 1] > 1.3 * spectrum[RANK]


# A checkpoint, and what goes wrong


@pytest.mark.slow
def test_the_same_tables_are_made_for_a_checkpoint(tmp_path: Path) -> None:
    path, out = tmp_path / "mine", tmp_path / "results"
    torch.manual_seed(0)
    for stage in ("stage1", "stage2"):
        saved_diffusers_dit(path / stage, in_channels=12, out_channels=4, text_dim=16)
    saved_diffusers_vae(path / "vae", base_dim=3, z_dim=4, num_res_blocks=1)
    options = ["--quick", "--forms", "int8", "--size", "64x48", "--device", "cpu", "--out", str(out)]
    assert main(["precision", "--weights", str(path), *options]) == 0
    tables = read_section(out)["tables"]
    dit = load_dit(path / "stage2")
    loaded = CheckpointWeights(dit.config, lambda dtype, at: load_dit(path / "stage2", dtype=dtype, placement=at))
    forms = [FORMS["bfloat16"], FORMS["int8"]]
    expected = list(layer_rows(loaded, "mine", forms, 64))
    assert [row | {"status": "ok", "basis": "measured"} for row in expected] == tables["layers"]["rows"]
    expected = list(window_rows(loaded, "mine", (64, 48), (6, 8), forms))
    assert [row | {"status": "ok", "basis": "measured"} for row in expected] == tables["window"]["rows"]
    assert {row["weights"] for table in tables.values() for row in table["rows"]} == {"checkpoint"}
    expected = list(encoder_rows(lambda: load_vae(path / "vae"), "mine", "checkpoint", (64, 48)))
    assert [row | {"status": "ok", "basis": "measured"} for row in expected] == tables["encoder"]["rows"]
    assert "no checkpoint" not in tables["layers"]["note"]
    assert str(tmp_path) not in json.dumps(tables)
    middle = dit.blocks[dit.config.num_layers // 2]
    weight, bias = loaded.linears([LAYERS["feed-forward up"]])[0]
    assert torch.equal(weight, middle.ffn.net[0].proj.weight)
    assert torch.equal(bias, middle.ffn.net[0].proj.bias)


def test_errors_are_relative_and_what_is_not_finite_or_does_not_fit_is_a_row_without() -> None:
    def lacking() -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    found = {"bfloat16": lambda: torch.tensor([3.0, 4.0]), "int8": lambda: torch.tensor([1.0, math.nan]),
             "float8": lacking, "other": lambda: torch.tensor([3.0, 3.0])}  # fmt: skip
    plain, int8, float8, other = compared({"model": "m"}, "float32", lambda: torch.tensor([3.0, 5.0]), found)
    base = {"model": "m", "error": 1 / math.sqrt(34), "largest_error": 1 / math.sqrt(17)}
    assert plain == pytest.approx(base | {"form": "bfloat16", "error_ratio": 1.0})
    assert other["error_ratio"] == pytest.approx(2)
    assert int8 == {"model": "m", "form": "int8", "status": "wrong", "reason": "the result is not finite"}
    assert (float8["status"], "error_ratio" in float8) == ("out of memory", False)
    rows = list(compared({}, "float32", lacking, found))
    assert {row["reason"] for row in rows} == {"float32: CUDA out of memory. Tried to allocate"}
    rows = list(compared({}, "float32", found["other"], {"bfloat16": lacking, "other": found["bfloat16"]}))
    assert "error_ratio" not in rows[1]
