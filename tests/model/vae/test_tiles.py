"""Tiles are exact: at any size, in any pieces, encoded or decoded, they equal the whole frame in bounded memory."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import VAEPlan, WanVAE, load_vae
from model.machine.counted import TensorMemory
from model.machine.finite import NotFiniteError
from model.machine.host import Host
from model.pipeline.stages import UpsampledFrames, interpolation_matrix
from model.vae.tiles import Region, Span
from tests.model.vae.test_model import VERSIONS, saved_diffusers_vae
from tests.support.products import half
from tests.support.tolerances import EXACT, PARITY, relative_error

#: Tiles from one latent pixel to more than there are, any number of frames at once, chunks of any length.
PLANS = {
    "smallest tiles": VAEPlan(4, 5, frames=2, chunk=2),
    "uneven tiles, frame by frame": VAEPlan(3, 2, frames=1, chunk=1),
    "a tile runs through the clip": VAEPlan(2, 2, frames=4, chunk=None),
    "more tiles than latent pixels, odd frames": VAEPlan(100, 2, frames=3, chunk=3),
}


class OtherMemory(Host):
    """A host memory on the CPU that overwrites every parked tensor with NaN, so that only its copy can be used."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), True)
        self.enabled = True
        self.parked = 0

    def park(self, x: Tensor) -> Tensor:
        self.parked += 1
        copy = x.clone(memory_format=torch.contiguous_format)
        # A view is left as it is: the memory that it shares may still be read.
        if x.is_floating_point() and x._base is None:
            x.fill_(float("nan"))
        return copy

    def fetch(self, x: Tensor) -> Tensor:
        return x.clone()


def model(version: str, path: Path, dtype: torch.dtype = torch.float64) -> WanVAE:
    saved_diffusers_vae(path, **VERSIONS[version])
    return load_vae(path, dtype=dtype)


@pytest.mark.parametrize(
    ("version", "name"),
    half(["2.1", "2.1, other temporal stages", "2.2", "2.2, two blocks a stage"], PLANS),
)
def test_tiles_equal_the_whole_frame(version: str, name: str, tmp_path: Path) -> None:
    """Tiles equal the whole frame; in float64 rounding does not hide a halo that is one pixel short."""
    vae, plan = model(version, tmp_path), PLANS[name]
    stride = vae.config.spatial_stride
    latents = torch.randn(1, vae.config.z_dim, 3, 3, 4, dtype=torch.float64)
    video = torch.rand(1, 3, 9, 3 * stride, 4 * stride, dtype=torch.float64) * 2 - 1
    assert relative_error(vae.decode(latents, plan), vae.decode(latents)) < EXACT
    assert relative_error(vae.encode(video, plan), vae.encode(video)) < EXACT


@pytest.mark.parametrize("version", ["2.1", pytest.param("2.2", marks=pytest.mark.slow)])
def test_pieces_through_tiles(version: str, tmp_path: Path) -> None:
    """Segments that arrive one after the other pass through tiles that wait in between; in batches, and to bytes."""
    vae = model(version, tmp_path)
    latents = torch.randn(2, vae.config.z_dim, 6, 3, 4, dtype=torch.float64)
    plan = VAEPlan(2, 2, frames=2, chunk=2)
    whole = vae.decode(latents)
    pieces = list(vae.decode_stream(latents.split([1, 3, 2], dim=2), plan))
    assert [piece.shape[2] for piece in pieces] == [1, 12, 8]
    assert relative_error(torch.cat(pieces, dim=2), whole) < EXACT
    frames = torch.cat(list(vae.decode_frames(iter(latents.split([4, 2], dim=2)), plan)), dim=1)
    assert frames.dtype == torch.uint8
    expected = (whole.permute(0, 2, 3, 4, 1) * 127.5 + 128).floor().clamp(0, 255)
    # Rounding may move a number over the boundary between two bytes.
    assert (frames.double() - expected).abs().max() <= 1
    assert (frames.double() != expected).float().mean() < 1e-3


@pytest.mark.parametrize(("version", "chunk"), half(["2.1", "2.2"], [1, 2, None]))
def test_what_waits_in_host_memory_comes_back(version: str, chunk: int | None, tmp_path: Path) -> None:
    """A clip whose states wait in host memory is the same: what is left on the device is overwritten with NaN."""
    vae = model(version, tmp_path)
    stride = vae.config.spatial_stride
    latents = torch.randn(1, vae.config.z_dim, 5, 3, 4, dtype=torch.float64)
    video = torch.rand(1, 3, 17, 3 * stride, 4 * stride, dtype=torch.float64) * 2 - 1
    plan, memories = VAEPlan(2, 2, frames=2, chunk=chunk, park=True), [OtherMemory(), OtherMemory()]
    decoded = vae.decode_stream(latents.split([2, 3], dim=2), plan, host=memories[0])
    assert relative_error(torch.cat(list(decoded), dim=2), vae.decode(latents)) < EXACT
    encoded = vae.encode_stream(video.split([5, 12], dim=2), plan, host=memories[1])
    assert relative_error(torch.cat(list(encoded), dim=2), vae.encode(video)) < EXACT
    assert all(memory.parked > 20 for memory in memories)


def test_memory_does_not_grow_with_the_clip(tmp_path: Path) -> None:
    """Decoded and encoded in pieces, a clip three times as long has the same peak, to the byte."""
    vae, plan = model("2.1", tmp_path, torch.float32), VAEPlan(1, 2)

    def peaks(blocks: int) -> tuple[int, int]:
        with TensorMemory(vae.parameters()) as memory:
            for frames in vae.decode_frames((torch.randn(1, 4, 1, 2, 3) for _ in range(blocks)), plan):
                del frames
        with TensorMemory(vae.parameters()) as other:
            for latents in vae.encode_stream((torch.zeros(1, 3, 4 if i else 1, 16, 24) for i in range(blocks)), plan):
                del latents
        return memory.peak, other.peak

    assert peaks(4) == peaks(12)


def test_a_region_is_part_of_the_memory_that_holds_it() -> None:
    region = Region(Span(2, 5, 8), Span(0, 3, 4))
    held = torch.arange(20).view(1, 1, 5, 4, 1)
    assert torch.equal(region.part_of(held, Region(Span(1, 6, 8), Span(0, 4, 4))), held[:, :, 1:4, :3])
    with pytest.raises(ValueError, match="is not within"):
        region.part_of(held, Region(Span(3, 8, 8), Span(0, 4, 4)))


def test_plans_that_cannot_be_are_refused() -> None:
    for options, message in (
        ({"rows": 0}, "rows: expected at least 1, got 0"),
        ({"chunk": 0}, "chunk: expected at least 1, or None for the whole clip, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            VAEPlan(**options)


def test_nan_is_named_and_not_painted_black(tiny_vae: WanVAE) -> None:
    latents, video = torch.randn(1, 4, 5, 2, 3), torch.rand(1, 3, 17, 16, 24)
    latents[0, 1, 3, 1, 1] = float("nan")
    with pytest.raises(ValueError, match="latents: NaN in latent frame 3"):
        list(tiny_vae.decode_frames(latents.split(2, dim=2)))
    video[0, 1, 9] = float("nan")
    with pytest.raises(ValueError, match="the VAE's encoder: NaN in latent frame 3"):
        tiny_vae.encode(video)


def test_features_that_overflow_are_no_frame(tiny_vae: WanVAE) -> None:
    """Features beyond the range of the dtype end the decoding; pixels of 8 bits would hide them."""
    vae = copy.deepcopy(tiny_vae)
    with torch.no_grad():
        vae.decoder.up_blocks[-1].resnets[-1].conv2.bias.fill_(torch.inf)
    frames = vae.decode_frames(torch.randn(1, 4, 5, 2, 3).split(1, dim=2))
    with pytest.raises(NotFiniteError, match="the VAE's decoder: NaN"):
        next(frames)


def test_pieces_of_another_size_are_refused(tiny_vae: WanVAE) -> None:
    with pytest.raises(ValueError, match=r"latents: expected \(2, 3\) pixels as before, got \(3, 3\)"):
        list(tiny_vae.decode_stream([torch.zeros(1, 4, 1, 2, 3), torch.zeros(1, 4, 1, 3, 3)]))
    with pytest.raises(ValueError, match=r"video: expected \(2, 3\) latent pixels as before, got \(3, 3\)"):
        list(tiny_vae.encode_stream([torch.zeros(1, 3, 1, 16, 24), torch.zeros(1, 3, 4, 24, 24)]))
    with pytest.raises(ValueError, match="video: expected a multiple of 4 frames in this piece, got 3"):
        list(tiny_vae.encode_stream([torch.zeros(1, 3, 1, 16, 24), torch.zeros(1, 3, 3, 16, 24)]))


def test_halves_have_dtypes_of_their_own(tmp_path: Path) -> None:
    """Decoding in bfloat16 is close to float32; the encoder stays in float32, and may be released."""
    saved_diffusers_vae(tmp_path, **VERSIONS["2.1, two blocks a stage"])
    mixed = load_vae(tmp_path, decode_dtype=torch.bfloat16)
    exact = load_vae(tmp_path)
    assert (mixed.encode_dtype, mixed.decode_dtype) == (torch.float32, torch.bfloat16)
    latents, video = torch.randn(1, 4, 3, 4, 4), torch.rand(1, 3, 5, 16, 16)
    assert torch.equal(mixed.encode(video), exact.encode(video))
    mixed.drop_encoder()
    # Twenty layers of rounding with a relative error of 2**-9 each, random weights.
    assert relative_error(mixed.decode(latents).float(), exact.decode(latents)) < 2e-2


def test_upsampled_frames_are_torch_s_at_any_cut() -> None:
    low, first = torch.rand(2, 3, 4, 9, 14) * 2 - 1, torch.rand(2, 3, 1, 24, 40)
    seen: list[int] = []
    cpu = torch.device("cpu")
    matrices = interpolation_matrix(9, 24, cpu), interpolation_matrix(14, 40, cpu)
    source = UpsampledFrames(low, *matrices, first, seen.append)
    assert tuple(source.shape) == (2, 3, 4, 24, 40)
    flat = low.transpose(1, 2).flatten(0, 1)
    whole = F.interpolate(flat, (24, 40), mode="bicubic", align_corners=False).clamp(-1, 1)
    whole = whole.unflatten(0, (2, 4)).permute(0, 1, 3, 4, 2).clone()
    whole[:, :1] = first.permute(0, 2, 3, 4, 1)
    for start, stop, rows, columns in ((0, 4, (0, 24), (0, 40)), (0, 1, (3, 9), (1, 2)), (2, 3, (23, 24), (17, 31))):
        region = Region(Span(*rows, 24), Span(*columns, 40))
        part = source.crop(start, stop, region, cpu, torch.float32)
        assert part.is_contiguous()
        expected = whole[:, start:stop, slice(*rows), slice(*columns)]
        assert relative_error(part, expected) < PARITY
    assert seen == [4, 1, 1]
