"""Conditional Segment-wise Generation: the plan, the windows, and what each mode may and may not see."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from hypothesis import given
from hypothesis import strategies as st

from model import InputError, SegmentPlan, load_dit, sample_latents
from model.csg import MODES, STAGE, dit_input, plan_for
from model.scheduler import block_noise, flow_sigmas
from tests.test_dit import saved_diffusers_dit
from tests.tolerances import PARITY, relative_error

SIGMAS = flow_sigmas(2, 5.0)
TEXT = torch.linspace(-1, 1, 7 * 16).view(1, 7, 16)
plans = st.builds(
    SegmentPlan,
    num_blocks=st.integers(2, 60),
    blocks_per_segment=st.integers(1, 12),
    neighbours_left=st.integers(0, 5),
    neighbours_right=st.integers(0, 5),
)


def run(dit, reference, **options):
    """The sampled clip; ``reference`` is left as it is."""
    clip = reference.clone()
    options = {"plan": SegmentPlan(reference.shape[2]), "sigmas": SIGMAS, "seed": 5, **options}
    segments = list(sample_latents(dit, clip, TEXT, **options))
    assert torch.equal(torch.cat(segments, dim=2), clip[:, :, 1:])
    return clip


class Recorder:
    """Stands in front of a DiT and keeps what every call of it was given."""

    def __init__(self, dit):
        self.dit, self.config, self.calls = dit, dit.config, []

    def __call__(self, latents, timestep, text, image=None, *, block_index, memory=None):
        self.calls.append((latents.clone(), timestep.clone(), tuple(block_index)))
        return self.dit(latents, timestep, text, image, block_index=block_index, memory=memory)


@given(plans)
def test_every_block_but_the_anchor_is_generated_exactly_once_and_in_order(plan):
    windows = list(plan)
    assert [block for window in windows for block in window.noisy] == list(range(1, plan.num_blocks))
    assert len(windows) == len(plan)


@given(plans)
def test_windows_are_bounded_whatever_the_length_and_hold_no_block_twice(plan):
    bound = 1 + plan.neighbours_left + plan.neighbours_right + plan.blocks_per_segment
    assert plan.max_window_blocks == bound
    for window in plan:
        assert window.conditioning[0] == 0
        assert len(set(window.blocks)) == len(window.blocks) <= bound
        assert all(0 <= block < plan.num_blocks for block in window.blocks)


@given(plans)
def test_neighbours_are_the_blocks_next_to_the_segment(plan):
    for window in plan:
        first, last = window.noisy[0], window.noisy[-1]
        wanted = set(range(first - plan.neighbours_left, first)) | set(
            range(last + 1, last + 1 + plan.neighbours_right)
        )
        assert set(window.conditioning) == {0} | {block for block in wanted if 0 < block < plan.num_blocks}


def test_the_paper_setting_for_81_frames():
    windows = list(SegmentPlan(21))
    assert [window.blocks for window in windows[:2]] == [(0, 1, 2, 3), (0, 3, 4, 5, 6)]
    assert windows[-1].blocks == (0, 18, 19, 20)
    assert len(windows) == 7


@pytest.mark.parametrize("num_blocks", [2, 4, 6])
def test_one_segment_of_all_blocks_equals_end_to_end_bit_for_bit(tiny_dit, num_blocks):
    reference = torch.randn(1, 4, num_blocks, 4, 6)
    plan = SegmentPlan(num_blocks, num_blocks - 1, 0, 0)
    whole = run(tiny_dit, reference, plan=plan, mode="bidirectional")
    assert torch.equal(whole, run(tiny_dit, reference, mode="end_to_end"))
    if num_blocks > 4:  # and the default plan is something else
        assert not torch.equal(whole, run(tiny_dit, reference, mode="bidirectional"))


def test_neighbours_are_generated_blocks_and_right_neighbours_are_motion_reference(tiny_dit):
    reference = torch.randn(1, 4, 7, 4, 6)
    recorder, clip = Recorder(tiny_dit), reference.clone()
    plan = SegmentPlan(7, blocks_per_segment=2, neighbours_left=2, neighbours_right=1)
    segments = list(sample_latents(recorder, clip, TEXT, plan=plan, sigmas=SIGMAS, seed=5))
    first_steps = recorder.calls[:: len(SIGMAS) - 1]
    assert [index for _, _, index in first_steps] == [(0, 3, 1, 2), (0, 1, 2, 5, 3, 4), (0, 3, 4, 5, 6)]
    latents, timestep, _ = first_steps[1]
    assert torch.equal(latents[:, :4, 1:3], segments[0])  # written by the segment before
    assert torch.equal(latents[:, :4, 3], reference[:, :, 5])  # not generated yet
    assert torch.equal(latents[:, :4, 0], reference[:, :, 0])
    assert timestep.tolist() == [[0, 0, 0, 0, 1000, 1000]]


def test_channels_are_latents_mask_and_reference(tiny_dit):
    reference = torch.randn(1, 4, 5, 4, 6)
    recorder = Recorder(tiny_dit)
    list(sample_latents(recorder, reference.clone(), TEXT, plan=SegmentPlan(5, 2), sigmas=SIGMAS, seed=5))
    latents, _, index = recorder.calls[0]
    assert index == (0, 1, 2)
    noise = block_noise(5, STAGE, (1, 2), (4, 4, 6))
    assert torch.equal(latents[:, :4], torch.cat((reference[:, :, :1], noise), dim=2))
    assert latents[0, 4:8, :, 0, 0].tolist() == [[1, 0, 0]] * 4
    assert torch.equal(latents[:, 8:], reference[:, :, :3])


def test_a_dit_without_reference_channels_takes_the_latents_alone():
    latents, mask = torch.randn(1, 4, 3, 2, 2), torch.tensor([1.0, 0, 0])
    assert dit_input(latents, mask, latents, 4) is latents
    with pytest.raises(InputError, match=r"takes 4 or 12 .*, this one takes 9"):
        dit_input(latents, mask, latents, 9)


def _conditioning_features(dit, mode, seed):
    """Outputs of the last layer on the conditioning blocks of the last window, for a given noise."""
    features = []
    handle = dit.blocks[-1].register_forward_hook(lambda module, inputs, output: features.append(output[0].clone()))
    try:
        generator = torch.Generator().manual_seed(0)
        run(dit, torch.randn(1, 4, 4, 4, 6, generator=generator), mode=mode, seed=seed)
    finally:
        handle.remove()
    tokens = 6 * 1  # one conditioning block, the anchor, of 2 x 3 tokens
    return features[0][:, :tokens]


def test_noise_reaches_conditioning_features_in_bidirectional_mode_only(tiny_dit):
    causal, other = (_conditioning_features(tiny_dit, "causal", seed) for seed in (1, 2))
    assert torch.equal(causal, other)
    bidirectional, other = (_conditioning_features(tiny_dit, "bidirectional", seed) for seed in (1, 2))
    assert relative_error(bidirectional, other) > 1e-3


class _MaskedProcessor(WanAttnProcessor):
    """diffusers' processor with a dense mask on self-attention."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        mask = self.mask if encoder_hidden_states is None else None
        return super().__call__(attn, hidden_states, encoder_hidden_states, mask, rotary_emb)


def test_causal_mode_equals_diffusers_with_a_dense_mask(tmp_path):
    """Cached conditioning keys and values give what a joint pass gives whose conditioning rows see no noisy column."""
    theirs: WanTransformer3DModel = saved_diffusers_dit(tmp_path, in_channels=36)
    ours = load_dit(tmp_path)
    x, text = torch.randn(1, 36, 5, 4, 6), torch.randn(1, 512, 32)
    per_block = torch.tensor([[0.0, 0.0, 700.0, 700.0, 700.0]])
    memory = ours.keys_values(x[:, :, :2], torch.zeros(1), text, block_index=(0, 1))
    actual = ours(x[:, :, 2:], per_block[:, 2:], text, block_index=(2, 3, 4), memory=memory)
    mask = torch.ones(30, 30, dtype=torch.bool)
    mask[:12, 12:] = False
    theirs.set_attn_processor(_MaskedProcessor(mask))
    with torch.no_grad():
        expected = theirs(x, per_block.repeat_interleave(6, dim=1), text).sample
    assert relative_error(actual, expected[:, :, 2:]) < PARITY


@pytest.mark.parametrize("mode", MODES)
def test_a_run_repeats_bit_for_bit_and_leaves_the_anchor(tiny_dit, mode):
    reference = torch.randn(1, 4, 6, 4, 6)
    first, again = (run(tiny_dit, reference, mode=mode) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(first[:, :, 0], reference[:, :, 0])
    assert not torch.equal(first, run(tiny_dit, reference, mode=mode, seed=6))


def test_progress_is_reported_for_every_step(tiny_dit):
    seen = []
    run(tiny_dit, torch.randn(1, 4, 6, 4, 6), on_step=lambda *where: seen.append(where))
    assert seen == [(segment, 2, step, 2) for segment in (1, 2) for step in (1, 2)]


def test_bad_arguments_are_named(tiny_dit):
    with pytest.raises(InputError, match=r"mode: expected one of .*, got 'both'"):
        plan_for("both", SegmentPlan(4))
    with pytest.raises(InputError, match=r"reference: expected \[1, z, 5, h, w\], got \(1, 4, 4, 2, 2\)"):
        sample_latents(tiny_dit, torch.zeros(1, 4, 4, 2, 2), TEXT, plan=SegmentPlan(5), sigmas=SIGMAS, seed=0)
    with pytest.raises(InputError, match="num_blocks: expected at least 2, got 1"):
        SegmentPlan(1)
    with pytest.raises(InputError, match="neighbours_left: expected at least 0, got -1"):
        SegmentPlan(5, neighbours_left=-1)
