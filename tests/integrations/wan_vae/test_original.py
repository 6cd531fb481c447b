"""The Wan VAE under its original names, as in the Wan repositories and in ComfyUI, on our operators.

The stand-ins (tests/support/wan_original.py, tests/support/wan_comfyui.py) are held against diffusers first.
"""

from __future__ import annotations

import sys
from types import MethodType, ModuleType

import pytest
import torch
from torch import nn

from swifti2v_kernels.integrations.patching import restore_module
from tests.integrations.wan_vae.test_layers import calls, clip, patch
from tests.model.vae.test_model import VERSIONS, saved_diffusers_vae
from tests.support.products import half
from tests.support.tolerances import PARITY, relative_error
from tests.support.wan_comfyui import WanVAE
from tests.support.wan_original import WanVAE_, original_state, wan_vae

__all__ = ["calls"]

HOSTS = [("Wan", "2.1"), ("Wan", "2.2"), ("ComfyUI", "2.1"), ("ComfyUI", "2.2")]


@pytest.fixture
def theirs(host, tmp_path):
    """Returns a tiny random diffusers VAE."""
    return saved_diffusers_vae(tmp_path, **VERSIONS[host[1]])


@pytest.fixture
def vae(host, theirs):
    """Returns the same weights in the modules of another host."""
    vae = wan_vae(WanVAE_ if host[0] == "Wan" else WanVAE, **theirs.config)
    vae.load_state_dict(original_state(theirs))
    return vae


@torch.no_grad()
def coded(vae, video):
    latents = vae.encode(video)
    return latents, vae.decode(latents.flip(2))


@pytest.mark.parametrize("host", HOSTS, ids=" ".join)
@pytest.mark.parametrize("frames", [9, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 5, 13))])
@torch.no_grad()
def test_the_stand_in_computes_the_wan_vae(theirs, vae, frames):
    video = clip(theirs, frames, batch=2)
    latents = theirs.encode(video).latent_dist.mode()
    assert relative_error(vae.encode(video), latents) < PARITY
    assert relative_error(vae.decode(latents).clamp(-1, 1), theirs.decode(latents).sample) < PARITY


@pytest.mark.compatibility("VAE encode", "VAE decode", "restore", model="original Wan code", host="stand-in")
@pytest.mark.parametrize(("frames", "host"), half([1, 5, 9, 13], HOSTS), ids=str)
def test_same_pictures_before_and_after_and_identical_when_restored(theirs, vae, frames, calls):
    """Clips whose last chunk is one latent, or two where ComfyUI takes two at a time, come out the same.

    An image has no cache there.
    """
    video = clip(theirs, frames, batch=2)
    expected = coded(vae, video)
    replaced, left = patch(vae)
    assert (replaced["ResidualBlock"], replaced["Resample"]) == (16, 6)
    assert not left
    calls.clear()  # of the trials
    for ours, host in zip(coded(vae, video), expected, strict=True):
        assert relative_error(ours, host) < PARITY
    assert min(calls[name] for name in ("causal_conv3d", "upsample_conv2d", "rms_norm_silu")) > 0
    assert restore_module(vae).left == []
    calls.clear()
    for ours, host in zip(coded(vae, video), expected, strict=True):
        assert torch.equal(ours, host)
    assert not calls


class LendingOps(ModuleType):
    """A stand-in for ComfyUI's way to weights that are elsewhere, and what is on loan."""

    def __init__(self):
        super().__init__("comfy.ops")
        self.lent, self.open = 0, []

    def cast_bias_weight(self, module, input=None, dtype=None, device=None, bias_dtype=None, offloadable=False):
        """Returns the weights in the dtype of the input, and what the loan is given back with."""
        assert offloadable
        loan = object()
        self.lent += 1
        self.open.append(loan)
        return module.weight.to(input.dtype), module.bias.to(input.dtype), loan

    def uncast_bias_weight(self, module, weight, bias, loan):
        """Ends a loan."""
        self.open.remove(loan)


class EarlierOps(ModuleType):
    """ComfyUI's operators of the time before loans had to be given back."""

    def cast_bias_weight(self, module, input=None):
        """Fails the test, since nobody would say when the weights are free again."""
        raise NotImplementedError


@pytest.mark.parametrize("host", HOSTS[2:], ids=" ".join)
def test_weights_that_comfyui_lends_are_borrowed_and_given_back(theirs, vae, monkeypatch, calls):
    """Weights stored in half precision and cast for every call are borrowed, since as stored their dtype is wrong."""
    ops = LendingOps()
    monkeypatch.setitem(sys.modules, "comfy", ModuleType("comfy"))
    monkeypatch.setattr(sys.modules["comfy"], "ops", ops, raising=False)
    monkeypatch.setitem(sys.modules, "comfy.ops", ops)
    convs = [m for m in vae.modules() if isinstance(m, type(vae.encoder.conv_in))]
    for conv in convs:
        conv.half()
        conv.comfy_cast_weights = True
    video = clip(theirs)
    expected = coded(vae, video)
    lent, ops.lent = ops.lent, 0
    patch(vae)
    actual = coded(vae, video)
    assert calls["rms_norm_silu"] > 0
    assert ops.lent == lent
    assert ops.open == []
    for ours, host in zip(actual, expected, strict=True):
        assert relative_error(ours, host) < PARITY


@pytest.mark.parametrize("host", HOSTS[2:3], ids=" ".join)
def test_a_comfyui_that_cannot_lend_weights_computes_itself(theirs, vae, monkeypatch, calls):
    monkeypatch.setitem(sys.modules, "comfy.ops", EarlierOps("comfy.ops"))
    conv = vae.decoder.mid_block.resnets[0].residual[2]
    conv.comfy_cast_weights = True
    monkeypatch.setattr(conv, "compute", MethodType(nn.Conv3d.forward, conv))
    video = clip(theirs)
    expected = coded(vae, video)
    patch(vae)
    for ours, host in zip(coded(vae, video), expected, strict=True):
        assert relative_error(ours, host) < PARITY
    assert calls["rms_norm_silu"] > 0
