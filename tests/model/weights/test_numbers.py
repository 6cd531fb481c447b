"""Numbers that are not finite, or beyond the dtype that they are loaded in, are named as weights are read."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from model import InputError, WanDiT, load_dit
from model.streaming.placement import Placement
from model.weights import load as loading
from model.weights.load import random_weights
from model.weights.scaled import largest
from tests.model.weights.conftest import DIT
from tests.support.lora_spellings import saved
from tests.support.original_names import float8_with_scales, original_dit


def test_scales_of_float8_are_finite_when_they_are_read(state, wan):
    stored, _ = float8_with_scales(state)
    key = "blocks.0.self_attn.q.scale_weight"
    file = wan(stored | {key: torch.full_like(stored[key], math.nan)})
    with pytest.raises(InputError, match=rf"wan\.safetensors: {key} holds NaN or infinity; expected finite numbers"):
        load_dit(file)


def test_what_is_not_finite_is_found_in_every_dtype():
    """The largest number of a tensor is found, and NaN and infinity of either sign at any place, by the bytes of 8."""
    for kind in ("float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64"):
        dtype = getattr(torch, kind)
        whole = torch.linspace(-3, 2, 35).to(dtype).view(5, 7)
        assert largest(whole, "w") == 3
        for value in (math.nan, -math.nan, math.inf, -math.inf):
            if kind == "float8_e4m3fn" and math.isinf(value):  # which has none
                continue
            for place in (0, 17, 34):
                bad = whole.float()
                bad.view(-1)[place] = value
                with pytest.raises(InputError, match=r"^w holds NaN or infinity; expected finite numbers$"):
                    largest(bad.to(dtype), "w")
        ends = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=torch.float64).to(dtype)
        assert largest(ends, "w") == torch.finfo(dtype).max
    assert largest(torch.tensor([-128, 127], dtype=torch.int8), "w") == 128


@pytest.mark.parametrize(
    ("kind", "value"), [("float32", 1e6), ("bfloat16", math.nan), ("float8_e4m3fn", 1e6), ("float8_e5m2", math.inf)]
)
def test_weights_that_are_not_finite_as_they_are_loaded_are_named(kind, value, state, wan):
    """NaN, infinity and what the dtype to load in cannot hold are refused with file and tensor, wherever layers are."""
    scaled = kind.startswith("float8")
    stored = float8_with_scales(state, dtype=getattr(torch, kind))[0] if scaled else state
    key = "blocks.1.cross_attn.o.weight"
    tensor = stored[key].clone() if scaled else stored[key].to(getattr(torch, kind))
    if scaled and value == 1e6:
        stored |= {f"{key.removesuffix('weight')}scale_weight": torch.tensor(1e6)}
    else:
        tensor.view(-1)[77] = value
    file = wan(stored | {key: tensor})
    called = f"{key} times {key.removesuffix('weight')}scale_weight" if scaled else key
    words = rf"wan\.safetensors: {called} holds NaN or infinity"
    if value == 1e6:
        load_dit(file)
        words = (
            rf"wan\.safetensors: {called} holds [\d.e+]+; expected at most 65504 in float16 \(dtype bfloat16 holds it\)"
        )
    for placement in (None, Placement(resident=0, quantize="file"), Placement(quantize="int8")):
        with pytest.raises(InputError, match=words):
            load_dit(file, dtype=torch.float16, placement=placement)
    streamed = load_dit(file, dtype=torch.float16, placement=Placement(resident=0, pinned=0))
    with pytest.raises(InputError, match=words), torch.no_grad():
        streamed(torch.zeros(1, 36, 2, 4, 4), torch.tensor([5.0]), torch.zeros(1, 5, 8))


def test_a_layer_of_a_file_is_checked_in_its_first_pass_alone(tmp_path, monkeypatch):
    """A layer that stays in its file is checked when it is first read, and not in every pass."""
    config = replace(DIT, num_layers=3)  # more than there are slots, in which two would stay
    file = saved(tmp_path / "wan.safetensors", original_dit(random_weights(WanDiT, config, 0).state_dict()))
    model = load_dit(file, placement=Placement(resident=0, pinned=0))
    checks, whole = [], loading.largest
    monkeypatch.setattr(loading, "largest", lambda *given: checks.append(given) or whole(*given))
    counts = []
    for _ in range(2):
        with torch.no_grad():
            model(torch.zeros(1, 36, 2, 4, 4), torch.tensor([5.0]), torch.zeros(1, 5, 8))
        counts.append(len(checks))
    assert counts[0] == counts[1] > 3 * 20
