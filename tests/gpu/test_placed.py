"""Streamed and 8-bit weights on hardware: copies on a stream of their own, pinned memory, and what is allocated."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import DiTConfig, SegmentPlan, WanDiT, sample_latents
from model.machine.host import Host, pinned_bytes
from model.streaming.placement import Placement, placed_bytes
from model.weights.load import load_dit, random_weights

pytestmark = pytest.mark.gpu
#: Layers of 40 MB: a copy takes longer than such a layer's work on few tokens, so that a missing wait shows.
CONFIG = DiTConfig(num_heads=10, ffn_dim=3584, num_layers=8, text_dim=64)
CUDA = torch.device("cuda")
WHERE = [{}, {"resident": 0}, {"resident": 3}, {"resident": 2, "pinned": 2}, {"resident": 0, "pinned": 0}]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator(CUDA).manual_seed(0)
    latents = torch.randn(1, CONFIG.in_channels, 3, 16, 24, generator=draw, device=CUDA)
    timestep = torch.tensor([[0.0, 500.0, 500.0]], device=CUDA)
    return latents, timestep, torch.randn(1, 33, CONFIG.text_dim, generator=draw, device=CUDA)


def model(placement: Placement | None) -> WanDiT:
    return random_weights(WanDiT, CONFIG, 1, dtype=torch.bfloat16, device=CUDA, placement=placement)


@pytest.mark.parametrize("quantize", ["none", "float8", "int8"])
@pytest.mark.parametrize("where", WHERE, ids=str)
def test_where_weights_live_changes_nothing(where: dict, quantize: str) -> None:
    """Many passes, one right after the other while nothing waits for the device, give the same numbers."""
    with torch.no_grad():
        expected = model(Placement(quantize=quantize))(*inputs())
        streamed = model(Placement(**where, quantize=quantize))
        found = [streamed(*inputs()) for _ in range(6)]
        assert all(torch.equal(one, expected) for one in found)


def test_a_pass_allocates_what_one_with_resident_weights_does() -> None:
    """Copies and unpacking take nothing of the allocator: the same number of allocations, and the same peak above."""
    counts, above = [], []
    for placement in (Placement(), Placement(resident=0), Placement(resident=2, quantize="float8")):
        dit = model(placement)
        given = inputs()
        with torch.no_grad():
            dit(*given)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before, base = torch.cuda.memory_stats()["allocation.all.allocated"], torch.cuda.memory_allocated()
            dit(*given)
            torch.cuda.synchronize()
        counts.append(torch.cuda.memory_stats()["allocation.all.allocated"] - before)
        above.append(torch.cuda.max_memory_allocated() - base)
        del dit, given
        gc.collect()
    assert len(set(counts)) == 1, counts
    assert len(set(above)) == 1, above


@pytest.mark.parametrize("where", WHERE, ids=str)
def test_the_device_holds_what_was_promised(where: dict) -> None:
    placement = Placement(**where, quantize="float8")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    dit = model(placement)
    promised = placed_bytes(CONFIG, torch.bfloat16, placement).device
    assert torch.cuda.memory_allocated() - before == pytest.approx(promised, rel=0.005)
    del dit
    gc.collect()
    assert torch.cuda.memory_allocated() == before


def test_pinned_memory_has_the_size_that_was_asked_for_and_is_let_go() -> None:
    flat = pinned_bytes(3_000_001, CUDA)
    assert flat.is_pinned()
    assert flat.numel() == 3_000_001
    assert flat.untyped_storage().nbytes() < 3_000_001 + 2 * 4096
    flat.fill_(7)
    there = torch.empty_like(flat, device=CUDA)
    there.copy_(flat, non_blocking=True)
    del flat
    gc.collect()
    assert int(there.sum()) == 7 * 3_000_001


def test_memory_that_cannot_be_pinned_is_an_ordinary_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second registration of the same pages fails, and what runs next does not hear of it."""
    first = pinned_bytes(100_000, CUDA)
    assert int(torch.cuda.cudart().cudaHostRegister(first.data_ptr(), 4096, 0)) != 0
    with pytest.raises(RuntimeError):
        torch.zeros(1, device=CUDA)
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: first._base)
    with pytest.warns(RuntimeWarning, match="100,000 bytes of host memory could not be pinned"):
        pinned_bytes(100_000, CUDA)
    monkeypatch.undo()
    assert int(torch.zeros(1, device=CUDA)) == 0


def test_pinned_buffers_that_are_in_use_are_not_given_out_again() -> None:
    host = Host(CUDA, True)
    one = host.empty((5_000,), torch.bfloat16)
    assert one.is_pinned()
    assert host.empty((5_000,), torch.bfloat16).data_ptr() != one.data_ptr()


def test_steps_with_8_bit_weights_are_replayed_as_graphs() -> None:
    """Unpacking is part of the captured step."""
    found = []
    for cuda_graph in (False, True):
        latents, _, text = inputs()
        clip = latents[:, :16].float().clone()
        options = {"plan": SegmentPlan(3, 1), "sigmas": [1.0, 0.7, 0.4, 0.0], "seed": 1, "cuda_graph": cuda_graph}
        with torch.no_grad():
            list(sample_latents(model(Placement(quantize="float8")), clip, text, **options))
        found.append(clip)
    assert torch.equal(*found)


def test_a_model_may_be_let_go_while_its_next_blocks_are_on_their_way() -> None:
    """The slots' memory is not given to others before the copies into it are over."""
    with torch.no_grad():
        for _ in range(5):
            dit = model(Placement(resident=0))
            dit(*inputs())
            del dit
            others = [torch.zeros(40_000_000, dtype=torch.uint8, device=CUDA) for _ in range(4)]
            torch.cuda.synchronize()
            assert all(int(other.count_nonzero()) == 0 for other in others)


def test_blocks_come_from_a_file_in_every_pass(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch", reason="safetensors is not installed").save_file
    dit = model(None)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.cpu().contiguous() for name, tensor in dit.state_dict().items()}, path)
    options = {"config": CONFIG, "dtype": torch.bfloat16, "device": CUDA}
    streamed = load_dit(path, **options, placement=Placement(resident=1, pinned=0))
    with torch.no_grad():
        expected = dit(*inputs())
        assert all(torch.equal(streamed(*inputs()), expected) for _ in range(3))
