"""Modules that only look like the Wan VAE's are left and named; and to find them out changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from swifti2v_kernels.common.dispatch import default_backend
from swifti2v_kernels.integrations.patching import plan_patches
from swifti2v_kernels.integrations.probing import DIFFERS
from swifti2v_kernels.integrations.wan import accelerate
from swifti2v_kernels.integrations.wan_vae.recipes import RECIPES
from tests.support.products import half
from tests.support.tolerances import PARITY, relative_error
from tests.support.wan_original import CausalConv3d, Resample, ResidualBlock, RMS_norm, imitate, wan_vae


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
    _, replaced, left = plan_patches("vae", root, RECIPES, {"vae": True})
    return {line.host: line.count for line in replaced}, {line.host: line.text for line in left}


def layer(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Returns ``forward(self, x, feat_cache, feat_idx)`` with the layers' own signature."""
    return lambda self, x, feat_cache=None, feat_idx=[0]: forward(self, x, feat_cache, feat_idx)


def scaled_branch(self: Any, x: torch.Tensor, *cache: Any) -> torch.Tensor:
    h = self.shortcut(x)
    return h + 0.7 * (ResidualBlock.forward(self, x, *cache) - h)


def slots_in_reverse(self: Any, x: torch.Tensor, feat_cache: Any, feat_idx: Any) -> torch.Tensor:
    if feat_cache is None:
        return ResidualBlock.forward(self, x)
    here = slice(feat_idx[0], feat_idx[0] + 2)
    slots = feat_cache[here][::-1]
    y = ResidualBlock.forward(self, x, slots, [0])
    feat_cache[here] = slots[::-1]
    feat_idx[0] += 2
    return y


def changed_input(self: Any, x: torch.Tensor, *cache: Any) -> torch.Tensor:
    y = Resample.forward(self, x, *cache)
    x.zero_()
    return y


#: The kind that each imitates, and its forward; DiffSynth-Studio's layers hand cache and index back.
LOOKALIKES = {
    "scaled branch": ("ResidualBlock", layer(scaled_branch)),
    "slots in reverse": ("ResidualBlock", layer(slots_in_reverse)),
    "epsilon": ("RMS_norm", lambda self, x: x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) * self.gamma),
    "changed input": ("Resample", layer(changed_input)),
    "hands back": ("Resample", layer(lambda self, x, *cache: (Resample.forward(self, x, *cache), *cache))),
}


@pytest.mark.parametrize("case", half(LOOKALIKES))
def test_a_lookalike_is_left_with_the_reason_and_computes_as_before(case):
    """The residual block and whatever else calls the imitated module is left too, and the rest is replaced."""
    vae, (kind, forward) = wan_vae(), LOOKALIKES[case]
    imitate(vae, kind, forward)
    expected = None if case == "hands back" else coded(vae)
    report = accelerate(vae)
    left = "ResidualBlock" if kind == "RMS_norm" else kind
    reasons = [line.text for line in report.left if line.host == left]
    assert reasons
    assert all(reason.startswith(DIFFERS) for reason in reasons)
    assert report.replaced
    if expected is not None:
        assert relative_error(coded(vae), expected) < PARITY


def test_a_method_that_somebody_put_into_one_module_is_tried():
    """Nodes for seamless pictures replace the method by which a convolution pads."""
    vae = wan_vae()
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


def quantised(layers: nn.Module) -> None:
    for conv in layers.modules():
        if isinstance(conv, CausalConv3d):
            conv.weight = nn.Parameter(conv.weight.detach().as_subclass(Weight), requires_grad=False)


WEIGHTS = {
    "meta": lambda layers: layers.to("meta"),
    "float8": lambda layers: layers.to(torch.float8_e4m3fn),
    "quantised": quantised,
}


@pytest.mark.parametrize("weights", WEIGHTS)
def test_whatever_weights_a_layer_has_its_code_is_tried(weights):
    layers, lookalikes = (nn.ModuleList([ResidualBlock(4, 8), Resample(8, "upsample3d", 4)]) for _ in range(2))
    imitate(lookalikes, "ResidualBlock", layer(scaled_branch))
    WEIGHTS[weights](layers)
    WEIGHTS[weights](lookalikes)
    assert plan(layers) == ({"ResidualBlock": 1, "Resample": 1, "CausalConv3d": 4}, {})
    assert plan(lookalikes)[1] == {"ResidualBlock": DIFFERS}


@pytest.mark.parametrize(
    "context",
    [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.device("meta")],
    ids=["inference", "autocast", "meta"],
)
def test_whatever_the_caller_has_set_the_same_is_replaced(context):
    vae = wan_vae(residual=True, dim_mult=[1, 1])
    expected = plan(vae)
    with context():
        assert plan(vae) == expected
    assert not expected[1]


def test_sizes_of_channels_alone_are_no_other_form():
    """A VAE of real size, whose weights are not even there, is tried by the same few channels."""
    with torch.device("meta"):
        layout = {"dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True]}
        vae = wan_vae(base_dim=96, z_dim=16, num_res_blocks=2, **layout)
    replaced, left = plan(vae)
    assert not left
    assert (replaced["ResidualBlock"], replaced["Resample"]) == (24, 6)


def test_a_trial_leaves_no_trace():
    """No hook runs, and weights, gradients, attributes, random numbers and settings are what they were."""
    vae = wan_vae().train()

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
    versions = [(p._version, p.grad._version, p.requires_grad) for p in vae.parameters()]
    state = torch.random.get_rng_state()
    plan(vae)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (default_backend(), torch.is_grad_enabled()) == ("auto", True)
    assert [(p._version, p.grad._version, p.requires_grad) for p in vae.parameters()] == versions
    assert [vars(module) for module in vae.modules()] == before
    assert all(module.notes == [1] for module in vae.modules())


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
    "one entry": (CausalConv3d, lambda x, slot: len(x) == 1),
    "float32": (CausalConv3d, lambda x, slot: x.dtype == torch.float32),
    "8 columns": (CausalConv3d, lambda x, slot: x.shape[-1] >= 8),
    "chunk of four frames": (ResidualBlock, lambda x, cache, index: cache and x.shape[2] == 4),
}


@pytest.mark.parametrize("case", half(RARE))
def test_what_differs_for_some_inputs_alone_is_found_out(case):
    kind, rare = RARE[case]

    def forward(self, *given):
        y = kind.forward(self, *given)
        return 0.9 * y if rare(*given) else y

    signatures = {
        ResidualBlock: lambda self, x, feat_cache=None, feat_idx=[0]: forward(self, x, feat_cache, feat_idx),
        CausalConv3d: lambda self, x, cache_x=None: forward(self, x, cache_x),
    }
    layers = nn.ModuleList([ResidualBlock(4, 8)])
    imitate(layers, kind.__name__, signatures[kind])
    assert plan(layers)[1][kind.__name__] == DIFFERS


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
    assert left == {"ResidualBlock": DIFFERS}


def test_dropout_of_a_layer_in_training_is_no_difference():
    assert not plan(nn.ModuleList([ResidualBlock(4, 8, dropout=0.5)]).train())[1]
