"""diffusers' VAE layers on the kernels: they are really used, through every state of a cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, WanResidualBlock
from torch import Tensor, nn

from swifti2v_kernels.conv.loop import ConvConfig
from swifti2v_kernels.integrations.patching import apply_patches, plan_patches, restore_module
from swifti2v_kernels.integrations.wan_vae.recipes import RECIPES
from tests.support.operators_called import Operators
from tests.support.tolerances import KERNEL_PARITY, relative_error


@pytest.fixture(autouse=True)
def _large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes tiles large: an interpreted program takes milliseconds whatever its size (small: interpreter/conv)."""
    small = ConvConfig.heuristic
    monkeypatch.setattr(ConvConfig, "heuristic", lambda *args: replace(small(*args), block_m=256))


@torch.no_grad()
def chunks(module: nn.Module, frames: tuple[int, ...], channels: int) -> Tensor:
    """Runs a clip in pieces through one layer, with its cache."""
    generator, slots = torch.Generator().manual_seed(1), [None] * 2
    pieces = []
    for count in frames:
        x = torch.randn(1, channels, count, 4, 6, generator=generator)
        pieces.append(module(x, feat_cache=slots, feat_idx=[0]))
    return torch.cat(pieces, dim=2)


@pytest.mark.parametrize(
    ("module", "frames", "kernels"),
    [
        (lambda: WanResidualBlock(8, 16), (1, 1, 3), {"rms_norm_silu": 3, "causal_conv3d": 9}),
        (lambda: WanResample(8, "upsample3d"), (1, 1, 2), {"causal_conv3d": 4, "upsample_conv2d": 3}),
        (lambda: WanResample(8, "downsample3d"), (1, 4, 2), {"causal_conv3d": 5}),
    ],
    ids=["block with shortcut", "upsample3d", "downsample3d"],
)
def test_the_kernels_equal_the_host(module: Any, frames: tuple[int, ...], kernels: dict[str, int]) -> None:
    module = module()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("gamma"):
                parameter += 0.1 * torch.randn_like(parameter)
    expected = chunks(module, frames, 8)
    patches, _, left = plan_patches("layer", module, RECIPES, {"vae": True})
    assert left == []
    apply_patches(patches)
    with Operators() as used:
        actual = chunks(module, frames, 8)
    restore_module(module)
    assert used.counts == kernels
    assert relative_error(actual, expected) < KERNEL_PARITY
