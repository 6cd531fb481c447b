"""The encoder's errors are those of another computation, and activations that float16 cannot hold are seen."""

from __future__ import annotations

import pytest
import torch

from bench.precision.encoder import Largest, encoder_rows, make_video
from model.config import PRESETS
from model.vae.model import WanVAE
from model.weights.load import random_weights
from tests.support.tolerances import PARITY, relative_error

SEED = 3


def vae(scale: float = 1.0) -> WanVAE:
    """Returns a tiny VAE; ``scale`` multiplies what its first convolution writes."""
    made = random_weights(WanVAE, PRESETS["tiny"].vae, SEED)
    made.encoder.conv_in.weight.data.mul_(scale)
    return made


def test_the_encoder_s_errors_are_those_of_another_computation() -> None:
    """The errors are those of direct encodings, and float16, with three bits more than bfloat16, has smaller ones."""
    rows = list(encoder_rows(vae, "tiny", "random", (64, 48)))
    assert [row["form"] for row in rows] == ["bfloat16", "float16", "float32"]
    video = make_video((64, 48))
    assert video.shape == (1, 3, 5, 48, 64)
    assert not torch.equal(video[:, :, 0], video[:, :, 1])
    with torch.no_grad():
        exact = vae().double().encode(video.double())
        for row in rows:
            dtype = getattr(torch, row["form"])
            assert row["error"] == pytest.approx(relative_error(vae().to(dtype).encode(video.to(dtype)), exact))
            assert row["error_ratio"] == pytest.approx(row["error"] / rows[0]["error"])
    assert rows[2]["error"] < PARITY
    assert 0.05 < rows[1]["error_ratio"] < 0.3
    assert len({row["largest_activation"] for row in rows}) == 1
    assert 1 < rows[0]["largest_activation"] < 1000


def test_activations_beyond_float16_are_seen_and_their_size_is_told() -> None:
    brain, half, single = encoder_rows(lambda: vae(1e6), "tiny", "random", (64, 48))
    assert half["status"] == "wrong"
    assert "the VAE's encoder: NaN in latent frame 0" in half["reason"]
    assert "error" in single
    assert "error" in brain
    assert all(row["largest_activation"] > 65504 for row in (single, half, brain))


def test_what_nobody_has_written_is_no_activation() -> None:
    """Memory that is only there, views of it and other dtypes do not count; tensors that are written do."""
    with Largest(torch.float32) as largest:
        room = torch.empty(4)
        torch.ones(4, dtype=torch.float64).mul_(100)
        assert room[1:].view(3).shape == (3,)
        assert largest.value == 0
        room[2:].fill_(-3)
        assert largest.value == 3
        torch.add(torch.ones(4), 1, out=room)
        assert largest.value == 3
        torch.mul(torch.ones(4), 7, out=room)
    assert largest.value == 7
