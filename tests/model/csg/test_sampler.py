"""Conditional Segment-wise Generation: the plan, the windows, and what each mode may and may not see."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model import InputError, SegmentPlan, WanDiT, load_dit, sample_latents
from model.cli.options import run_command
from model.csg.sampler import MODES, STAGE, plan_for, plan_segments
from model.csg.schedule import flow_sigmas
from model.dit import workspace
from model.weights.load import random_weights
from swifti2v_kernels import block_noise
from tests.conftest import TINY_DIT
from tests.model.dit.test_model import diffusers_window, saved_diffusers_dit
from tests.support.tolerances import PARITY, relative_error

SIGMAS = flow_sigmas(2, 5.0)
TEXT = torch.linspace(-1, 1, 7 * 16).view(1, 7, 16)
plans = st.builds(
    SegmentPlan,
    num_blocks=st.integers(2, 60),
    blocks_per_segment=st.integers(1, 12),
    neighbours_left=st.integers(0, 5),
    neighbours_right=st.integers(0, 5),
    anchor=st.booleans(),
)


def run(dit, reference, **options):
    """Returns the sampled clip; ``reference`` is left as it is."""
    clip = reference.clone()
    options = {"plan": SegmentPlan(reference.shape[2]), "sigmas": SIGMAS, "seed": 5, **options}
    segments = list(sample_latents(dit, clip, TEXT, **options))
    assert torch.equal(torch.cat(segments, dim=2), clip[:, :, 1:])
    return clip


def sampled_by_diffusers(theirs, reference, text, plan, sigmas, seed, mode):
    """Samples with diffusers' model on concatenated tensors, with nothing skipped, kept or fused."""
    clip, z = reference.clone(), reference.shape[1]
    for window in plan_for(mode, plan):
        given, noisy = list(window.conditioning), list(window.noisy)
        x = block_noise(seed, STAGE, window.noisy, (z, *reference.shape[3:])).to(reference)
        for sigma, after in itertools.pairwise(sigmas):
            latents = torch.cat((clip[:, :, given], x), dim=2)
            mask = reference.new_zeros(1, 4, len(given) + len(noisy), *reference.shape[3:])
            mask[:, :, : len(given)] = 1
            channels = torch.cat((latents, mask, clip[:, :, given + noisy]), dim=1)
            timestep = reference.new_tensor([[0.0] * len(given) + [1000 * sigma] * len(noisy)])
            blind = len(given) if mode == "causal" else 0
            velocity = diffusers_window(theirs, channels, timestep, text, given + noisy, blind)
            x = x + (after - sigma) * velocity[:, :, len(given) :]
        clip[:, :, noisy] = x
    return clip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("max_tokens", [7168, 4], ids=["whole blocks", "parts of blocks"])
def test_the_sampler_equals_diffusers_on_whole_windows(mode, max_tokens, tmp_path, monkeypatch):
    """The sampler differs from diffusers by rounding only: channels are latents, mask and reference, neighbours before
    a segment are generated blocks and those after it still the reference, and conditioning blocks carry timestep 0; in
    the causal mode they see no noisy one, which a dense mask says there. The sampler skips queries and feed-forward of
    conditioning blocks in the last layer, makes text keys and values once, gathers, steps in the last kernel and works
    in parts. The last segment is a short one."""
    monkeypatch.setattr(workspace.plan_parts, "__defaults__", (max_tokens,))
    theirs = saved_diffusers_dit(tmp_path, in_channels=36)
    dit, reference, text = load_dit(tmp_path), torch.randn(1, 16, 6, 4, 6), torch.randn(1, 512, 32)
    plan, sigmas = SegmentPlan(6, 2, 1, 1), [1.0, 0.75, 0.0]
    expected = sampled_by_diffusers(theirs, reference, text, plan, sigmas, 5, mode)
    list(sample_latents(dit, reference, text, plan=plan, sigmas=sigmas, seed=5, mode=mode))
    assert relative_error(reference, expected) < PARITY


def test_what_the_last_layer_skips(tiny_dit, monkeypatch):
    """The last layer takes the tokens of noisy blocks only, the layers before it all; a block has 6 tokens here."""
    tokens = [[], []]
    for seen, layer in zip(tokens, tiny_dit.blocks, strict=True):
        attend = layer.attn1.attend
        layer.attn1.attend = lambda n, *rest, seen=seen, attend=attend: seen.append(n.shape[1]) or attend(n, *rest)
    texts, stock = [], type(tiny_dit.blocks[0].attn2).context
    monkeypatch.setattr(type(tiny_dit.blocks[0].attn2), "context", lambda *a, **k: texts.append(1) or stock(*a, **k))
    reference = torch.randn(1, 4, 4, 4, 6)
    list(sample_latents(tiny_dit, reference, TEXT, plan=SegmentPlan(4, 2), sigmas=SIGMAS, seed=5))
    assert tokens == [[18, 18, 18, 18], [12, 12, 6, 6]]  # windows (0, 1, 2) and (0, 2, 3), two steps each
    assert len(texts) == 2  # once a layer and clip


@given(plans)
def test_segments_are_all_blocks_once_and_windows_are_bounded(plan):
    """Every block but the first is generated once and in order; a window holds the anchor, the blocks next to its
    segment and the segment, none of them twice, whatever the clip's length."""
    windows = list(plan)
    assert [block for window in windows for block in window.noisy] == list(range(1, plan.num_blocks))
    assert len(windows) == len(plan)
    bound = plan.anchor + plan.neighbours_left + plan.neighbours_right + plan.blocks_per_segment
    for window in windows:
        assert not plan.anchor or window.conditioning[0] == 0
        assert len(set(window.blocks)) == len(window.blocks) <= bound
        first, last = window.noisy[0], window.noisy[-1]
        near = (*range(first - plan.neighbours_left, first), *range(last + 1, last + 1 + plan.neighbours_right))
        known = {block for block in near if 0 <= block < plan.num_blocks}
        assert set(window.conditioning) == known | ({0} if plan.anchor else set())


@pytest.mark.parametrize("num_blocks", [2, 4, 6])
def test_one_segment_of_all_blocks_equals_end_to_end_bit_for_bit(tiny_dit, num_blocks):
    reference = torch.randn(1, 4, num_blocks, 4, 6)
    plan = SegmentPlan(num_blocks, num_blocks - 1, 0, 0)
    whole = run(tiny_dit, reference, plan=plan, mode="bidirectional")
    assert torch.equal(whole, run(tiny_dit, reference, mode="end_to_end"))
    if num_blocks > 4:  # and the default plan is something else
        assert not torch.equal(whole, run(tiny_dit, reference, mode="bidirectional"))


@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
def test_without_the_anchor_only_the_first_window_holds_the_image(tiny_dit, mode):
    plan = SegmentPlan(6, 2, neighbours_left=1, anchor=False)
    assert [window.blocks for window in plan] == [(0, 1, 2), (2, 3, 4), (4, 5)]
    reference = torch.randn(1, 4, 6, 4, 6)
    clip = run(tiny_dit, reference, plan=plan, mode=mode)
    assert torch.equal(clip[:, :, 0], reference[:, :, 0])
    with_anchor = run(tiny_dit, reference, plan=SegmentPlan(6, 2, neighbours_left=1), mode=mode)
    assert torch.equal(clip[:, :, 1:3], with_anchor[:, :, 1:3])
    assert not torch.equal(clip[:, :, 3:], with_anchor[:, :, 3:])
    # With nothing to condition on at all there is still a window.
    alone = run(tiny_dit, reference, plan=SegmentPlan(6, 2, 0, anchor=False), mode=mode)
    assert torch.isfinite(alone).all()


def test_a_dit_without_reference_channels_takes_the_latents_alone():
    dit = random_weights(WanDiT, replace(TINY_DIT, in_channels=4), 1)
    reference = torch.randn(1, 4, 3, 4, 6)
    expected = dit(
        torch.cat((reference[:, :, :1], block_noise(5, STAGE, (1, 2), (4, 4, 6))), dim=2),
        torch.tensor([[0.0, 1000.0, 1000.0]]),
        TEXT,
    )
    clip = reference.clone()
    (segment,) = sample_latents(dit, clip, TEXT, plan=SegmentPlan(3), sigmas=[1.0, 0.0], seed=5)
    noise = block_noise(5, STAGE, (1, 2), (4, 4, 6))
    assert relative_error(segment, noise - expected[:, :, 1:]) < PARITY
    with pytest.raises(InputError, match=r"takes 4 or 12 .*, this one takes 9"):
        run(random_weights(WanDiT, replace(TINY_DIT, in_channels=9), 0), reference, plan=SegmentPlan(3))


@pytest.mark.parametrize("mode", MODES)
def test_a_run_repeats_bit_for_bit_reports_every_step_and_leaves_the_anchor(tiny_dit, mode):
    reference, seen = torch.randn(1, 4, 6, 4, 6), []
    first, again = (run(tiny_dit, reference, mode=mode, on_step=lambda *where: seen.append(where)) for _ in range(2))
    segments = 1 if mode == "end_to_end" else 2
    assert seen == 2 * [(segment, segments, step, 2) for segment in range(1, segments + 1) for step in (1, 2)]
    assert torch.equal(first, again)
    assert torch.equal(first[:, :, 0], reference[:, :, 0])
    assert not torch.equal(first, run(tiny_dit, reference, mode=mode, seed=6))


def test_bad_arguments_are_named(tiny_dit):
    with pytest.raises(InputError, match=r"mode: expected one of .*, got 'both'"):
        plan_for("both", SegmentPlan(4))
    with pytest.raises(InputError, match=r"reference: expected \[1, z, 5, h, w\], got \(1, 4, 4, 2, 2\)"):
        sample_latents(tiny_dit, torch.zeros(1, 4, 4, 2, 2), TEXT, plan=SegmentPlan(5), sigmas=SIGMAS, seed=0)


def test_a_plan_that_a_user_asked_for_and_that_cannot_be_is_one_line_and_exit_code_2(capsys):
    """The library's ValueError does not reach a command as it is, where it would be a defect with a traceback."""
    assert run_command(lambda: plan_segments(5, blocks_per_segment=0)) == 2
    assert capsys.readouterr().err == "error: blocks_per_segment: expected at least 1, got 0\n"
