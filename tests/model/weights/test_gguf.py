"""GGUF: what ComfyUI-GGUF and its kin write loads, its blocks multiplied out; what cannot be is refused in one line."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import save_file

from model import DiTConfig, InputError, LoRA, WanDiT, load_dit
from model.streaming.placement import Placement
from model.weights.files import open_weights
from model.weights.load import inspect_weights, random_weights
from tests.support.lora_spellings import saved
from tests.support.original_names import original_dit

CONFIG = DiTConfig(num_heads=2, num_layers=1, ffn_dim=256, in_channels=36, text_dim=256, freq_dim=256)
MATRIX = "blocks.0.self_attn.q.weight"
#: A type for each kind of tensor of a file, as published files mix them.
MIXED = ("Q4_K", "Q6_K", "Q8_0", "Q5_0", "Q2_K", "Q3_K", "Q5_K", "IQ4_XS", "Q4_1", "BF16", "F16")


def blocks(kind, rows, columns, seed=0):
    """Returns random blocks of a type, ``[rows, bytes]``, whose scales in float16 are small normal numbers."""
    size, nbytes = gguf.GGML_QUANT_SIZES[Kind[kind]]
    drawn = np.random.default_rng(seed).integers(0, 256, (rows, columns // size, nbytes), dtype=np.uint8)
    places = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}
    for at in places.get(kind, (0, 2) if kind.endswith("_1") else (0,)):
        drawn[:, :, at + 1] = 0x18 + drawn[:, :, at + 1] % 8
    return drawn.reshape(rows, -1)


def write(path, tensors, arch="wan", shapes=None, **more):
    """Writes ``{name: (array, type)}``; ``shapes`` are those that ComfyUI-GGUF keeps in the header."""
    writer = gguf.GGUFWriter(path, arch)
    for name, shape in (shapes or {}).items():
        writer.add_array(f"comfy.gguf.orig_shape.{name}", list(shape))
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=Kind[kind])
    for key, value in more.items():
        writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def plain(state):
    return {name: (tensor.contiguous().numpy(), "F32") for name, tensor in state.items()}


@pytest.fixture(scope="module")
def state():
    return original_dit(random_weights(WanDiT, CONFIG, 0).state_dict())


def test_blocks_are_the_numbers_of_their_formula(state, tmp_path):
    """A matrix in blocks is what the formula of Q8_0, written down anew, makes of every block."""
    packed = blocks("Q8_0", 256, 256)
    file = write(tmp_path / "wan.gguf", plain(state) | {MATRIX: (packed, "Q8_0")})
    numbers = []
    for data in packed.reshape(-1, 34):
        scale, *values = struct.unpack("<e32b", bytes(data))
        numbers += [scale * value for value in values]
    read = load_dit(file).blocks[0].attn1.to_q.weight
    assert torch.equal(read, torch.tensor(numbers).reshape(256, 256))
    assert torch.equal(load_dit(file, dtype=torch.bfloat16).blocks[0].attn1.to_q.weight, read.bfloat16())


def test_a_file_of_many_types_loads_streams_and_is_inspected(state, tmp_path, inspected):
    """Every type gives what the package makes of it, in rows too, in a model that streams, and beneath a LoRA."""
    matrices = [name for name, tensor in state.items() if tensor.ndim == 2 and name.startswith("blocks")]
    kinds = {name: MIXED[i % len(MIXED)] for i, name in enumerate(matrices)}
    packed = {}
    for name, kind in kinds.items():
        direct = kind in ("BF16", "F16")
        array = gguf.quants.quantize(state[name].numpy(), Kind[kind]) if direct else blocks(kind, *state[name].shape)
        packed[name] = array, kind
    write(tmp_path / "wan.gguf", plain(state) | packed)
    meant = state | {name: torch.from_numpy(gguf.quants.dequantize(*x[:1], Kind[x[1]])) for name, x in packed.items()}
    file = open_weights(tmp_path / "wan.gguf").tensors
    for name in matrices:
        assert torch.equal(file[name].read_rows(3, 5).float(), meant[name][3:5])
    loaded = load_dit(tmp_path / "wan.gguf")
    assert all(torch.equal(tensor, meant[name]) for name, tensor in original_dit(loaded.state_dict()).items())
    save_file({name: tensor.contiguous() for name, tensor in meant.items()}, tmp_path / "same.safetensors")
    factors = {f"diffusion_model.{MATRIX}".replace("weight", f"lora_{side}.weight"): torch.ones(size) / 9
               for side, size in (("down", (2, 256)), ("up", (256, 2)))}  # fmt: skip
    lora = LoRA(saved(tmp_path / "lora.safetensors", factors))
    given, expected = (load_dit(tmp_path / name, loras=[lora]) for name in ("wan.gguf", "same.safetensors"))
    same = zip(given.state_dict().values(), expected.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    placed = load_dit(tmp_path / "wan.gguf", placement=Placement(resident=0, pinned=0))
    given = torch.randn(1, 36, 2, 4, 4), torch.tensor([5.0]), torch.randn(1, 5, 256)
    with torch.no_grad():
        assert torch.equal(placed(*given), loaded(*given))
    code, printed = inspected(tmp_path / "wan.gguf")
    (report,) = printed["checkpoints"]
    assert (code, report["kind"], report["loaded_by"]) == (0, "Wan DiT", "load_dit")
    counts = {kind: list(kinds.values()).count(kind) for kind in MIXED if kind not in ("BF16", "F16")}
    assert {kind: report["dtypes"][kind] for kind in counts} == {kind: count for kind, count in counts.items() if count}
    assert report["bytes"] == sum(array.nbytes for array, _ in (plain(state) | packed).values())
    assert report["parameters"] == sum(tensor.numel() for tensor in state.values())


SQUEEZED = "head.modulation"


@pytest.mark.parametrize(
    ("way", "prefix"),
    [
        ("five sizes", ""),
        ("as the header says", "model.diffusion_model."),
        ("flat", ""),
        ("four sizes", "model.diffusion_model."),
        ("a row a filter", ""),
        ("in blocks", ""),
    ],
)
def test_patch_embeddings_and_tables_have_their_shapes_again(way, prefix, state, tmp_path):
    """A patch embedding that was stored flat, and tables without their leading one, have their shapes again."""
    name, tensors = "patch_embedding.weight", plain(state)
    whole = state[name].numpy()
    tensors[name] = (
        {
            "five sizes": whole,
            "as the header says": whole.reshape(-1, 256),
            "flat": whole.reshape(-1),
            "four sizes": whole.reshape(-1, *whole.shape[2:]),
            "a row a filter": whole.reshape(256, -1),
            "in blocks": gguf.quants.quantize(whole.reshape(-1, 256), Kind.Q8_0),
        }[way],
        "Q8_0" if way == "in blocks" else "F32",
    )
    tensors[SQUEEZED] = state[SQUEEZED][0].numpy(), "F32"
    shapes = {prefix + name: whole.shape} if way in ("as the header says", "in blocks") else {}
    file = write(tmp_path / "wan.gguf", {prefix + key: value for key, value in tensors.items()}, "pig", shapes)
    loaded = original_dit(load_dit(file).state_dict())
    assert torch.equal(loaded[SQUEEZED], state[SQUEEZED])
    error = (loaded[name] - state[name]).abs().max()
    assert error <= (state[name].abs().max() / 250 if way == "in blocks" else 0)
    first = open_weights(file).tensors[prefix + name].read_rows(3, 5)
    assert torch.equal(first, loaded[name][3:5])


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()


def header(values=(), tensors=(), counts=None, version=3, end=b""):
    """Returns the bytes of a GGUF file of these values and tensors, whose counts may lie."""
    counts = counts or (len(tensors), len(values))
    start = b"GGUF" + struct.pack("<IQQ", version, *counts)
    return start + b"".join(string(key) + value for key, value in values) + b"".join(tensors) + end


def tensor(name, sizes, kind=0, offset=0):
    return string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


SHAPE = "comfy.gguf.orig_shape.a"
HOSTILE = {
    "four letters": b"GGUF",
    "another byte order": header(version=3 << 24),
    "endless tensors": header(counts=(2**63, 0)),
    "an endless array": header([("a", struct.pack("<IIQ", 9, 4, 2**60))], end=bytes(64)),
    "arrays in arrays": header([("a", struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000)], end=bytes(64)),
    "an unknown type": header(tensors=[tensor("a", [4], 999)], end=bytes(64)),
    "huge sizes": header(tensors=[tensor("a", [2**62, 2**62])], end=bytes(64)),
    "a far offset": header(tensors=[tensor("a", [4], 0, 2**63)], end=bytes(64)),
    "twice": header(tensors=[tensor("a", [4])] * 2, end=bytes(64)),
    "an odd name": header(tensors=[tensor("a\x1b[2J", [4])], end=bytes(64)),
    "another shape": header([(SHAPE, struct.pack("<IIQ2i", 9, 5, 2, 2, 3))], [tensor("a", [4])], end=bytes(64)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_headers_are_refused_at_once(kind, tmp_path, inspected):
    """A header that claims more than the file has is refused in one line, before anything of that size is made."""
    file = tmp_path / "wan.gguf"
    file.write_bytes(HOSTILE[kind])
    words = "expected printable characters" if kind == "an odd name" else "is not a readable GGUF file"
    with pytest.raises(InputError, match=words) as error:
        load_dit(file)
    assert str(file) in str(error.value)
    assert str(error.value).isprintable()
    assert inspected(file)[0] == 2


def test_a_truncated_file_is_refused_when_it_is_opened(state, tmp_path):
    file = write(tmp_path / "wan.gguf", plain(state))
    whole = file.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 2000, 30):
        file.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"wan\.gguf is not a readable GGUF file: it ends at"):
            inspect_weights(file, WanDiT)


def test_integers_and_types_without_a_formula_are_named(state, tmp_path, monkeypatch):
    matrix = np.zeros((256, 256), np.int8)
    file = write(tmp_path / "wan.gguf", plain(state) | {MATRIX: (matrix, "I8")})
    with pytest.raises(InputError, match=f"int8 without a scale in {MATRIX.removesuffix('.weight')};"):
        load_dit(file)
    write(file, plain(state) | {MATRIX: (np.zeros((256, 292), np.uint8), "Q8_K")})
    with pytest.raises(InputError, match=f"'{MATRIX}' is Q8_K, which the package gguf does not multiply out"):
        load_dit(file)
