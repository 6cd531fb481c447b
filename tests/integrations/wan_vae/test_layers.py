"""The Wan VAE of diffusers on our operators: same pictures, same cache, whatever its hooks; and it can be undone.

Weights that offloading moves are really away here: on disk, or on the meta device, until a module is called.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResidualBlock, WanUpsample
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from swifti2v_kernels.integrations.patching import apply_patches, plan_patches, restore_module
from swifti2v_kernels.integrations.recipe import HostChanged
from swifti2v_kernels.integrations.wan_vae import layers as wan_vae_layers
from swifti2v_kernels.integrations.wan_vae.recipes import RECIPES
from tests.integrations.diffusers.test_models import OFFLOADS
from tests.model.vae.test_model import VERSIONS, saved_diffusers_vae
from tests.support.diffusers_models import VERSION
from tests.support.products import half
from tests.support.tolerances import BFLOAT16_MODEL, EXACT, PARITY, relative_error

BOTH = ["2.1", "2.2"]


def patch(root, recipes=RECIPES):
    """Replaces everything, and nothing less."""
    patches, replaced, left = plan_patches("vae", root, recipes, {"vae": True}, "the host")
    assert left == []
    apply_patches((root, patches))
    return {line.host: line.count for line in replaced}


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

    for name in ("causal_conv3d", "upsample_conv2d", "rms_norm_silu", "norm_modulate"):
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
    assert patch(vae)["WanResample"] == 6
    assert_same(coded(vae, video), expected)
    assert min(calls[name] for name in ("causal_conv3d", "upsample_conv2d", "rms_norm_silu", "norm_modulate")) > 0
    assert restore_module(vae).left == []
    calls.clear()
    for ours, theirs in zip(coded(vae, video), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert not calls
    for name, tensor in vae.state_dict().items():
        assert (tensor.data_ptr(), tensor.stride()) == (state[name].data_ptr(), state[name].stride())


@pytest.mark.parametrize("vae", BOTH, indirect=True)
def test_equals_the_host_to_rounding(vae, monkeypatch):
    """The result is the host's in float64, where rounding hides no wrong cache; also if converted once patched."""
    # The host upsamples by way of float32.
    monkeypatch.setattr(WanUpsample, "forward", nn.Upsample.forward)
    video = clip(vae, frames=17).double()
    patch(vae)
    vae.double()
    actual = coded(vae, video)
    restore_module(vae)
    assert_same(actual, coded(vae, video), EXACT)


@pytest.mark.parametrize("coder", ["encoder", "decoder"])
@pytest.mark.parametrize("vae", BOTH, indirect=True)
@torch.no_grad()
def test_the_cache_is_the_hosts(vae, coder):
    """The same slots hold the same frames after every chunk, and either code goes on from the other's cache."""
    module, decodes = getattr(vae, coder), coder == "decoder"
    if decodes:
        chunks = torch.randn(1, vae.config.z_dim, 4, 2, 3).split(1, dim=2)
    else:
        chunks = [torch.randn(1, vae.config.in_channels, frames, 16, 16) for frames in (1, 4, 4)]
    count = sum(isinstance(m, WanCausalConv3d) for m in module.modules())

    def run(ours):
        """Runs the chunks of a clip; ``ours(i)`` says whether our code computes chunk i."""
        slots, outputs, caches = [None] * count, [], []
        for i, chunk in enumerate(chunks):
            if ours(i):
                patch(module)
            feat_idx = [0]
            first = {"first_chunk": i == 0} if decodes else {}
            outputs.append(module(chunk, feat_cache=slots, feat_idx=feat_idx, **first))
            caches.append((feat_idx[0], list(slots)))
            restore_module(module)
        return torch.cat(outputs, dim=2), caches

    expected, their_caches = run(lambda i: False)
    actual, our_caches = run(lambda i: True)
    assert relative_error(actual, expected) < PARITY
    for (our_index, ours), (their_index, theirs) in zip(our_caches, their_caches, strict=True):
        assert our_index == their_index
        for a, b in zip(ours, theirs, strict=True):
            if not isinstance(b, torch.Tensor):
                assert a == b
                continue
            # A slot with a frame less has zeros before it; nothing else is kept alive.
            missing = b.shape[2] - a.shape[2]
            assert relative_error(torch.cat((torch.zeros_like(b[:, :, :missing]), a), dim=2), b) < PARITY
            assert a.untyped_storage().nbytes() == a.numel() * a.element_size()
    for ours in (lambda i: i % 2 == 0, lambda i: i % 2 == 1):
        assert relative_error(run(ours)[0], expected) < PARITY


class Copies(TorchDispatchMode):
    """A mode that counts paddings and concatenations of frames, and the bytes that they have written."""

    def __init__(self):
        super().__init__()
        self.pads, self.cats, self.bytes = 0, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        pads, cats = name == "constant_pad_nd", name == "cat" and result.ndim == 5
        self.pads, self.cats = self.pads + pads, self.cats + cats
        self.bytes += result.numel() * result.element_size() if pads or cats else 0
        return result


@pytest.mark.parametrize("vae", BOTH, indirect=True)
@torch.no_grad()
def test_no_frames_are_padded_or_concatenated_in_replaced_modules(vae, monkeypatch):
    monkeypatch.setattr("swifti2v_kernels.conv.by_torch.SMALL_WEIGHT", 0)  # as with channels of a real size
    latents = torch.randn(1, vae.config.z_dim, 3, 4, 4)

    def copies():
        slots = [None] * 64
        with Copies() as counts:
            for i, frame in enumerate(latents.split(1, dim=2)):
                vae.decoder(frame, feat_cache=slots, feat_idx=[0], first_chunk=i == 0)
        return counts

    before = copies()
    patch(vae)
    after = copies()
    assert before.pads > 60
    assert before.cats > 40
    assert after.pads == 0
    # The decoder's own code around its first convolution: one frame of latents before another.
    assert after.cats == 2
    assert after.bytes < before.bytes / 1000


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
    actual = coded(vae, video)
    blocks = kind in ("model", "blocks")
    # Where each leaf has hooks, residual blocks go the host's way, by the convolutions; these are ours all the same.
    assert (calls["rms_norm_silu"] > 0) == blocks
    assert calls["causal_conv3d"] > 60
    assert restore_module(vae).left == []
    calls.clear()
    assert_same(actual, coded(vae, video))
    assert not calls


@pytest.mark.parametrize(
    "kind", ["SiLU", "Dropout", "ZeroPad2d", "WanUpsample", "Conv2d", "WanRMS_norm", "WanCausalConv3d"]
)
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
    patches, _, left = plan_patches("vae", vae, RECIPES, {"vae": True}, "the host")
    assert [(line.host, line.text) for line in left] == [("WanCausalConv3d", "its forward has been replaced already")]
    apply_patches((vae, patches))
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
        patches, _, left = plan_patches("vae", vae, RECIPES, {"vae": True}, "the host")
        apply_patches((vae, patches))
        assert {(line.host, line.count) for line in left} == {("WanResample", 1), ("WanResidualBlock", 1)}
    actual = coded(vae, video)
    restore_module(vae)
    assert_same(actual, coded(vae, video))


def test_dropout_is_the_hosts_own(tmp_path, calls):
    """Residual blocks that drop go the host's way, and only while they train."""
    vae = saved_diffusers_vae(tmp_path, **VERSIONS["2.1"], dropout=0.2)
    video = clip(vae)
    patch(vae)
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


def _without(name):
    return lambda vae, patch: delattr(vae.encoder.mid_block.resnets[0], name)


def _forward(kind, forward):
    return lambda vae, patch: patch.setattr(kind, "forward", forward)


def _other_padding(vae, monkeypatch):
    for module in vae.modules():
        if isinstance(module, WanCausalConv3d):
            del module._padding


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("conv2"), "WanResidualBlock.*mid_block.resnets.0 has no attribute 'conv2'"),
        (_without("nonlinearity"), "no attribute 'nonlinearity'"),
        (
            _forward(WanResidualBlock, lambda self, x, feat_cache=None, feat_idx=None, chunk=0: x),
            "a parameter 'chunk' in its forward",
        ),
        (_forward(WanCausalConv3d, lambda self, x, cache=None: x), "a parameter 'cache' in its forward"),
        (_other_padding, "WanCausalConv3d.*no attribute '_padding'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_host_that_has_changed_is_named_and_left_whole(vae, change, message, monkeypatch):
    change(vae, monkeypatch)
    with pytest.raises(HostChanged, match=message):
        plan_patches("vae", vae, RECIPES, {"vae": True}, "diffusers 9")
    assert all("forward" not in module.__dict__ for module in vae.modules())


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda block: setattr(block, "nonlinearity", nn.GELU()), "its activation is not SiLU"),
        (lambda block: setattr(block.norm1, "bias", nn.Parameter(torch.ones(16, 1, 1, 1))), "its norm has a bias"),
        (lambda block: setattr(block.conv2, "dilation", (1, 2, 2)), "its convolution has groups, dilation or"),
    ],
)
def test_a_block_that_computes_something_else_is_left_with_the_reason(vae, spoil, reason):
    spoil(vae.decoder.mid_block.resnets[1])
    _, _, left = plan_patches("vae", vae, RECIPES, {"vae": True}, "the host")
    assert any(line.host == "WanResidualBlock" and reason in line.text for line in left)
    assert "vae.decoder.mid_block.resnets.1" in {line.component for line in left}
