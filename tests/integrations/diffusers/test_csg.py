"""Segment-wise generation with diffusers' Wan: its adapter against this project's own model and sampler."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from diffusers import WanTransformer3DModel
from torch import nn

from model import load_dit, sample_latents
from swifti2v_kernels import SegmentPlan, Window
from swifti2v_kernels.integrations.diffusers import DiffusersWanWindow
from swifti2v_kernels.integrations.recipe import HostChanged
from tests.kernels.csg.test_sampler import PLANS, SIGMAS, run
from tests.model.dit.test_model import BASE, saved_diffusers_dit
from tests.support.tolerances import PARITY, relative_error

TEXT = torch.linspace(-1, 1, 512 * 32).view(1, 512, 32)
I2V = {"in_channels": 36}
CLIP = {**I2V, "image_dim": 20, "added_kv_proj_dim": 48}


@pytest.fixture
def fresh_compiler() -> None:
    """Forgets what other tests have compiled, which counts towards the number of graphs that a function may have."""
    torch._dynamo.reset()


def wan(**config) -> WanTransformer3DModel:
    return WanTransformer3DModel(**{**BASE, **config}).eval()


@pytest.mark.compatibility("CSG", model="Wan 2.1 text-to-video")
@pytest.mark.compatibility("CSG", model="Wan 2.1 image-to-video (CLIP)")
@pytest.mark.compatibility("CSG", model="Wan 2.2 A14B")
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("config", [{}, I2V, CLIP], ids=["latents alone", "mask and reference", "with CLIP"])
def test_wan_of_diffusers_equals_our_own_model_and_sampler(config, plan, tmp_path):
    theirs, ours = saved_diffusers_dit(tmp_path, **config), load_dit(tmp_path)
    image = torch.randn(1, 257, 20) if config is CLIP else None
    reference = torch.randn(1, 16, plan.num_blocks, 4, 6)
    clip, expected = run(DiffusersWanWindow(theirs, TEXT, image), reference, plan=plan), reference.clone()
    list(sample_latents(ours, expected, TEXT, image, plan=plan, sigmas=SIGMAS, seed=5))
    assert relative_error(clip, expected) < PARITY


def test_wan_takes_a_batch_with_one_text_or_several():
    transformer, reference = wan(**CLIP), torch.randn(2, 16, 5, 4, 6)
    texts, images = torch.randn(2, 512, 32), torch.randn(2, 257, 20)
    options = {"plan": SegmentPlan(5)}
    together = run(DiffusersWanWindow(transformer, texts, images), reference, seed=(5, 6), **options)
    shared = run(DiffusersWanWindow(transformer, texts[:1], images[:1]), reference, seed=(5, 6), **options)
    for i, seed in enumerate((5, 6)):
        part = slice(i, i + 1)
        alone = run(DiffusersWanWindow(transformer, texts[part], images[part]), reference[part], seed=seed, **options)
        assert relative_error(together[part], alone) < PARITY
        alone = run(DiffusersWanWindow(transformer, texts[:1], images[:1]), reference[part], seed=seed, **options)
        assert relative_error(shared[part], alone) < PARITY


def test_the_users_model_is_as_before_also_after_an_error():
    transformer = wan()
    arguments = torch.randn(1, 16, 4, 4, 6), torch.tensor([500.0]), TEXT
    with torch.no_grad():
        expected = transformer(*arguments).sample

    def breaks(*_):
        assert len(transformer.rope._forward_hooks) == 1  # in the middle of a call
        raise RuntimeError("out of luck")

    handle = transformer.blocks[1].register_forward_hook(breaks)
    with pytest.raises(RuntimeError, match="out of luck"):
        run(DiffusersWanWindow(transformer, TEXT), torch.randn(1, 16, 8, 4, 6))
    handle.remove()
    assert not transformer.rope._forward_hooks
    with torch.no_grad():
        assert torch.equal(transformer(*arguments).sample, expected)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "change",
    ["offloading", *(pytest.param(c, marks=pytest.mark.slow) for c in ("compiled blocks", "compiled"))],
)
def test_wan_may_have_been_changed_by_others(change):
    transformer, reference = wan(), torch.randn(1, 16, 8, 4, 6)
    expected = run(DiffusersWanWindow(transformer, TEXT), reference)
    if change == "offloading":
        cpu_offload(transformer, torch.device("cpu"), offload_buffers=True)
        assert transformer.proj_out.weight.is_meta
    elif change == "compiled blocks":
        transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    else:
        transformer = torch.compile(transformer, backend="eager")
    assert relative_error(run(DiffusersWanWindow(transformer, TEXT), reference), expected) < PARITY


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_wan_is_not_traced_anew_for_every_window():
    """Positions are no part of its graphs: windows of the same size are the same graphs, whatever their blocks."""
    transformer, reference, graphs = wan(), torch.randn(1, 16, 14, 4, 6), []
    options = {"plan": SegmentPlan(14, 1), "sigmas": [1.0, 0.0]}
    expected = run(DiffusersWanWindow(transformer, TEXT), reference, **options)
    compiled = torch.compile(transformer, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    model = DiffusersWanWindow(compiled, TEXT)
    run(model, reference[:, :, :4], plan=SegmentPlan(4, 1), sigmas=[1.0, 0.0])  # windows of two and of three blocks
    made = len(graphs)
    assert made > 0
    assert relative_error(run(model, reference, **options), expected) < PARITY
    assert len(graphs) == made


def test_a_wan_that_this_adapter_does_not_know_is_refused_by_what_it_lacks():
    transformer = wan()
    del transformer.rope.attention_head_dim
    with pytest.raises(
        HostChanged, match=r"WanTransformer3DModel of diffusers .* has no attribute 'rope\.attention_head_dim'"
    ):
        DiffusersWanWindow(transformer, TEXT)
    with pytest.raises(HostChanged, match=r"Linear is not the Wan.* no attribute 'config\.in_channels'"):
        DiffusersWanWindow(nn.Linear(2, 2), TEXT)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda x: torch.zeros(1, 24, 1, 24), "expected rope to return a tuple, got Tensor"),
        (lambda x: (torch.zeros(24, 24),) * 2, r"expected rope to return tables \[1, tokens, 1, D\], got \(24, 24\)"),
    ],
)
def test_rotary_tables_of_another_form_are_refused(forward, message):
    transformer = wan()
    transformer.rope.forward = forward
    with pytest.raises(HostChanged, match=message):
        run(DiffusersWanWindow(transformer, TEXT), torch.randn(1, 16, 8, 4, 6))
    assert not transformer.rope._forward_hooks


def test_a_call_without_true_positions_is_an_error(monkeypatch):
    """A transformer that calls ``rope`` past its hooks is an error; every segment would be the clip's first to it."""
    transformer = wan()
    monkeypatch.setattr(type(transformer.rope), "__call__", lambda self, x: self.forward(x))
    with pytest.raises(HostChanged, match="rope was not called, so the window's blocks had no true positions"):
        run(DiffusersWanWindow(transformer, TEXT), torch.randn(1, 16, 8, 4, 6))
    assert not transformer.rope._forward_hooks


@pytest.mark.parametrize(
    ("config", "text", "image", "message"),
    [
        ({}, TEXT[0], None, r"text: expected \[B, L, text_dim\], got \(512, 32\)"),
        (CLIP, TEXT[:, :7], torch.zeros(1, 257, 20), r"text: expected \[B, 512, text_dim\], got \(1, 7, 32\)"),
        (CLIP, TEXT, None, r"image: expected CLIP tokens \[B, L, 20\], got None"),
        ({}, TEXT, torch.zeros(1, 257, 20), "image: expected None, since the transformer has no image embedding"),
        ({"patch_size": (2, 2, 2)}, TEXT, None, r"transformer: expected a patch of one latent frame, got \(2, 2, 2\)"),
    ],
)
def test_what_wan_cannot_be_conditioned_on_is_named(config, text, image, message):
    with pytest.raises(ValueError, match=message):
        DiffusersWanWindow(wan(**config), text, image)


def test_what_does_not_fit_wan_is_named():
    model, reference = DiffusersWanWindow(wan(**I2V), TEXT), torch.randn(1, 16, 5, 4, 6)
    assert model.mask_channels == 4
    with pytest.raises(
        ValueError, match=r"latents: expected \[B, 36, 4, h, w\], got \(1, 16, 4, 4, 6\) \(mask_channels of"
    ):
        run(model, reference, mask_channels=None, plan=SegmentPlan(5))
    with pytest.raises(ValueError, match=r"transformer: expected in_channels of 16 .* or at least 32 .*, got 20"):
        DiffusersWanWindow(wan(in_channels=20), TEXT).mask_channels  # noqa: B018
    with pytest.raises(ValueError, match=r"window: expected blocks below 64, .* \(rope_max_seq_len\), got \(0, 64\)"):
        model(torch.zeros(1, 36, 2, 4, 6), 1.0, Window((0,), (64,)))
    with pytest.raises(ValueError, match="text: expected a batch of 1 or 1, got 2"):
        run(DiffusersWanWindow(wan(), TEXT.repeat(2, 1, 1)), reference, plan=SegmentPlan(5))
