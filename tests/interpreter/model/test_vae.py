"""The whole VAE on its kernels: against diffusers, and the same in tiles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model import VAEPlan, load_vae
from swifti2v_kernels.conv.loop import ConvConfig
from tests.model.vae.test_model import VERSIONS, saved_diffusers_vae, statistics
from tests.support.tolerances import KERNEL_PARITY, PARITY, relative_error

SMALL = {
    "2.1": {"dim_mult": [1, 2], "temperal_downsample": [True], "scale_factor_spatial": 2},
    # Its shortcuts without downsampling need as many channels as they make.
    "2.2": {"dim_mult": [1, 2, 2], "temperal_downsample": [True, False], "scale_factor_spatial": 8},
}
SMALL = {
    version: VERSIONS[version] | changes | {"num_res_blocks": 1, "scale_factor_temporal": 2}
    for version, changes in SMALL.items()
}


@pytest.fixture(autouse=True)
def _large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes tiles large: an interpreted program takes milliseconds whatever its size (small: interpreter/conv)."""
    small = ConvConfig.heuristic
    monkeypatch.setattr(ConvConfig, "heuristic", lambda *args: replace(small(*args), block_m=256))


@pytest.mark.parametrize("version", ["2.1", pytest.param("2.2", marks=pytest.mark.slow)])
def test_the_kernels_equal_diffusers(version: str, tmp_path: Path) -> None:
    theirs = saved_diffusers_vae(tmp_path, **SMALL[version])
    ours = load_vae(tmp_path)
    mean, std = statistics(theirs)
    stride = ours.config.spatial_stride
    latents = torch.randn(1, ours.config.z_dim, 2, 1, 2)
    video = torch.rand(1, 3, 5, stride, 2 * stride) * 2 - 1
    with torch.no_grad():
        decoded = theirs.decode(latents * std + mean).sample
        encoded = (theirs.encode(video).latent_dist.mode() - mean) / std
    whole = ours.decode(latents)
    assert relative_error(whole, decoded) < KERNEL_PARITY
    assert relative_error(ours.encode(video), encoded) < KERNEL_PARITY
    # On hardware bit for bit (tests/gpu/test_vae.py); here the order of a row's sums is that of NumPy's matrix product,
    # which for some CPUs depends on where in the block the row lies.
    first = latents[:, :, :1]
    assert relative_error(ours.decode(first, VAEPlan(1, 2, frames=2)), whole[:, :, :1]) < PARITY
