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
from bench.precision.forms import BASELINE, FORMS, add_ratios, chosen_forms, errors_of
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
from model.errors import InputError
from model.streaming.placement import Placement
from model.weights.load import load_dit, load_vae, random_weights
from swifti2v_kernels import assemble_window
from tests.model.dit.test_model import saved_diffusers_dit
from tests.model.vae.test_model import saved_diffusers_vae
from tests.support.bench_session import CPU, read_section
from tests.support.tolerances import PARITY, relative_error

TINY = PRESETS["tiny"].stage_two
NAMES = [form.name for form in FORMS]
ROWS, TOKENS, SEED = (12, 16), 64, 3


def weights(kind: str, seed: int = SEED, **changes: Any) -> SyntheticWeights:
    return SyntheticWeights(kind, replace(TINY, **changes), seed, CPU)


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


def errors(folder: Path, table: str) -> dict[tuple[str, str], list[float]]:
    """Returns the errors of a table by kind of weights and form."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in read_section(folder)["tables"][table]["rows"]:
        found.setdefault((row["weights"], row["form"]), []).append(row["error"])
    return found


# What a run leaves


def test_every_form_of_every_layer_and_window_has_a_row_with_all_figures(folder: Path) -> None:
    assert read_result(folder / RESULT)["sections"]["precision"]["status"] == "complete"
    tables = read_section(folder)["tables"]
    assert set(tables) == {"layers", "window", "encoder"}
    kinds, shapes_of = ("random", "structured"), ("128x128", "256x128", "128x256")
    layers = [f"{name} {shape}" for name, shape in zip(LAYERS, shapes_of, strict=True)]
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


@pytest.mark.parametrize("table", ["layers", "window"])
def test_errors_are_in_the_order_that_the_formats_have(table: str, folder: Path) -> None:
    """float8 keeps 4 bits of every number, int8 7 of a row's largest: more for normal rows, less for uneven ones."""
    found = errors(folder, table)
    for kind in ("random", "structured"):
        plain, int8, float8, int8_matmul, float8_matmul = (np.array(found[kind, name]) for name in NAMES)
        assert (plain < np.minimum(int8, float8)).all()
        assert (int8 < int8_matmul).all()
        assert (float8 < float8_matmul).all()
    assert (np.array(found["random", "int8"]) < np.array(found["random", "float8"])).all()
    assert (1.5 * np.array(found["random", "int8"]) < np.array(found["structured", "int8"])).all()
    assert np.array(found["structured", "float8"]) == pytest.approx(np.array(found["random", "float8"]), rel=0.4)


def test_results_depend_on_the_seed_and_on_nothing_else() -> None:
    forms = chosen_forms("int8,float8-matmul")
    once, again = (list(layer_rows(weights("structured"), "tiny", forms, TOKENS, SEED)) for _ in range(2))
    assert once == again
    other = list(layer_rows(weights("structured", 4), "tiny", forms, TOKENS, SEED))
    assert all(a["error"] != b["error"] for a, b in zip(once, other, strict=True))
    forms = chosen_forms("int8")
    once, again = (list(window_rows(weights("structured"), "tiny", (128, 96), ROWS, forms, SEED)) for _ in range(2))
    assert once == again


# The options


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, NAMES), ("float8", ["bfloat16", "float8"]), ("bfloat16", ["bfloat16"]),
        ("float8-matmul, int8", ["bfloat16", "int8", "float8-matmul"]),
    ],
)  # fmt: skip
def test_forms_are_chosen_by_name_and_the_baseline_is_always_there(text: str | None, expected: list[str]) -> None:
    assert [form.name for form in chosen_forms(text)] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--forms", "int8,int4"], f"forms: expected some of {', '.join(NAMES)}, got 'int4'"),
        (["--forms", ""], f"forms: expected some of {', '.join(NAMES)}, got ''"),
        (["--kinds", "random,trained"], "kinds: expected some of random, structured, got 'trained'"),
        (["--preset", "3b"], "preset: unknown '3b'; choose one of tiny, "),
        (["--preset", "tiny", "--layers", "3"], "layers: expected at most 2, those of tiny, got 3"),
        (["--size", "100x100"], "size: width and height must be multiples of 16, got 100x100; nearest: 96x96"),
        (["--weights", "none"], "weights: none does not exist"),
        (["--weights", "none", "--layers", "2"], "layers: expected nothing beside --weights, whose DiT is taken as"),
        (["--weights", "none", "--preset", "tiny"], "preset: expected nothing beside --weights, whose DiT is taken "),
        (["--weights", "none", "--kinds", "random"], "kinds: expected nothing beside --weights, whose DiT is taken "),
    ],
)
def test_options_that_do_not_fit_are_named_in_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results"
    assert main(["precision", *options, "--device", "cpu", "--out", str(out)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {message}")
    assert printed.count("\n") == 1
    assert not out.exists()


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


@pytest.mark.parametrize("kind", ["random", "structured"])
@pytest.mark.parametrize("form", NAMES)
def test_a_layers_error_is_that_of_numpy_in_float64(form: str, kind: str) -> None:
    """A layer's error equals that of numpy, which quantises by definition and sums exactly, but for the last bit."""
    given = weights(kind)
    weight, bias = (t.numpy().astype(np.float64) for t in given.linears([LAYERS["attention"]])[0])
    x = rounded(activations(kind, TOKENS, TINY.dim, SEED).numpy().astype(np.float64), 8)
    expected = x @ weight.T + bias
    written, _, matmul = form.partition("-")
    if form == "bfloat16":
        matrix = rounded(weight, 8)
    else:
        matrix = quantized(weight, written)
        x, matrix = (quantized(x, written), matrix) if matmul else (x, rounded(matrix, 8))
    difference = rounded(x @ matrix.T + rounded(bias, 8), 8) - expected
    rows = layer_rows(given, "tiny", chosen_forms(form), TOKENS, SEED)
    row = next(row for row in rows if row["form"] == form and row["layer"] == "attention 128x128")
    assert row["error"] == pytest.approx(np.linalg.norm(difference) / np.linalg.norm(expected), rel=0.01)
    rms = math.sqrt((expected**2).mean())
    assert row["largest_error"] == pytest.approx(np.abs(difference).max() / rms, rel=0.05)


@pytest.mark.parametrize("kind", ["random", "structured"])
def test_a_windows_velocity_is_that_of_a_forward_pass_on_the_assembled_window(kind: str) -> None:
    """The window has given blocks at timestep 0, noisy ones at the step's, and all at their places in the clip."""
    dit = weights(kind).build(torch.float32, Placement())
    inputs = make_inputs(TINY, ROWS, SEED)
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
    return velocity(dit.requires_grad_(False).eval(), make_inputs(TINY, ROWS, SEED))


def test_a_windows_errors_are_those_of_plain_models_with_the_quantised_weights() -> None:
    """A window's errors equal those of a model that knows nothing of 8 bits, with weights quantised by numpy."""
    with torch.device("meta"):
        names = WanDiT(TINY).state_dict()
    source = StructuredTensors(shapes(), SEED, CPU)
    state = {name: source.plain(name, torch.float32, CPU) for name in names}
    expected = forward(state, torch.float32)
    rows = {row["form"]: row for row in window_rows(weights("structured"), "tiny", (128, 96), ROWS, FORMS[:3], SEED)}
    for form in ("bfloat16", "int8", "float8"):
        changed = {
            name: torch.from_numpy(quantized(t.numpy().astype(np.float64), form))
            for name, t in state.items()
            if form != "bfloat16" and name.startswith("blocks.") and t.ndim == 2
        }
        found = relative_error(forward(state | changed, torch.bfloat16), expected)
        assert rows[form]["error"] == pytest.approx(found, rel=0.02), form
        assert rows[form]["error_ratio"] == rows[form]["error"] / rows["bfloat16"]["error"]


def test_random_weights_are_those_of_the_other_benchmarks() -> None:
    expected = random_weights(WanDiT, TINY, SEED).state_dict()
    found = weights("random").build(torch.float32, Placement()).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    (weight, bias), *_ = weights("random").linears([LAYERS["feed-forward down"]])
    assert torch.equal(weight, expected["blocks.0.ffn.net.2.weight"])
    assert torch.equal(bias, expected["blocks.0.ffn.net.2.bias"])


# Structured weights


def test_a_structured_tensor_depends_on_its_name_and_the_seed_and_not_on_who_asks_when() -> None:
    few, many = (StructuredTensors(shapes(num_layers=n), SEED, CPU) for n in (1, 3))
    other = StructuredTensors(shapes(), SEED + 1, CPU)
    names = [name for name in few.shapes if name.startswith("blocks.0.")]
    first = {name: few.plain(name, torch.float32, CPU) for name in names}
    for name in reversed(names):
        assert torch.equal(many.plain(name, torch.float32, CPU), first[name]), name
        assert not torch.equal(other.plain(name, torch.float32, CPU), first[name]), name
    again = many.plain("blocks.1.attn1.to_q.weight", torch.float32, CPU)
    assert not torch.equal(again, first["blocks.0.attn1.to_q.weight"])


def test_every_tensor_of_a_block_has_its_structure() -> None:
    source = StructuredTensors(shapes(), SEED, CPU)
    for name, shape in source.shapes.items():
        tensor = source.plain(name, torch.float32, CPU)
        assert tensor.shape == shape
        assert tensor.isfinite().all()
        if name.endswith("norm_q.weight"):
            assert (tensor > 0).all()
            assert 0.2 < tensor.log().std() < 0.6
        elif name.endswith("bias"):
            assert 0.05 < tensor.std() < 0.2
        elif name.startswith("blocks.") and len(shape) == 2:
            assert tensor.square().mean().item() == pytest.approx(1 / shape[1], rel=1e-4)
    # The same channel is the largest of every norm's scale, by 1 + scale.
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
    assert spectrum[RANK - 1] > 1.3 * spectrum[RANK]


def test_activations_have_outlier_channels_only_where_weights_have_structure() -> None:
    plain, uneven = (activations(kind, 512, 1000, SEED).std(0).sort().values for kind in ("random", "structured"))
    assert plain[-1] / plain[500] < 1.2
    assert (uneven[-5:] / uneven[500] > 3).all()
    assert uneven[-6] / uneven[500] < 3


# A checkpoint, and what goes wrong


@pytest.mark.slow
def test_the_same_tables_are_made_for_a_checkpoint(tmp_path: Path) -> None:
    path, out = tmp_path / "mine", tmp_path / "results"
    torch.manual_seed(0)
    for stage in ("stage1", "stage2"):
        saved_diffusers_dit(path / stage, in_channels=12, out_channels=4, text_dim=16)
    saved_diffusers_vae(path / "vae", base_dim=3, z_dim=4, num_res_blocks=1)
    options = ["--forms", "int8", "--tokens", "32", "--size", "64x48", "--device", "cpu", "--out", str(out)]
    assert main(["precision", "--weights", str(path), *options]) == 0
    tables = read_section(out)["tables"]
    dit = load_dit(path / "stage2")
    loaded = CheckpointWeights(dit.config, lambda dtype, at: load_dit(path / "stage2", dtype=dtype, placement=at))
    forms = chosen_forms("int8")
    expected = list(layer_rows(loaded, "mine", forms, 32, 0))
    assert [row | {"status": "ok", "basis": "measured"} for row in expected] == tables["layers"]["rows"]
    expected = list(window_rows(loaded, "mine", (64, 48), (6, 8), forms, 0))
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


def test_a_result_that_is_not_finite_is_wrong_and_has_no_ratio() -> None:
    rows = [{"form": BASELINE.name, "error": 0.5}, {"form": "int8"}]
    rows[1] |= errors_of(torch.tensor([1.0, math.nan]), torch.ones(2))
    add_ratios(rows)
    assert rows == [
        {"form": "bfloat16", "error": 0.5, "error_ratio": 1.0},
        {"form": "int8", "status": "wrong", "reason": "the result is not finite"},
    ]
    assert errors_of(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0])) == pytest.approx(
        {"error": 1 / math.sqrt(34), "largest_error": 1 / math.sqrt(17)}
    )


@pytest.mark.parametrize("lacking", [torch.float32, torch.bfloat16])
def test_a_model_that_does_not_fit_is_a_row(lacking: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows lack errors without the float32 model; without bfloat16 the others have errors and no ratio."""
    stock = SyntheticWeights.build

    def build(self: SyntheticWeights, dtype: torch.dtype, placement: Placement) -> WanDiT:
        if dtype == lacking and placement == Placement():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return stock(self, dtype, placement)

    monkeypatch.setattr(SyntheticWeights, "build", build)
    forms = chosen_forms("int8")
    plain, int8 = window_rows(weights("random", num_layers=1), "tiny", (64, 48), (6, 8), forms, SEED)
    assert plain["status"] == "out of memory"
    assert "error_ratio" not in int8
    if lacking == torch.float32:
        assert int8["reason"] == plain["reason"] == "float32: CUDA out of memory. Tried to allocate"
    else:
        assert int8["error"] > 0


def test_an_unknown_form_is_bad_input() -> None:
    with pytest.raises(InputError, match=r"forms: expected some of bfloat16, int8, .* got 'fp8', 'fp4'"):
        chosen_forms("fp8,int8,fp4")
