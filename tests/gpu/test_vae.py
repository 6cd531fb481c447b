"""The whole VAE on hardware: tiles bit for bit, parking, predicted peaks against the allocator's, 2K within 4 GB."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bench.harness.timing import limited
from bench.vae.measure import release
from model import VAEConfig, VAEPlan, WanVAE, plan_vae
from model.config import PRESETS
from model.memory.vae_plan import Request, predict
from model.weights.load import random_weights
from swifti2v_kernels.common.target import capability_of

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
CONFIGS = {"2.1": VAEConfig(), "2.2": PRESETS["5b"].vae}
GB = 10**9


@pytest.fixture(autouse=True)
def _released() -> Iterator[None]:
    """Releases the memory that other tests have left, which does not count."""
    release(DEVICE)
    yield
    release(DEVICE)


def model(version: str, part: str, dtype: torch.dtype) -> WanVAE:
    """Returns one half of a VAE of the real size; the other is not on the device."""
    vae = random_weights(WanVAE, CONFIGS[version], 0, device=DEVICE).to_dtypes(encode=dtype, decode=dtype)
    if part == "decode":
        vae.drop_encoder()
    else:
        vae.decoder.to("cpu")
    return vae


def latents(version: str, blocks: int, width: int, height: int) -> torch.Tensor:
    stride = CONFIGS[version].spatial_stride
    return torch.randn(1, CONFIGS[version].z_dim, blocks, height // stride, width // stride, device=DEVICE)


@pytest.mark.parametrize("version", CONFIGS)
@pytest.mark.parametrize("part", ["decode", "encode"])
def test_tiles_are_the_whole_frame_to_the_bit(version: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our kernels sum every pixel in the same order, wherever it lies; held in host memory or not."""
    monkeypatch.setenv("SWIFTI2V_BACKEND", "triton")
    vae = model(version, part, torch.bfloat16)
    given = latents(version, 3, 640, 352) if part == "decode" else torch.rand(1, 3, 9, 352, 640) * 2 - 1
    compute = getattr(vae, part)
    whole = compute(given)
    assert torch.isfinite(whole).all()
    # As many frames at once as before: attention is torch's, which promises nothing about bits.
    for plan in (VAEPlan(2, 3), VAEPlan(3, 2, chunk=None, park=True)):
        assert torch.equal(compute(given, plan).to(DEVICE), whole)
    if part == "decode":
        frames = torch.cat(list(vae.decode_frames(given.split(1, dim=2), VAEPlan(2, 2))), dim=1)
        expected = (whole.float() * 127.5 + 128).floor().clamp(0, 255).permute(0, 2, 3, 4, 1)
        # The last store rounds once, from float32.
        assert (frames.float() - expected).abs().max() <= 1


@pytest.mark.parametrize("version", CONFIGS)
@pytest.mark.parametrize("part", ["decode", "encode"])
@pytest.mark.parametrize("plan", [VAEPlan(), VAEPlan(2, 2, frames=2), VAEPlan(2, 4, chunk=None, park=True)], ids=str)
def test_the_predicted_peak_is_the_allocator_s(version: str, part: str, plan: VAEPlan) -> None:
    """The predicted peak at 720p is within the 10 % that are promised."""
    width, height, config = 1280, 704, CONFIGS[version]
    request = Request(config, part, width, height, torch.bfloat16, capability_of(DEVICE), 3)
    before = torch.cuda.memory_allocated()  # workspaces of libraries, and graphs of other tests
    vae = model(version, part, torch.bfloat16)
    given = latents(version, 6, width, height) if part == "decode" else torch.rand(1, 3, 21, height, width)

    def run() -> None:
        if part == "decode":
            results = vae.decode_frames(given.split(3, dim=2), plan)
        else:
            results = vae.encode_stream(given.split([9, 12], dim=2), plan)
        for result in results:
            del result

    run()  # compiles, and fills what libraries allocate once
    release(DEVICE)
    torch.cuda.reset_peak_memory_stats()
    run()
    measured = torch.cuda.max_memory_allocated() - before - (given.nbytes if given.is_cuda else 0)
    assert predict(request, plan).total == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(("part", "dtype"), [("decode", torch.bfloat16), ("encode", torch.float32)])
def test_2k_runs_within_4_gb(part: str, dtype: torch.dtype) -> None:
    """The allocator refuses what is beyond the limit; a reserve is left for its fragments and cuDNN's workspaces."""
    vae = model("2.1", part, dtype)
    options = {"dtype": dtype, "limit": int(3.6 * GB), "capability": capability_of(DEVICE), "piece": 3}
    plan = plan_vae(vae.config, part, 2560, 1408, **options).plan
    release(DEVICE)
    with limited(DEVICE, 4 * GB):
        if part == "decode":
            results = vae.decode_frames(latents("2.1", 6, 2560, 1408).split(3, dim=2), plan)
            assert sum(frames.shape[1] for frames in results) == 21
        else:
            video = torch.rand(1, 3, 9, 1408, 2560)
            assert sum(z.shape[2] for z in vae.encode_stream(video.split([1, 8], dim=2), plan)) == 3
