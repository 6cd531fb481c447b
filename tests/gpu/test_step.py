"""The fused operators of a DiT step on hardware, at real widths and lengths, and the step as a graph."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model import DiTConfig, SegmentPlan, WanDiT, sample_latents
from model.csg import denoiser as denoise
from model.csg.sampler import MODES
from model.csg.schedule import flow_sigmas
from model.weights.load import random_weights
from swifti2v_kernels import linear_gelu, norm_modulate, norm_rope, rope_3d
from swifti2v_kernels.norm.qk_norm_rope import norm_rope_reference
from tests.support.tolerances import KERNEL, OPERATOR, relative_error

pytestmark = pytest.mark.gpu


def test_beyond_131_thousand_tokens_and_32_bits() -> None:
    """1.4 million tokens of 1,536 channels are 2.15e9 elements."""
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GiB of free device memory")
    length = 1_400_000
    x = torch.randn(1, length, 1536, device="cuda", dtype=torch.bfloat16)
    rows = torch.linspace(0, length - 1, 64, device="cuda").long()
    weight, rope = torch.rand(1536, device="cuda").bfloat16(), rope_3d(range(1), 1000, 1400, 128, device="cuda")
    y = norm_modulate(x)
    assert relative_error(y[:, rows], norm_modulate(x[:, rows].double(), backend="torch")) < 8e-3
    del y
    sample = {start: x[:, start : start + 4].double() for start in (0, 700_000, length - 4)}
    norm_rope(x, weight, rope, 12, inplace=True)
    for start, part in sample.items():
        expected = norm_rope_reference(part, weight.double(), rope, 12, start, 1e-6, "interleaved")
        assert relative_error(x[:, start : start + 4].unflatten(2, (12, 128)), expected) < 2 * OPERATOR["bfloat16"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_gelu_epilogue_is_the_tanh_one(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(1, 1000, 1536, device="cuda").to(dtype), 0.03 * torch.randn(8960, 1536, device="cuda")
    weight, bias = weight.to(dtype), torch.randn(8960, device="cuda").to(dtype)
    monkeypatch.setattr(torch, "addmm", None)  # which a matmul without the epilogue would call
    y = linear_gelu(x, weight, bias)
    sums = F.linear(x.double(), weight.double(), bias.double())
    expected = F.gelu(sums, approximate="tanh")
    assert relative_error(y, expected) < KERNEL[str(dtype).removeprefix("torch.")]
    assert relative_error(y, expected) <= relative_error(y, F.gelu(sums))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replayed_steps_equal_launched_ones(tiny_dit, mode: str, dtype: torch.dtype, monkeypatch) -> None:
    """Three windows, the last of another kind, equal launched steps; each kind is captured from its second step on."""
    reference, text = torch.randn(1, 4, 8, 4, 6, device="cuda"), torch.randn(1, 7, 16, device="cuda")
    made, stock = [], denoise.StepGraphs.__init__

    def init(self, *args, **kwargs):
        made.append(self)
        stock(self, *args, **kwargs)

    monkeypatch.setattr(denoise.StepGraphs, "__init__", init)
    clips = []
    for cuda_graph in (False, True):
        clip = reference.clone()
        options = {"plan": SegmentPlan(8), "sigmas": flow_sigmas(4, 5.0), "seed": 5, "mode": mode}
        list(sample_latents(tiny_dit.to("cuda", dtype), clip, text, cuda_graph=cuda_graph, **options))
        clips.append(clip)
    assert made[0].reason == "switched off"
    assert made[1].reason is None
    assert len(made[1]._graphs) == (1 if mode == "end_to_end" else 3)
    assert torch.equal(clips[0], clips[1])


def test_a_step_allocates_nothing_on_the_gpu() -> None:
    """A step allocates nothing but one part for torch's own attention, which has no output argument."""
    config = DiTConfig(
        num_heads=8, head_dim=64, num_layers=2, ffn_dim=1024, in_channels=12, out_channels=4, text_dim=16, freq_dim=32
    )
    latents, reference = torch.randn(1, 4, 3, 64, 96, device="cuda"), torch.randn(1, 4, 5, 64, 96, device="cuda")
    options = {"latents": latents, "reference": reference, "sigmas": [1.0, 0.5, 0.0], "max_blocks": 5}
    dit = random_weights(WanDiT, config, 1).to("cuda", torch.bfloat16)
    denoiser = denoise.Denoiser(dit, torch.randn(1, 7, 16, device="cuda"), None, cuda_graph=False, **options)
    denoiser.open([0, 1, 2, 3, 4], [-1, -1, 0, 1, 2], [1.0, 1.0, 0.0, 0.0, 0.0])
    denoiser.step(0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    denoiser.step(1)
    torch.cuda.synchronize()
    part = denoiser.workspace.buffers["a"].nbytes
    assert torch.cuda.max_memory_allocated() - before <= 1.5 * part
    assert torch.isfinite(latents).all()
