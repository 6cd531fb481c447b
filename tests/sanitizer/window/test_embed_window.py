"""Out-of-bounds accesses, races and reads of unwritten memory in the window operators' kernels (see conftest.py)."""

from __future__ import annotations

import pytest
import torch

from swifti2v_kernels.window.embed_window import EmbedCall
from swifti2v_kernels.window.embed_window_kernel import launch as launch_embed_window
from swifti2v_kernels.window.project_step import ProjectCall
from swifti2v_kernels.window.project_step_kernel import launch as launch_project_step
from tests.support.tolerances import KERNEL, relative_error
from tests.support.window_oracle import convolved, int32, stepped


@pytest.mark.parametrize("mask_channels", [0, 1])
def test_embedding_stays_inside(mask_channels: int) -> None:
    """Stores, weight and tokens of exactly this size stay inside; a tile of tokens and one of channels are not full."""
    latents, reference = torch.randn(2, 3, 4, 4, 6).to("cuda"), torch.randn(2, 3, 5, 4, 6).to("cuda", torch.bfloat16)
    weight = torch.randn(40, 6 + mask_channels, 1, 2, 2).to("cuda", torch.bfloat16)
    bias = torch.randn(40).to("cuda", torch.bfloat16)
    indices = int32(3, -1, 0, device="cuda"), int32(4, 0, 4, device="cuda")
    mask = torch.tensor([0.0, 1.0, 0.0]).to("cuda") if mask_channels else None
    out = torch.empty(2, 18, 40, device="cuda", dtype=torch.bfloat16)
    launch_embed_window(EmbedCall(latents, weight, bias, reference, *indices, mask, out))
    options = {"reference": reference, "latent_index": indices[0], "reference_index": indices[1], "mask": mask}
    assert relative_error(out, convolved(latents, weight, bias, **options)) < KERNEL["bfloat16"]


def test_embedding_of_indices_out_of_range_stays_inside() -> None:
    latents, weight = torch.randn(1, 4, 3, 4, 4).to("cuda"), torch.randn(24, 4, 1, 2, 2).to("cuda")
    out = torch.empty(1, 16, 24, device="cuda")
    index = int32(3, 0, -1, 2**30, device="cuda")
    launch_embed_window(EmbedCall(latents, weight, None, None, index, None, None, out))
    assert torch.equal(out.isnan().all(2).view(4, 4).all(1).cpu(), torch.tensor([True, False, True, True]))


@pytest.mark.parametrize("step", [None, -0.5, "tensor"])
def test_head_stays_inside(step: float | str | None) -> None:
    x = torch.randn(2, 18, 40).to("cuda", torch.bfloat16)
    weight, bias = torch.randn(12, 40).to("cuda", torch.bfloat16), torch.randn(12).to("cuda", torch.bfloat16)
    shift, scale = torch.randn(2, 2, 3, 40).to("cuda")
    out = torch.randn(2, 3, 4, 4, 6).to("cuda")
    value = torch.tensor([0.25]).to("cuda") if step == "tensor" else step
    indices = int32(3, -1, 0, device="cuda"), int32(2, 2, 0, device="cuda")
    options = {"latent_index": indices[0], "block_map": indices[1], "step": value}
    expected = stepped(x, weight, bias, shift, scale, out, **options)
    tensor, factor = (value, None) if step == "tensor" else (None, step)
    launch_project_step(ProjectCall(x, weight, bias, shift, scale, out, *indices, tensor, factor, (1, 2, 2), 1e-6))
    assert relative_error(out, expected) < KERNEL["bfloat16"]


def test_head_of_indices_out_of_range_stays_inside() -> None:
    x, weight = torch.randn(1, 12, 24).to("cuda"), torch.randn(16, 24).to("cuda")
    shift, scale = torch.randn(2, 1, 2, 24).to("cuda")
    out = torch.zeros(1, 4, 2, 4, 4, device="cuda")
    indices = int32(2, 1, -5, device="cuda"), int32(0, 2, 1, device="cuda")
    launch_project_step(ProjectCall(x, weight, None, shift, scale, out, *indices, None, None, (1, 2, 2), 1e-6))
    assert (out[:, :, 0] == 0).all()
    assert out[:, :, 1].isnan().all()
