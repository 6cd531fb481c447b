"""The DiT on the kernels: a step against the PyTorch path, and what it allocates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from model import DiTConfig, WanDiT
from model.csg.denoiser import Denoiser
from model.streaming.placement import Placement
from model.weights.load import random_weights
from swifti2v_kernels.attention import choice
from swifti2v_kernels.attention import segment_attention as attention
from swifti2v_kernels.attention.arguments import check_call
from tests.support.tolerances import KERNEL_PARITY, PARITY, relative_error

CONFIG = DiTConfig(
    num_heads=2, head_dim=64, num_layers=2, ffn_dim=64, in_channels=12, out_channels=4, text_dim=16, freq_dim=32
)


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


#: An input that attention's reference makes a float32 copy of.
PROBE = (check_call(torch.ones(1, 9, 1, 64), [(torch.ones(1, 9, 1, 64),) * 2]), True)


@pytest.mark.parametrize(
    ("causal", "placement"),
    [
        (False, None),
        (True, None),
        (False, Placement(resident=0)),
        pytest.param(False, Placement(resident=1, quantize="float8"), marks=pytest.mark.slow),
        pytest.param(False, Placement(resident=0, quantize="int8", matmul="8bit"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_step_is_that_of_the_torch_path_and_allocates_nothing(
    causal: bool, placement: Placement | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step equals the torch path, also of streamed and of 8-bit layers and in the causal mode, and allocates nothing
    but the scalars that torch makes of Python numbers on the CPU, up to 8 bytes each.

    Quantised activations may round to the other neighbour where the norms before them differ in the last bit.
    """
    config, found = CONFIG if placement is None else replace(CONFIG, num_layers=3), {}  # one layer more than slots
    launches: list[int] = []
    stock = choice.launch
    monkeypatch.setattr(choice, "launch", lambda call: launches.append(len(call.k)) or stock(call))
    for backend in ("torch", "triton"):
        monkeypatch.setenv("SWIFTI2V_BACKEND", backend)
        with torch.no_grad():
            steps, latents = denoiser(random_weights(WanDiT, config, 1, placement=placement), causal)
            before = latents.clone()
            # The probe sees allocations inside operators.
            assert max(allocated(lambda: attention.segment_attention_reference(*PROBE))) > 1000
            sizes = allocated(lambda: steps.step(0))  # noqa: B023
        found[backend] = latents.clone()
        assert not torch.equal(latents, before)
        assert bool(launches) == (backend == "triton")
    # Self-attention and cross-attention; the causal ablation reads its remembered blocks as a second source.
    assert set(launches) == ({1, 2} if causal else {1})
    # Of the kernels, which ran last. The interpreter needs memory for products of float8, which NumPy does not have.
    assert sum(sizes) <= 64 or (placement is not None and placement.matmul_dtype == torch.float8_e4m3fn)
    assert torch.isfinite(found["torch"]).all()
    limit = PARITY if placement is None else KERNEL_PARITY if placement.matmul == "plain" else 5e-3
    assert relative_error(found["triton"], found["torch"]) < limit
    if placement is None:
        tokens = 5 * 6
        assert steps.workspace.nbytes == 4 * (4 * tokens * config.dim + tokens * (2 * config.dim + config.dim))
