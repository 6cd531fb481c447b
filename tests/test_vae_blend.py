"""diffusers' overlap-and-blend tiling, against diffusers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model import InputError, load_vae
from model.vae_blend import BlendAxis, decode_blended, encode_blended, window
from tests.test_vae import VERSIONS, saved_diffusers_vae, statistics
from tests.tolerances import PARITY, relative_error

#: Tile and stride by rows and columns, and the clip's latent frames, all in latent pixels.
TILINGS = {
    "as diffusers' defaults overlap": ((8, 8), (6, 6), (20, 27)),
    "not square, half a tile overlaps": ((6, 10), (3, 7), (13, 19)),
    "no overlap, the last tiles cut off": ((8, 8), (8, 8), (9, 17)),
    "a frame smaller than a tile": ((8, 8), (6, 6), (5, 7)),
    "smaller than a tile in one direction": ((8, 8), (6, 6), (5, 17)),
}


@pytest.mark.parametrize("name", TILINGS)
@pytest.mark.parametrize("version", ["2.1", "2.2"])
def test_equals_diffusers_tiles(version: str, name: str, tmp_path: Path) -> None:
    theirs = saved_diffusers_vae(tmp_path, **VERSIONS[version])
    ours = load_vae(tmp_path)
    mean, std = statistics(theirs)
    scale = ours.config.spatial_stride
    tile, stride = (tuple(scale * n for n in pair) for pair in TILINGS[name][:2])
    rows, columns = TILINGS[name][2]
    latents = torch.randn(1, ours.config.z_dim, 2, rows, columns)
    video = torch.rand(1, 3, 5, rows * scale, columns * scale) * 2 - 1
    theirs.enable_tiling(*tile, *stride)
    with torch.no_grad():
        decoded = theirs.decode(latents * std + mean).sample
        # diffusers' encoder of 2.2 reads tiles in patches of 2 x 2 pixels, and so do we: the same arguments.
        encoded = (theirs.encode(video).latent_dist.mode() - mean) / std
    assert relative_error(decode_blended(ours, latents, tile=tile, stride=stride), decoded) < PARITY
    assert relative_error(encode_blended(ours, video, tile=tile, stride=stride), encoded) < PARITY
    if name != "a frame smaller than a tile":
        # It is the approximation that is reproduced, not the whole frame.
        assert relative_error(ours.decode(latents), decoded) > 100 * PARITY


@pytest.mark.parametrize(("size", "tile", "stride"), [(27, 8, 6), (13, 6, 3), (19, 10, 7), (17, 8, 8), (5, 8, 6)])
def test_weights_add_up_to_one(size: int, tile: int, stride: int) -> None:
    rows, columns = BlendAxis(size, tile, stride), BlendAxis(20, 7, 5)
    total = torch.zeros(size, 20)
    for top in rows.starts:
        for left in columns.starts:
            total[rows.span(top), columns.span(left)] += window(rows, columns, top, left)
    torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize(
    ("tile", "stride", "message"),
    [
        ((20, 16), (16, 16), r"tile: expected two multiples of 8 to decode, got \(20, 16\)"),
        ((16, 16), (0, 16), r"stride: expected two multiples of 8 to decode, got \(0, 16\)"),
        ((32, 32), (8, 32), r"stride: expected tiles to overlap by at most a stride, got tile \(32, 32\)"),
        ((16, 16), (24, 16), r"stride: expected tiles to overlap by at most a stride, got tile \(16, 16\)"),
    ],
)
def test_other_tiles_are_refused(tiny_vae, tile: tuple[int, int], stride: tuple[int, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        decode_blended(tiny_vae, torch.zeros(1, 4, 1, 4, 4), tile=tile, stride=stride)
