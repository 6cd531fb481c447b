"""The DiT on the kernels, in every mode of CSG, against the DiT on the PyTorch path."""

from __future__ import annotations

import pytest
import torch

from model import DiTConfig, SegmentPlan, WanDiT, sample_latents
from model.csg import MODES
from model.scheduler import flow_sigmas
from model.weights import random_weights
from swifti2v_kernels import attention
from tests.tolerances import PARITY, relative_error


@pytest.mark.parametrize("mode", MODES)
def test_csg_is_the_same_on_the_kernels(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DiTConfig(
        num_heads=2, head_dim=64, num_layers=2, ffn_dim=64, in_channels=12, out_channels=4, text_dim=16, freq_dim=32
    )
    dit = random_weights(WanDiT, config, 1)
    reference, text = torch.randn(1, 4, 5, 6, 10), torch.randn(1, 7, 16)
    launches = []
    stock = attention.launch
    monkeypatch.setattr(attention, "launch", lambda *args: launches.append(args[2]) or stock(*args))
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
