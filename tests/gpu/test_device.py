"""The whole path runs on a CUDA device, and agrees with the CPU on the same weights and noise."""

from __future__ import annotations

import pytest
import torch

from bench.__main__ import main as bench
from bench.harness.timing import without_tf32
from model import SegmentPlan, sample_latents
from model.csg.sampler import MODES
from model.csg.schedule import flow_sigmas
from model.generate import main as generate
from tests.support.tolerances import ACROSS_DEVICES, relative_error

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("mode", MODES)
def test_csg_on_the_gpu_equals_the_cpu(tiny_dit, mode):
    reference, text = torch.randn(1, 4, 6, 4, 6), torch.randn(1, 7, 16)
    clips = []
    for device in ("cpu", "cuda"):
        clip = reference.to(device, copy=True)
        options = {"plan": SegmentPlan(6), "sigmas": flow_sigmas(2, 5.0), "seed": 5, "mode": mode}
        list(sample_latents(tiny_dit.to(device), clip, text.to(device), **options))
        clips.append(clip.cpu())
    assert relative_error(clips[1], clips[0]) < ACROSS_DEVICES


def test_vae_on_the_gpu_equals_the_cpu(tiny_vae):
    latents = torch.randn(1, 4, 3, 4, 6)
    expected = tiny_vae.decode(latents)
    with without_tf32():
        found = tiny_vae.to("cuda").decode(latents).cpu()
    assert relative_error(found, expected) < ACROSS_DEVICES


def test_generate_and_bench_run_on_the_gpu(photo, tmp_path):
    pytest.importorskip("av")
    assert generate([str(photo), "--out", str(tmp_path / "clip.mp4"), "--frames", "9", "--device", "cuda"]) == 0
    assert (tmp_path / "clip.mp4").stat().st_size > 0
    options = ["--whole", "--quick", "--preset", "tiny", "--size", "256x160", "--out", str(tmp_path / "bench")]
    assert bench(["csg", *options]) == 0
