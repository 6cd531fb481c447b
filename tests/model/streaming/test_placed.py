"""DiTs whose layers live elsewhere or are in 8 bits: the same numbers, the promised bytes, and checkpoints."""

from __future__ import annotations

import itertools
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from model.dit.model import WanDiT
from model.errors import InputError
from model.machine.counted import TensorMemory
from model.streaming.placement import ALIGNMENT, MATMUL, QUANTIZE, Placement, layer_layouts, placed_bytes
from model.weights.load import inspect_weights, load_dit, random_weights
from model.weights.lora import LoRA, merge_loras
from tests.conftest import TINY_DIT
from tests.support.original_names import float8_with_scales, original_dit
from tests.support.products import half
from tests.support.tolerances import relative_error

LAYERS = 5
DTYPES = (torch.float32, torch.bfloat16)
CONFIG = replace(TINY_DIT, num_layers=LAYERS)
#: Spread over three homes: two layers on the device, one in host memory, two in the file.
MOVING = {"resident": 2, "pinned": 1}


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(1, CONFIG.in_channels, 3, 4, 6, generator=draw)
    return latents, torch.tensor([[0.0, 500.0, 500.0]]), torch.randn(1, 5, CONFIG.text_dim, generator=draw)


def output(model: WanDiT) -> Tensor:
    with torch.no_grad():
        return model(*inputs())


@pytest.fixture(scope="module")
def plain() -> WanDiT:
    return random_weights(WanDiT, CONFIG, 1)


@pytest.fixture(scope="module")
def checkpoint(plain: WanDiT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the names of the Wan repositories, in float32."""
    path = tmp_path_factory.mktemp("plain") / "wan.safetensors"
    return saved(original_dit(plain.state_dict()), path)


def saved(tensors: dict[str, Tensor], path: Path) -> Path:
    """Saves a checkpoint, with the configuration beside it that the tensors do not show."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    (path.parent / "config.json").write_text(json.dumps({"num_heads": CONFIG.num_heads}))
    return path


def float8_file(plain: WanDiT, path: Path, dtype: torch.dtype = torch.float8_e4m3fn, by_row: bool = False) -> Path:
    """Saves a float8 checkpoint as ComfyUI ships them."""
    stored, _ = float8_with_scales(original_dit(plain.state_dict()), dtype=dtype, by_row=by_row)
    return saved(stored, path)


# The decision


@pytest.mark.parametrize("layers", [1, 2, 7, 30])
def test_every_block_has_one_home_and_as_many_as_asked_stay(layers: int) -> None:
    for resident, pinned in itertools.product(range(layers + 2), (0, 1, 5, 60)):
        homes = Placement(resident, pinned).homes(layers)
        stay = min(resident, layers)
        assert homes.count("device") == stay
        assert homes.count("host") == min(pinned, layers - stay)
        assert len(homes) == layers
        # Layers are spread evenly: runs of those that stay differ by at most one where they lie between two that move.
        moving = [i for i, home in enumerate(homes) if home != "device"]
        gaps = {b - a for a, b in itertools.pairwise(moving)}
        assert max(gaps, default=0) - min(gaps, default=0) <= 1
    assert set(Placement().homes(layers)) == {"device"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantize": "int4"}, "quantize: expected one of none, file, float8, int8, got 'int4'"),
        ({"resident": -1}, "resident: expected None or at least 0, got -1"),
        ({"matmul": "8bit", "quantize": "file"}, "matmul: 8bit goes with quantize float8 or int8, got file"),
    ],
)
def test_decisions_that_make_no_sense_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(InputError) as error:
        Placement(**fields)
    assert str(error.value) == message


# The bytes


PLACEMENTS = [
    Placement(**where, quantize=quantize, matmul=matmul)
    for where in ({}, {"resident": 0}, {"resident": 1}, {"resident": LAYERS - 1}, MOVING)
    for quantize in QUANTIZE
    for matmul in MATMUL
    if matmul == "plain" or quantize in ("float8", "int8")
]


@pytest.mark.parametrize(("placement", "dtype", "device"), half(PLACEMENTS, DTYPES, ("meta", "cpu")), ids=str)
def test_the_bytes_on_the_device_are_those_promised(placement: Placement, dtype: torch.dtype, device: str) -> None:
    """The promised bytes are alive after building, host memory not counted; on tensors without memory and with it."""
    with TensorMemory() as memory:
        model = random_weights(WanDiT, CONFIG, 1, dtype=dtype, device=device, placement=placement)
        # The tensors that the model is built with are replaced; those that are left are what it holds.
        found = memory.live
    assert found == placed_bytes(CONFIG, dtype, placement).device
    assert model.stream is not None


def test_host_memory_is_what_was_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    """The promised bytes of host memory are counted when the count is allowed to see them."""
    placement = Placement(resident=1)
    promised = placed_bytes(CONFIG, torch.float32, placement)
    monkeypatch.setattr("model.streaming.placed.elsewhere", nullcontext)
    with TensorMemory() as memory:
        model = random_weights(WanDiT, CONFIG, 1, placement=placement)
        assert memory.live == promised.device + promised.host
    assert model.stream is not None


def test_tensors_of_a_block_lie_apart_and_aligned() -> None:
    for placement in PLACEMENTS:
        for buffer in layer_layouts(CONFIG, torch.bfloat16, placement)[0]:
            flat = torch.empty(buffer.nbytes, dtype=torch.uint8)
            views = list(buffer.views(flat).values())
            starts = [view.data_ptr() - flat.data_ptr() for view in views]
            assert all(start % ALIGNMENT == 0 for start in starts)
            ends = [start + view.nbytes for start, view in zip(starts, views, strict=True)]
            assert all(end <= start for end, start in zip(ends, [*starts[1:], buffer.nbytes], strict=False))


# The numbers


@pytest.mark.parametrize(
    ("placement", "dtype"), half([p for p in PLACEMENTS if p.quantize in ("none", "file")], DTYPES), ids=str
)
def test_where_weights_live_changes_nothing(placement: Placement, dtype: torch.dtype) -> None:
    expected = output(random_weights(WanDiT, CONFIG, 1, dtype=dtype))
    model = random_weights(WanDiT, CONFIG, 1, dtype=dtype, placement=placement)
    assert all(torch.equal(output(model), expected) for _ in range(2))


@pytest.mark.parametrize(
    ("where", "by_row", "kind", "dtype"),
    half([{}, {"resident": 0}, MOVING], [False, True], [torch.float8_e4m3fn, torch.float8_e5m2], DTYPES),
    ids=str,
)
def test_float8_files_run_as_they_are(
    where: dict, by_row: bool, kind: torch.dtype, dtype: torch.dtype, plain: WanDiT, tmp_path: Path
) -> None:
    """A float8 file gives, bit for bit, the result of the same weights multiplied out as they are read."""
    path = float8_file(plain, tmp_path / "wan.safetensors", kind, by_row)
    stored = inspect_weights(path, WanDiT).in_eight_bits()
    assert len(stored) == LAYERS * 10
    assert set(stored.values()) == {str(kind).removeprefix("torch.")}
    expected = load_dit(path, config=CONFIG, dtype=dtype)
    placement = Placement(**where, quantize="file")
    with TensorMemory() as memory:
        model = load_dit(path, config=CONFIG, dtype=dtype, placement=placement)
        found = memory.live
    assert torch.equal(output(model), output(expected))
    assert found <= placed_bytes(CONFIG, dtype, placement, stored).device


def test_a_lora_takes_the_matrices_that_it_changes_out_of_8_bits(plain: WanDiT, tmp_path: Path) -> None:
    """A LoRA is merged in float32 as always, so that the result is that of a model without 8 bits, bit for bit."""
    path = float8_file(plain, tmp_path / "wan.safetensors")
    draw = torch.Generator().manual_seed(2)
    matrix = plain.blocks[1].attn1.to_q.weight
    factors = {
        "diffusion_model.blocks.1.self_attn.q.lora_down.weight": torch.randn(2, matrix.shape[1], generator=draw),
        "diffusion_model.blocks.1.self_attn.q.lora_up.weight": torch.randn(matrix.shape[0], 2, generator=draw),
    }
    save_file(factors, tmp_path / "lora.safetensors")
    loras = [LoRA(tmp_path / "lora.safetensors", 0.7)]
    kept, left = (inspect_weights(path, WanDiT, added).in_eight_bits() for added in ((), loras))
    without = kept.keys() - left.keys()
    assert without == {"blocks.1.attn1.to_q.weight"}
    expected = load_dit(path, config=CONFIG, loras=loras)
    placed = load_dit(path, config=CONFIG, loras=loras, placement=Placement(**MOVING, quantize="file"))
    assert torch.equal(output(placed), output(expected))
    assert not torch.equal(output(placed), output(load_dit(path, config=CONFIG)))


@pytest.mark.parametrize("matmul", [None, *DTYPES], ids=["plain", "8bit-float32", "8bit-bfloat16"])
@pytest.mark.parametrize("quantize", ["float8", "int8"])
def test_quantised_weights_are_near_and_the_same_wherever_they_live(
    quantize: str, matmul: torch.dtype | None, checkpoint: Path
) -> None:
    """Quantised weights, one scale a row, are near, and give the same bits wherever they live.

    float8 e4m3 has 4 significant bits, int8 as many as the largest number of its row leaves. The error of 8-bit matmuls
    is that of the weights and about as much again: activations have scales too.
    """

    def outputs(matmul: str, dtype: torch.dtype) -> list[Tensor]:
        placements = (Placement(**w, quantize=quantize, matmul=matmul) for w in ({}, {"resident": 0}, MOVING))
        return [output(load_dit(checkpoint, config=CONFIG, dtype=dtype, placement=p)) for p in placements]

    exact = output(load_dit(checkpoint, config=CONFIG))
    found = outputs("8bit", matmul) if matmul else outputs("plain", torch.float32)
    assert all(torch.equal(tensor, found[0]) for tensor in found)
    least = relative_error(outputs("plain", torch.float32)[0], exact) if matmul else 1e-4
    most = {"float8": (0.06, 0.12), "int8": (0.02, 0.05)}[quantize]
    assert least < relative_error(found[0], exact) < most[matmul is not None]


def test_products_in_8_bits_read_float8_of_a_file_as_it_is(plain: WanDiT, tmp_path: Path) -> None:
    path = float8_file(plain, tmp_path / "wan.safetensors")
    placed = load_dit(path, config=CONFIG, placement=Placement(quantize="float8", matmul="8bit"))
    stored, _ = float8_with_scales(original_dit(plain.state_dict()))
    weight = placed.blocks[2].ffn.net[2].weight
    assert torch.equal(weight.view(torch.uint8), stored["blocks.2.ffn.2.weight"].view(torch.uint8))
    assert relative_error(output(placed), output(load_dit(path, config=CONFIG))) < 0.12


@pytest.mark.parametrize(
    "placement", [Placement(resident=0), Placement(quantize="int8"), Placement(quantize="int8", matmul="8bit")], ids=str
)
def test_what_would_cut_parameters_off_their_weights_is_refused(placement: Placement, tmp_path: Path) -> None:
    """Moving, casting, saving and LoRAs are refused; they work where all layers stay as they are."""
    save_file({"blocks.0.attn1.to_q.diff": torch.zeros(48, 48)}, tmp_path / "lora.safetensors")
    lora = LoRA(tmp_path / "lora.safetensors")
    model = random_weights(WanDiT, CONFIG, 1, placement=placement)
    for call in (model.double, model.state_dict, lambda: model.to("cpu", torch.bfloat16)):
        with pytest.raises(RuntimeError, match="streamed or"):
            call()
    with pytest.raises(InputError, match="layers are streamed or in 8 bits; give load_dit the LoRAs instead"):
        merge_loras(model, [lora])
    own = random_weights(WanDiT, CONFIG, 1, placement=Placement())
    assert own.state_dict().keys() == random_weights(WanDiT, CONFIG, 1).state_dict().keys()
    assert own.double().dtype == torch.float64
