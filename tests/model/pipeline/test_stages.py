"""Stage I, the hybrid reference and the streamed decode."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model import InputError, VAEConfig, WanDiT, WanVAE
from model.csg.schedule import flow_sigmas
from model.pipeline.stages import decode_frames, make_motion, make_reference, motion_condition
from model.sizes import area_size, check_frames, check_size, size_multiple, stage_one_size
from model.weights.load import random_weights
from swifti2v_kernels import block_noise
from tests.conftest import TINY_DIT, TINY_VAE
from tests.support.tolerances import PARITY, relative_error

TEXT = torch.zeros(1, 7, 16)
PICTURE = torch.rand(1, 3, 1, 32, 48, generator=torch.Generator().manual_seed(3)) * 2 - 1


def test_reference_is_the_encoded_clip_with_the_image_in_front(tiny_vae):
    """The streamed reference equals that of whole steps: decode all, upsample all, replace frame 0, encode all."""
    motion = torch.randn(1, 4, 4, 2, 3)
    low = tiny_vae.decode(motion)
    frames = torch.nn.functional.interpolate(low[0].transpose(0, 1), (32, 48), mode="bicubic").clamp(-1, 1)
    clip = torch.cat((PICTURE, frames.transpose(0, 1)[None, :, 1:]), dim=2)
    reference = make_reference(motion, tiny_vae, tiny_vae, PICTURE)
    assert relative_error(reference, tiny_vae.encode(clip)) < PARITY
    assert relative_error(reference[:, :, :1], tiny_vae.encode(PICTURE)) < PARITY


def test_reference_between_two_vaes_and_its_progress(tiny_vae):
    other = random_weights(WanVAE, replace(TINY_VAE, z_dim=6, latents_mean=(0,) * 6, latents_std=(1,) * 6), 5)
    seen = []
    reference = make_reference(torch.randn(1, 4, 3, 2, 3), tiny_vae, other, PICTURE, lambda *at: seen.append(at))
    assert reference.shape == (1, 6, 3, 4, 6)
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_stage_one_conditions_as_wan_image_to_video(tiny_vae):
    """Stage I follows the documented recipe: encode [image, grey frames], mask 1 on block 0, concatenate, Euler."""
    dit = random_weights(WanDiT, TINY_DIT, 1)
    sigmas = flow_sigmas(3, 5.0)
    start = motion_condition(tiny_vae, dit.config, PICTURE, 3)
    motion = make_motion([lambda: dit], start, TEXT, sigmas=sigmas, seed=4)
    condition = tiny_vae.encode(torch.cat((PICTURE, torch.zeros(1, 3, 8, 32, 48)), dim=2))
    mask = torch.zeros(1, 4, 3, 4, 6)
    mask[:, :, 0] = 1
    x = block_noise(4, 1, range(3), (4, 4, 6))
    for i in range(3):
        velocity = dit(torch.cat((x, mask, condition), dim=1), torch.tensor([1000 * sigmas[i]]), TEXT)
        x = x + (sigmas[i + 1] - sigmas[i]) * velocity
    assert relative_error(motion, x) < PARITY


def test_stage_one_conditions_as_ti2v_where_there_are_no_extra_channels(tiny_vae):
    """Block 0 is the image at timestep 0 in every step and in the result."""
    dit = random_weights(WanDiT, replace(TINY_DIT, in_channels=4), 1)
    sigmas = flow_sigmas(2, 5.0)
    start = motion_condition(tiny_vae, dit.config, PICTURE, 3)
    motion = make_motion([lambda: dit], start, TEXT, sigmas=sigmas, seed=4)
    image = tiny_vae.encode(PICTURE)
    x = block_noise(4, 1, range(3), (4, 4, 6))
    for i in range(2):
        x[:, :, :1] = image
        t = 1000 * sigmas[i]
        x = x + (sigmas[i + 1] - sigmas[i]) * dit(x, torch.tensor([[0.0, t, t]]), TEXT)
    assert relative_error(motion[:, :, 1:], x[:, :, 1:]) < PARITY
    assert torch.equal(motion[:, :, :1], image)


def test_decoded_frames_stream_and_equal_the_whole_decode(tiny_vae):
    latents = torch.randn(1, 4, 5, 2, 3)
    pulled = []

    def segments():
        for start in (1, 3):
            pulled.append(start)
            yield latents[:, :, start : start + 2]

    stream = decode_frames(tiny_vae, latents[:, :, :1], segments())
    assert len(next(stream)) == 1
    assert not pulled  # the first frame is there before any segment is generated
    assert len(next(stream)) == 4
    assert pulled == [1]
    frames = torch.cat(list(decode_frames(tiny_vae, latents[:, :, :1], segments())))
    assert frames.shape == (17, 16, 24, 3)
    expected = (tiny_vae.decode(latents)[0].permute(1, 2, 3, 0) + 1) * 127.5
    assert (frames.float() - expected).abs().max() < 0.51


def test_sizes():
    assert size_multiple(VAEConfig(), TINY_DIT) == 16
    assert stage_one_size(2560, 1408, 16) == (640, 352)
    assert stage_one_size(1408, 2560, 32) == (352, 640)
    assert stage_one_size(256, 144, 16) == (128, 64)
    assert area_size((640, 427), 2560 * 1408, 16) == (2320, 1552)
    assert [check_frames(n) for n in (5, 81, 161)] == [2, 21, 41]
    check_size(2560, 1408, 32)


@pytest.mark.parametrize(
    ("check", "given", "nearest"),
    [
        (check_size, (2560, 1400, 16), "2560x1408"), (check_size, (250, 1, 16), "256x16"),
        (check_size, (0, 16, 16), "16x16"), (check_frames, (80,), 81), (check_frames, (-3,), 5),
        (check_frames, (83,), 81),
    ],
)  # fmt: skip
def test_a_wrong_size_is_answered_with_the_nearest(check, given, nearest):
    with pytest.raises(InputError, match=f"got {'x'.join(map(str, given[:2]))}; nearest: {nearest}$"):
        check(*given)
