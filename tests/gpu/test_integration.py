"""diffusers' models on our operators on a GPU: bfloat16, the kernels, offloading with streams. Needs diffusers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.tolerances import BFLOAT16_MODEL, relative_error

pytestmark = pytest.mark.gpu


@pytest.fixture
def hosts() -> Any:
    """The tiny models; a machine without diffusers runs the rest of the hardware tests."""
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from tests.support import diffusers_models

    return diffusers_models


def moved(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(moved(x) for x in value)
    if not isinstance(value, torch.Tensor):
        return value
    return value.to("cuda", torch.bfloat16) if value.is_floating_point() else value.to("cuda")


@pytest.mark.parametrize("offload", [None, "leaf_level", "block_level"])
@pytest.mark.parametrize(
    "name", ["Wan 2.1 image-to-video (CLIP)", "Wan 2.2 TI2V-5B", "HunyuanVideo", "LTX-Video", "CogVideoX"]
)
def test_bfloat16_is_as_near_to_float32_as_diffusers_is(name: str, offload: str | None, hosts: Any) -> None:
    """A model in bfloat16 is as near to float32 as diffusers' own.

    Under group offloading on a stream, a weight that is read before its copy is waited for would show here.
    """
    from swifti2v_kernels.integrations.diffusers import accelerate, restore

    model = hosts.MODELS[name]
    module = hosts.build(model, head_dim=64)
    inputs = model.inputs(module)
    exact = hosts.run(module, inputs)
    module = module.to(torch.bfloat16).to("cuda")
    on_gpu = {key: moved(value) for key, value in inputs.items()}
    theirs = hosts.run(module, on_gpu)
    accelerate(module)
    if offload is not None:
        options = {"num_blocks_per_group": 1} if offload == "block_level" else {}
        module.enable_group_offload(
            onload_device=torch.device("cuda"), offload_type=offload, use_stream=True, record_stream=True, **options
        )
    for _ in range(2):  # the first pass learns the order of the groups
        ours = hosts.run(module, on_gpu)
        assert relative_error(ours.cpu(), exact) < max(BFLOAT16_MODEL, 1.5 * relative_error(theirs.cpu(), exact))
    restore(module)
    assert torch.equal(hosts.run(module, on_gpu), theirs)


def test_the_vae_in_bfloat16(hosts: Any) -> None:
    import diffusers

    from swifti2v_kernels.integrations.diffusers import accelerate

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(base_dim=16, z_dim=16).eval()
    latents = torch.randn(1, 16, 3, 8, 8)
    with torch.no_grad():
        exact = vae.decode(latents, return_dict=False)[0]
        vae = vae.to("cuda", torch.bfloat16)
        theirs = vae.decode(latents.to("cuda", torch.bfloat16), return_dict=False)[0]
        accelerate(vae)
        ours = vae.decode(latents.to("cuda", torch.bfloat16), return_dict=False)[0]
    assert relative_error(ours.cpu(), exact) < max(BFLOAT16_MODEL, 1.5 * relative_error(theirs.cpu(), exact))
