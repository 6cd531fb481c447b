"""The Wan VAE of diffusers on our operators: same pictures, same cache, whatever its hooks; and it can be undone.

Weights that offloading moves are really away here: on disk, or on the meta device, until a module is called.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from swifti2v_kernels.integrations.patching import plan_patches, restore_module
from swifti2v_kernels.integrations.probing import DIFFERS
from swifti2v_kernels.integrations.wan_vae import layers as wan_vae_layers
from swifti2v_kernels.integrations.wan_vae.recipes import RECIPES
from tests.integrations.diffusers.test_models import OFFLOADS
from tests.model.vae.test_model import VERSIONS, saved_diffusers_vae
from tests.support.diffusers_models import VERSION
from tests.support.products import half
from tests.support.tolerances import BFLOAT16_MODEL, PARITY, relative_error

BOTH = ["2.1", "2.2"]


def patch(root):
    """Replaces everything that is known; returns how many of each kind, and why others are left."""
    patches, replaced, left = plan_patches("vae", root, RECIPES, {"vae": True})
    for each in patches:
        each.apply()
    return {line.host: line.count for line in replaced}, {line.host: (line.count, line.text) for line in left}


@pytest.fixture
def vae(request, tmp_path):
    """Returns a tiny random diffusers VAE of the version asked for (2.1)."""
    return saved_diffusers_vae(tmp_path, **VERSIONS[getattr(request, "param", "2.1")])


@pytest.fixture
def calls(monkeypatch):
    """Returns how often each operator was called for a layer of the host."""
    counts = Counter()

    def counted(name, operator):
        def call(*args, **kwargs):
            counts[name] += 1
            return operator(*args, **kwargs)

        return call

    for name in ("causal_conv3d", "upsample_conv2d", "rms_norm_silu"):
        monkeypatch.setattr(wan_vae_layers, name, counted(name, getattr(wan_vae_layers, name)))
    return counts


def clip(vae, frames=9, rows=2, columns=3, batch=1):
    stride = vae.config.scale_factor_spatial
    return torch.rand(batch, 3, frames, rows * stride, columns * stride) * 2 - 1


@torch.no_grad()
def coded(vae, video):
    """Returns latents of the video, and the video that other latents decode to."""
    latents = vae.encode(video).latent_dist.mode()
    return latents, vae.decode(latents.flip(2)).sample


def assert_same(actual, expected, tolerance=PARITY):
    for ours, theirs in zip(actual, expected, strict=True):
        assert relative_error(ours, theirs) < tolerance


@pytest.mark.compatibility("VAE encode", "VAE decode", "restore", model="Wan VAE {vae}")
@pytest.mark.parametrize(("vae", "tiles"), half(BOTH, [False, True]), indirect=["vae"], ids=str)
def test_same_pictures_before_and_after_and_identical_when_restored(vae, tiles, calls):
    """Batches of two and three chunks of a clip give the same pictures; the weights stay the same tensors."""
    if tiles and vae.config.patch_size is not None and VERSION < (0, 36):
        pytest.skip("diffusers before 0.36 cannot tile the 2.2 VAE")
    stride = vae.config.scale_factor_spatial
    if tiles:
        vae.enable_tiling(2 * stride, 2 * stride, stride, stride)
    video, state = clip(vae, batch=2), vae.state_dict()
    expected = coded(vae, video)
    replaced, left = patch(vae)
    assert replaced["WanResample"] == 6
    assert not left
    calls.clear()  # of the trials
    assert_same(coded(vae, video), expected)
    assert min(calls[name] for name in ("causal_conv3d", "upsample_conv2d", "rms_norm_silu")) > 0
    assert restore_module(vae).left == []
    calls.clear()
    for ours, theirs in zip(coded(vae, video), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert not calls
    for name, tensor in vae.state_dict().items():
        assert (tensor.data_ptr(), tensor.stride()) == (state[name].data_ptr(), state[name].stride())


def cast_by_layers(vae, folder):
    vae.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


HOOKS = {kind: offload for kind, (offload, _) in OFFLOADS.items()} | {"layerwise casting": cast_by_layers}


@pytest.mark.compatibility("model offload", "sequential offload", "group offload", model="Wan VAE 2.1")
@pytest.mark.parametrize(("kind", "first"), half(HOOKS, ["patched first", "offloaded first"]))
def test_hooks_may_come_before_or_after(vae, kind, first, tmp_path, calls):
    video = clip(vae)
    if first == "patched first":
        patch(vae)
    HOOKS[kind](vae, str(tmp_path))
    if first == "offloaded first":
        patch(vae)
    calls.clear()  # of the trials
    actual = coded(vae, video)
    blocks = kind in ("model", "blocks")
    # Where each leaf has hooks, residual blocks go the host's way, by the convolutions; these are ours all the same.
    assert (calls["rms_norm_silu"] > 0) == blocks
    assert calls["causal_conv3d"] > 60
    assert restore_module(vae).left == []
    calls.clear()
    assert_same(actual, coded(vae, video))
    assert not calls


@pytest.mark.parametrize("kind", ["SiLU", "WanUpsample", "WanCausalConv3d"])
def test_hooks_on_what_a_layer_holds_run(vae, kind):
    video = clip(vae)
    hooks = [m.register_forward_hook(lambda _, args, out: 1.1 * out) for m in vae.modules() if type(m).__name__ == kind]
    assert hooks
    expected = coded(vae, video)
    patch(vae)
    assert_same(coded(vae, video), expected)


def test_a_forward_that_somebody_else_has_replaced_is_called(vae):
    """A replaced forward is left and named for itself, and not read past by the residual block around it."""
    video, conv = clip(vae), vae.decoder.up_blocks[0].resnets[0].conv1
    conv.forward = lambda x, cache_x=None: type(conv).forward(conv, x, cache_x) + 1
    expected = coded(vae, video)
    assert patch(vae)[1] == {"WanCausalConv3d": (1, "its forward has been replaced already")}
    assert_same(coded(vae, video), expected)


class Adapter(nn.Module):
    """A module such as adapters make: it shows the weight of the layer in it, and computes more."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, *args):
        return self.base(*args) + 1


@pytest.mark.parametrize("first", ["patched first", "adapted first"])
def test_adapters_in_place_of_a_convolution_are_called(vae, first):
    video, block, upsampler = clip(vae), vae.decoder.mid_block.resnets[0], vae.decoder.up_blocks[0].upsamplers[0]
    if first == "patched first":
        patch(vae)
    block.conv1, upsampler.resample[1] = Adapter(block.conv1), Adapter(upsampler.resample[1])
    if first == "adapted first":
        left = patch(vae)[1]
        assert {host: count for host, (count, _) in left.items()} == {"WanResample": 1, "WanResidualBlock": 1}
    actual = coded(vae, video)
    restore_module(vae)
    assert_same(actual, coded(vae, video))


def test_dropout_is_the_hosts_own(tmp_path, calls):
    """Residual blocks that drop go the host's way, and only while they train."""
    vae = saved_diffusers_vae(tmp_path, **VERSIONS["2.1"], dropout=0.2)
    video = clip(vae)
    patch(vae)
    calls.clear()  # of the trials
    vae.train()
    assert relative_error(coded(vae, video)[0], coded(vae, video)[0]) > 0.05
    assert not calls["rms_norm_silu"]
    vae.eval()
    assert torch.equal(coded(vae, video)[0], coded(vae, video)[0])
    assert calls["rms_norm_silu"]


@pytest.mark.parametrize("vae", BOTH, indirect=True)
def test_gradients_are_the_hosts(vae):
    """Gradients of the input and of every weight that a decoder reads are the host's, over three chunks."""
    latents = torch.randn(1, vae.config.z_dim, 3, 2, 2, requires_grad=True)
    weights = list(vae.decoder.parameters())

    def gradients():
        y = vae.decode(latents).sample
        return torch.autograd.grad((y * torch.linspace(0, 1, y.numel()).view(y.shape)).sum(), [latents, *weights])

    expected = gradients()
    patch(vae)
    assert_same(gradients(), expected, 10 * PARITY)


def test_autocast_computes_and_returns_what_the_host_does(vae):
    """float32 weights under bfloat16 autocast, the original code's way to run in 16 bits, give the host's dtypes."""
    video = clip(vae)
    with torch.autocast("cpu", torch.bfloat16):
        expected = coded(vae, video)
    exact = coded(vae, video)
    patch(vae)
    with torch.autocast("cpu", torch.bfloat16):
        actual = coded(vae, video)
    for ours, theirs, true in zip(actual, expected, exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, true) < max(BFLOAT16_MODEL, 1.5 * relative_error(theirs, true))


@pytest.mark.slow
@pytest.mark.compatibility("torch.compile", model="Wan VAE 2.1")
def test_compiles_without_a_graph_break(vae):
    """Residual blocks and an ``upsample3d`` compile without a break, over the three states of a cache."""
    patch(vae)
    stage = vae.decoder.up_blocks[0]
    inputs = torch.randn(3, 1, stage.in_dim, 1, 2, 2)

    @torch.no_grad()
    def run(module):
        slots: list[Any] = [None] * 7
        return torch.cat([module(x, feat_cache=slots, feat_idx=[0]) for x in inputs], dim=2)

    expected = run(stage)
    assert expected.shape[2] == 1 + 2 + 2
    assert relative_error(run(torch.compile(stage, backend="eager", fullgraph=True)), expected) < PARITY


@pytest.mark.parametrize(
    "spoil",
    [
        lambda block: setattr(block, "nonlinearity", nn.GELU()),
        lambda block: setattr(block.norm1, "bias", nn.Parameter(torch.ones(16, 1, 1, 1))),
        lambda block: delattr(block, "conv2"),
    ],
)
def test_a_block_that_computes_something_else_is_left_with_the_reason(vae, spoil):
    spoil(vae.decoder.mid_block.resnets[1])
    lost = "its forward could not be tried: AttributeError: 'WanResidualBlock' object has no attribute 'conv2'"
    assert patch(vae)[1]["WanResidualBlock"] in {(1, DIFFERS), (1, lost)}
