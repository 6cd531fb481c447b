"""The VAE equals diffusers' ``AutoencoderKLWan`` on random weights, and streaming equals the whole clip."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan

from model import load_vae
from tests.support.products import half
from tests.support.tolerances import EXACT, PARITY, relative_error

TINY = {"base_dim": 4, "z_dim": 4, "num_res_blocks": 1}
RESIDUAL = {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
#: A stage has two residual blocks in real models, where nothing else is said; tests take half the time with one.
VERSIONS = {
    "2.1": TINY,
    "2.1, two blocks a stage": {"base_dim": 4, "z_dim": 4},
    "2.1, a decoder that widens": TINY | {"dim_mult": [4, 2, 1, 1]},
    "2.1, other temporal stages": TINY | {"temperal_downsample": [True, True, False]},
    "2.2": TINY | RESIDUAL | {"decoder_base_dim": 8, "z_dim": 8},
    "2.2, two blocks a stage": RESIDUAL | {"base_dim": 4, "z_dim": 6},
}


def saved_diffusers_vae(path, **config):
    """Saves and returns a diffusers model with non-trivial norms and statistics, whose output is mostly not clamped."""
    z_dim = config["z_dim"]
    statistics = {"latents_mean": torch.randn(z_dim).tolist(), "latents_std": (0.5 + torch.rand(z_dim)).tolist()}
    model = AutoencoderKLWan(**config, **statistics).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.endswith("gamma"):
                parameter += 0.1 * torch.randn_like(parameter)
        model.decoder.conv_out.weight *= 0.3
    model.save_pretrained(path)
    return model


def statistics(model):
    return (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (model.config.latents_mean, model.config.latents_std)
    )


@pytest.mark.parametrize(("version", "size"), half(VERSIONS, [(2, 9, 3, 2), (1, 1, 2, 3)]), ids=str)
def test_equals_diffusers(version, size, tmp_path):
    batch, num_frames, rows, columns = size
    theirs = saved_diffusers_vae(tmp_path, **VERSIONS[version])
    ours = load_vae(tmp_path)
    mean, std = statistics(theirs)
    stride = ours.config.spatial_stride
    video = torch.rand(batch, 3, num_frames, rows * stride, columns * stride) * 2 - 1
    with torch.no_grad():
        mode = theirs.encode(video).latent_dist.mode()
        assert relative_error(ours.encode(video), (mode - mean) / std) < PARITY
        latents = torch.randn_like(mode)
        expected = theirs.decode(latents * std + mean).sample
    assert (expected.abs() < 1).float().mean() > 0.9
    assert relative_error(ours.decode(latents), expected) < PARITY


@pytest.mark.parametrize(("version", "pieces"), half(VERSIONS, [(1, 1, 1, 1, 1), (3, 2)]), ids=str)
def test_streaming_in_pieces_equals_the_whole_clip(version, pieces, tmp_path):
    """A clip in pieces (counted in latent frames) equals the whole one; in float64 rounding hides no wrong cache."""
    saved_diffusers_vae(tmp_path, **VERSIONS[version])
    vae = load_vae(tmp_path, dtype=torch.float64)
    stride = vae.config.spatial_stride
    latents = torch.randn(1, vae.config.z_dim, 5, 2, 3, dtype=torch.float64)
    video = torch.rand(1, 3, 17, 2 * stride, stride, dtype=torch.float64) * 2 - 1
    frames = [4 * piece - 3 * (i == 0) for i, piece in enumerate(pieces)]
    decoded = list(vae.decode_stream(latents.split(pieces, dim=2)))
    encoded = list(vae.encode_stream(video.split(frames, dim=2)))
    assert [piece.shape[2] for piece in decoded] == frames
    assert [piece.shape[2] for piece in encoded] == list(pieces)
    # The reference is one call over all frames at once, with no cache involved.
    assert relative_error(torch.cat(decoded, dim=2), vae.decode(latents)) < EXACT
    assert relative_error(torch.cat(encoded, dim=2), vae.encode(video)) < EXACT


def test_streams_are_independent_of_each_other(tiny_vae):
    """Two clips decoded in turn equal the same clips one by one: state belongs to a stream, not to the model."""
    first, second = torch.randn(2, 1, 4, 3, 2, 2)
    turns = zip(*(tiny_vae.decode_stream(clip.split(1, dim=2)) for clip in (first, second)), strict=True)
    for clip, pieces in zip((first, second), zip(*turns, strict=True), strict=True):
        assert torch.equal(torch.cat(pieces, dim=2), tiny_vae.decode(clip))


def test_decode_is_clamped(tiny_vae):
    assert tiny_vae.decode(100 * torch.randn(1, 4, 2, 2, 2)).abs().max() == 1


@pytest.mark.parametrize(
    ("part", "shape", "message"),
    [
        ("encode", (1, 3, 6, 16, 16), r"expected 1 \+ 4n frames in this piece, got 6"),
        ("encode", (1, 3, 5, 16, 20), "multiples of 8, got 16 x 20"),
        ("encode", (1, 4, 5, 16, 16), r"expected \[B, 3, F, H, W\]"),
        ("decode", (1, 5, 1, 2, 2), r"latents: expected \[B, 4, T, h, w\]"),
    ],
)
def test_what_does_not_fit_is_named(tiny_vae, part, shape, message):
    with pytest.raises(ValueError, match=message):
        getattr(tiny_vae, part)(torch.zeros(shape))
