"""The DiT on the kernels: CSG against the PyTorch path, and what a step allocates."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from model import DiTConfig, SegmentPlan, WanDiT, sample_latents
from model.csg.denoiser import Denoiser
from model.csg.sampler import MODES
from model.csg.schedule import flow_sigmas
from model.weights.load import random_weights
from swifti2v_kernels.attention import segment_attention as attention
from swifti2v_kernels.attention.arguments import check_call
from tests.support.tolerances import PARITY, relative_error

CONFIG = DiTConfig(
    num_heads=2, head_dim=64, num_layers=2, ffn_dim=64, in_channels=12, out_channels=4, text_dim=16, freq_dim=32
)


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=[pytest.mark.slow] * (mode == "end_to_end")) for mode in MODES]
)
def test_csg_is_the_same_on_the_kernels(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dit = random_weights(WanDiT, CONFIG, 1)
    reference, text = torch.randn(1, 4, 5, 4, 6), torch.randn(1, 7, 16)
    launches = []
    stock = attention.launch
    monkeypatch.setattr(attention, "launch", lambda *args: launches.append(args[1].k) or stock(*args))
    clips = {}
    for backend in ("torch", "triton"):
        monkeypatch.setenv("SWIFTI2V_BACKEND", backend)
        clip = reference.clone()
        options = {"plan": SegmentPlan(5), "sigmas": flow_sigmas(2, 5.0), "seed": 5, "mode": mode}
        with torch.no_grad():
            list(sample_latents(dit, clip, text, **options))
        clips[backend] = clip
        assert bool(launches) == (backend == "triton")
    assert relative_error(clips["triton"], clips["torch"]) < PARITY
    # Self-attention and cross-attention; the causal ablation reads its cached context as a second source.
    assert {len(sources) for sources in launches} == ({1, 2} if mode == "causal" else {1})


def allocated(step: Callable[[], None]) -> list[int]:
    """Returns the bytes of every allocation during ``step``, also inside operators, from the allocator itself."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


def denoiser(dit: WanDiT, causal: bool = False) -> tuple[Denoiser, torch.Tensor]:
    """Returns a denoiser at its first window, and the latents that it denoises."""
    draw = torch.Generator().manual_seed(1)
    shapes = (1, 4, 3, 4, 6), (1, 4, 5, 4, 6), (1, 7, 16)
    latents, reference, text = (torch.randn(*shape, generator=draw) for shape in shapes)
    options = {"latents": latents, "reference": reference, "sigmas": [1.0, 0.5, 0.0], "max_blocks": 5}
    made = Denoiser(dit, text, None, **options)
    if causal:
        made.open([2, 3, 4], [0, 1, 2], [0.0] * 3, remembered=[0, 1])
    else:
        made.open([0, 1, 2, 3, 4], [-1, -1, 0, 1, 2], [1.0, 1.0, 0.0, 0.0, 0.0])
    return made, latents


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_a_step_allocates_nothing(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step allocates nothing but the scalars that torch makes of Python numbers on the CPU, up to 8 bytes each."""
    monkeypatch.setenv("SWIFTI2V_BACKEND", "triton")
    with torch.no_grad():
        steps, latents = denoiser(random_weights(WanDiT, CONFIG, 1), causal)
        before = latents.clone()
        # The probe sees allocations inside operators: this one makes a float32 copy of its inputs.
        assert max(allocated(lambda: attention.segment_attention_reference(*PROBE))) > 1000
        sizes = allocated(lambda: steps.step(0))
    assert not torch.equal(latents, before)
    assert sum(sizes) <= 64
    tokens, config = 5 * 6, CONFIG
    assert steps.workspace.nbytes == 4 * (4 * tokens * config.dim + tokens * (2 * config.dim + config.dim))


PROBE = (check_call(torch.ones(1, 9, 1, 64), [(torch.ones(1, 9, 1, 64),) * 2]), True)
