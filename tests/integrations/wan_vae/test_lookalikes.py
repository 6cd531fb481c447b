"""Modules that only look like the Wan VAE's are left and named; and to find them out changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from swifti2v_kernels.common.dispatch import default_backend
from swifti2v_kernels.integrations.patching import plan_patches
from swifti2v_kernels.integrations.wan import accelerate, restore
from swifti2v_kernels.integrations.wan_vae.recipes import ORIGINAL_RECIPES
from tests.support.products import half
from tests.support.tolerances import PARITY, relative_error
from tests.support.wan_lookalikes import LOOKALIKES, DiffSynthVAE, imitate, needs_a_gpu, scaled_branch
from tests.support.wan_original import CausalConv3d, Resample, ResidualBlock, RMS_norm, WanVAE_

LAYOUT = 4, 4, 4, [1, 2], 1, [True]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@torch.no_grad()
def coded(vae: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = vae.encode(torch.randn(1, 3, 5, 8, 8, generator=generator))
    video = vae.decode(torch.randn(1, 4, 3, 4, 4, generator=generator))
    return torch.cat([latents.flatten(), video.flatten()])


def plan(root: nn.Module) -> tuple[dict[str, int], dict[str, str]]:
    """Returns how many modules of each kind are to be replaced, and why others are left."""
    _, replaced, left = plan_patches("vae", root, ORIGINAL_RECIPES, {"vae": True}, "the host")
    return {line.host: line.count for line in replaced}, {line.host: line.text for line in left}


def test_diffsynth_studios_layers_are_left_and_it_codes_as_before():
    vae = DiffSynthVAE(*LAYOUT).eval()
    expected = coded(vae)
    for dry_run in (True, False):
        report = accelerate(vae, dry_run=dry_run)
        text = "its forward returns something else: a tuple of 3, not a tensor"
        assert {(line.host, line.text) for line in report.left} == {("ResidualBlock", text), ("Resample", text)}
        assert {line.host for line in report.replaced} == {"CausalConv3d", "RMS_norm"}
        assert relative_error(coded(vae), expected) < PARITY
    restore(vae)
    assert torch.equal(coded(vae), expected)


@pytest.mark.parametrize("forward", half(LOOKALIKES), ids=lambda forward: forward.__name__)
def test_a_lookalike_is_left_with_the_reason_and_computes_as_before(forward):
    """The residual block and whatever else calls the imitated module is left too, and the rest is replaced."""
    vae, (kind, reason) = WanVAE_(*LAYOUT, False).eval(), LOOKALIKES[forward]
    imitate(vae, kind, forward)
    expected = None if forward is needs_a_gpu else coded(vae)
    report = accelerate(vae)
    texts = [line.text for line in report.left if line.host == kind]
    assert texts
    assert all(text.startswith(reason) for text in texts)
    assert report.replaced
    if expected is not None:
        assert relative_error(coded(vae), expected) < PARITY


def test_a_method_that_somebody_put_into_one_module_is_tried():
    """Nodes for seamless pictures replace the method by which a convolution pads."""
    vae = WanVAE_(*LAYOUT, False).eval()
    layer = next(m for m in vae.modules() if getattr(m, "mode", None) == "downsample3d")

    def wrapped(self, x, weight, bias):
        return nn.Conv2d._conv_forward(self, x.roll(1, dims=-1), weight, bias)

    layer.resample[1]._conv_forward = wrapped.__get__(layer.resample[1])
    expected = coded(vae)
    report = accelerate(vae)
    assert [(line.host, line.count) for line in report.left] == [("Resample", 1)]
    assert relative_error(coded(vae), expected) < PARITY


class Weight(torch.Tensor):
    """A tensor such as quantised weights are: of a class of its own, which computes nothing here."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ in ("__get__", "detach", "requires_grad_", "numel", "is_floating_point"):
            return super().__torch_function__(func, types, args, kwargs)
        raise NotImplementedError(func)


def zero(layers: nn.Module) -> None:
    for p in layers.parameters():
        nn.init.zeros_(p)


def quantised(layers: nn.Module) -> None:
    for conv in layers.modules():
        if isinstance(conv, CausalConv3d):
            conv.weight = nn.Parameter(conv.weight.detach().as_subclass(Weight), requires_grad=False)


WEIGHTS = {
    "meta": lambda layers: layers.to("meta"),
    "float16": lambda layers: layers.half(),
    "float8": lambda layers: layers.to(torch.float8_e4m3fn),
    "zero": zero,
    "quantised": quantised,
}


@pytest.mark.parametrize("weights", WEIGHTS)
def test_whatever_weights_a_layer_has_its_code_is_tried(weights):
    layers, lookalikes = (nn.ModuleList([ResidualBlock(4, 8), Resample(8, "upsample3d", 4)]) for _ in range(2))
    imitate(lookalikes, "ResidualBlock", scaled_branch)
    WEIGHTS[weights](layers)
    WEIGHTS[weights](lookalikes)
    assert plan(layers) == ({"ResidualBlock": 1, "Resample": 1, "CausalConv3d": 4, "RMS_norm": 2}, {})
    assert plan(lookalikes)[1] == {"ResidualBlock": "its forward returns something else: other values"}


@pytest.mark.parametrize(
    "context",
    [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.device("meta")],
    ids=["inference", "autocast", "meta"],
)
def test_whatever_the_caller_has_set_the_same_is_replaced(context):
    vae = WanVAE_(*LAYOUT, True)
    expected = plan(vae)
    with context():
        assert plan(vae) == expected
    assert not expected[1]


def test_sizes_of_channels_alone_are_no_other_form():
    """A VAE of real size, whose weights are not even there, is tried by the same few channels."""
    with torch.device("meta"):
        vae = WanVAE_(96, 96, 16, [1, 2, 4, 4], 2, [False, True, True], False)
    replaced, left = plan(vae)
    assert not left
    assert (replaced["ResidualBlock"], replaced["Resample"]) == (24, 6)


def test_a_trial_leaves_no_trace():
    """No hook runs, and weights, gradients, attributes, flags, random numbers and settings are what they were."""
    vae = WanVAE_(*LAYOUT, False).train()

    def refuse(*args: Any) -> None:
        raise AssertionError("a hook ran")

    def noting(self, x):
        self.notes.append(torch.rand(1))
        return RMS_norm.forward(self, x)

    imitate(vae, "RMS_norm", noting)
    for module in vae.modules():
        module.notes = [1]
        module.register_forward_pre_hook(refuse)
        module.register_forward_hook(refuse)
    for p in vae.parameters():
        p.grad = torch.ones_like(p)
    before = [dict(vars(module)) for module in vae.modules()]
    shallow = [{k: copy.copy(v) for k, v in vars(m).items() if isinstance(v, (list, dict))} for m in vae.modules()]
    versions = [(p._version, p.grad._version, p.requires_grad) for p in vae.parameters()]
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    plan(vae)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (torch.get_num_threads(), default_backend(), torch.is_grad_enabled()) == (threads, "auto", True)
    assert [(p._version, p.grad._version, p.requires_grad) for p in vae.parameters()] == versions
    for module, attributes, containers in zip(vae.modules(), before, shallow, strict=True):
        assert vars(module) == attributes
        assert {k: v for k, v in vars(module).items() if k in containers} == containers


def test_modules_with_equal_twins_are_tried_once(monkeypatch):
    calls, forward = [], Resample.forward

    def counted(self, x, feat_cache=None, feat_idx=[0]):  # noqa: B006
        calls.append(x)
        return forward(self, x, feat_cache, feat_idx)

    monkeypatch.setattr(Resample, "forward", counted)
    assert plan(nn.ModuleList([Resample(16, "upsample2d", 8)]))[0] == {"Resample": 1}
    once = len(calls)
    assert plan(nn.ModuleList(Resample(n, "upsample2d", n // 2) for n in (16, 32, 48)))[0] == {"Resample": 3}
    assert len(calls) == 2 * once


#: A kind, and inputs for which it computes something else.
RARE = {
    "one frame": ("CausalConv3d", lambda x: x.shape[2] == 1),
    "four frames": ("CausalConv3d", lambda x: x.shape[2] == 4),
    "one entry": ("CausalConv3d", lambda x: len(x) == 1),
    "float32": ("CausalConv3d", lambda x: x.dtype == torch.float32),
    "8 columns": ("CausalConv3d", lambda x: x.shape[-1] >= 8),
    "norm of one frame": ("RMS_norm", lambda x: x.ndim == 5 and x.shape[2] == 1),
    "layer of one frame": ("ResidualBlock", lambda x, cache=None, index=None: cache is None and x.shape[2] == 1),
    "layer of three frames": ("ResidualBlock", lambda x, cache=None, index=None: x.shape[2] == 3),
    "chunk of four frames": ("ResidualBlock", lambda x, cache=None, index=None: cache and x.shape[2] == 4),
    "cached entry": ("ResidualBlock", lambda x, cache=None, index=None: cache and len(x) == 1),
}
KINDS = {kind.__name__: kind for kind in (CausalConv3d, RMS_norm, ResidualBlock)}


@pytest.mark.parametrize("case", half(RARE))
def test_what_differs_for_some_inputs_alone_is_found_out(case):
    kind, rare = RARE[case]

    def forward(self, x, *others):
        y = KINDS[kind].forward(self, x, *others)
        return 0.9 * y if rare(x, *others) else y

    def of_layer(self, x, feat_cache=None, feat_idx=[0]):  # noqa: B006
        return forward(self, x, feat_cache, feat_idx)

    def of_conv(self, x, cache_x=None):
        y = CausalConv3d.forward(self, x, cache_x)
        return 0.9 * y if rare(x) else y

    def of_norm(self, x):
        return forward(self, x)

    layers = nn.ModuleList([ResidualBlock(4, 8)])
    imitate(layers, kind, {"ResidualBlock": of_layer, "CausalConv3d": of_conv, "RMS_norm": of_norm}[kind])
    assert plan(layers)[1][kind] == "its forward returns something else: other values"


def test_a_layer_that_changes_its_input_is_left():
    def forward(self, x, feat_cache=None, feat_idx=[0]):  # noqa: B006
        y = ResidualBlock.forward(self, x, feat_cache, feat_idx)
        x.zero_()
        return y

    layers = nn.ModuleList([ResidualBlock(4, 8)])
    imitate(layers, "ResidualBlock", forward)
    text = "its forward leaves what it is given in another state: other values"
    assert plan(layers)[1] == {"ResidualBlock": text}


def test_values_of_integers_and_modes_are_other_forms():
    def forward(self, x, feat_cache=None, feat_idx=[0]):  # noqa: B006
        y = ResidualBlock.forward(self, x, feat_cache, feat_idx)
        return 0.5 * y if self.flag or self.training else y

    layers = nn.ModuleList(ResidualBlock(4, 8) for _ in range(3)).eval()
    imitate(layers, "ResidualBlock", forward)
    for i, layer in enumerate(layers):
        layer.register_buffer("flag", torch.tensor(i % 2))
    layers[2].train()
    replaced, left = plan(layers)
    assert replaced["ResidualBlock"] == 1
    assert left == {"ResidualBlock": "its forward returns something else: other values"}


def test_dropout_of_a_layer_in_training_is_no_difference():
    assert not plan(nn.ModuleList([ResidualBlock(4, 8, dropout=0.5)]).train())[1]


def test_what_cannot_be_looked_at_is_left_with_the_reason():
    class RMS_norm(nn.Module):
        """The norm of ComfyUI's refiner VAE of HunyuanVideo has no more attributes."""

        def __init__(self):
            super().__init__()
            self.scale, self.gamma = 2.0, nn.Parameter(torch.ones(4, 1, 1, 1))

        def forward(self, x):
            return nn.functional.normalize(x, dim=1) * self.scale * self.gamma

    class Broken(RMS_norm):
        scale = property(lambda self: self.nothing, lambda self, value: None)

    Broken.__name__ = "RMS_norm"
    assert plan(nn.ModuleList([RMS_norm()])) == ({"RMS_norm": 1}, {})
    broken = Broken()
    broken.gamma = None
    Broken.gamma = property(lambda self: 1 / 0)
    del broken._parameters["gamma"]
    assert plan(nn.ModuleList([broken]))[1] == {
        "RMS_norm": "it could not be looked at: ZeroDivisionError: division by zero"
    }


def test_integer_weights_are_named():
    layers = nn.ModuleList([ResidualBlock(4, 8)])
    for conv in layers.modules():
        if isinstance(conv, CausalConv3d):
            conv.weight = nn.Parameter(conv.weight.detach().to(torch.int8), requires_grad=False)
    assert plan(layers)[1] == {"ResidualBlock": "integer weights", "CausalConv3d": "integer weights"}


class Halved(nn.Module):
    """Wraps a norm and has its weight."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.gamma = norm, norm.gamma

    def forward(self, x):
        return 0.5 * self.norm(x)


class Adapted(CausalConv3d):
    def forward(self, x, cache_x=None):
        return 1.5 * super().forward(x, cache_x)


def adapt(parts: nn.Sequential) -> None:
    parts[6].__class__ = Adapted


def pad_otherwise(parts: nn.Sequential) -> None:
    parts[6]._conv_forward = lambda x, *others: nn.Conv3d._conv_forward(parts[6], x.roll(1, dims=-1), *others)


SWAPS = {
    "no norm": lambda parts: parts.__setitem__(0, nn.Identity()),
    "wrapped norm": lambda parts: parts.__setitem__(0, Halved(parts[0])),
    "activation": lambda parts: parts.__setitem__(1, nn.GELU()),
    "dropout": lambda parts: parts.__setitem__(5, nn.Hardtanh(-0.1, 0.1)),
    "adapter": adapt,
    "method": pad_otherwise,
}


@pytest.mark.parametrize("swap", half(SWAPS))
def test_a_part_that_is_replaced_later_is_the_hosts(swap):
    vae, theirs = (WanVAE_(*LAYOUT, False).eval() for _ in range(2))
    theirs.load_state_dict(vae.state_dict())
    report = accelerate(vae)
    for each in (vae, theirs):
        SWAPS[swap](each.decoder.middle[0].residual)
    assert relative_error(coded(vae), coded(theirs)) < PARITY
    assert "a part of it was replaced" in str(report)
