"""Whole diffusers pipelines on our operators: transformers and VAE together, offloaded, with LoRA files."""

from __future__ import annotations

import diffusers
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from swifti2v_kernels.integrations.diffusers import HostChanged, accelerate, restore
from tests.integrations.diffusers.test_models import untouched
from tests.support.tolerances import PARITY, relative_error


def wan_pipeline() -> diffusers.WanImageToVideoPipeline:
    """Returns a tiny pipeline with the two experts of Wan2.2 A14B; its text encoder is there, embeddings are given."""
    torch.manual_seed(0)

    def transformer() -> diffusers.WanTransformer3DModel:
        return diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=36,
            text_dim=16,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
        ).eval()

    pipe = diffusers.WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
        vae=diffusers.AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=transformer(),
        transformer_2=transformer(),
        boundary_ratio=0.9,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def frames(pipe: diffusers.WanImageToVideoPipeline) -> Tensor:
    return pipe(
        image=Image.linear_gradient("L").convert("RGB").resize((48, 32)),
        prompt_embeds=torch.linspace(-1, 1, 512 * 16).view(1, 512, 16),
        height=32,
        width=48,
        num_frames=9,
        num_inference_steps=2,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames


@pytest.mark.compatibility("VAE encode", "VAE decode", model="Wan pipeline (two experts, VAE 2.1)")
@pytest.mark.compatibility("attention", "norms", "restore", model="Wan pipeline (two experts, VAE 2.1)")
def test_a_pipeline_gives_the_same_video_and_is_restored(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = wan_pipeline()
    expected = frames(pipe)
    report = accelerate(pipe)
    # Every component that is a module has its lines; the one that is not known is named.
    components = {line.component.split(".")[0] for line in (*report.replaced, *report.left)}
    assert components == {"transformer", "transformer_2", "vae", "text_encoder"}
    assert ("text_encoder", "UMT5EncoderModel", "not known") in {(x.component, x.host, x.text) for x in report.left}
    assert "text_encoder" in capsys.readouterr().out
    assert relative_error(frames(pipe), expected) < PARITY
    restore(pipe)
    assert torch.equal(frames(pipe), expected)


def test_all_models_of_a_pipeline_or_none() -> None:
    """The first expert is not patched if the second has lost an attribute."""
    pipe = wan_pipeline()
    expected = frames(pipe)
    lost = pipe.transformer_2.blocks[1].attn2.norm_k
    del pipe.transformer_2.blocks[1].attn2.norm_k
    with pytest.raises(
        HostChanged, match=r"transformer_2\.blocks\.1\.attn2 has no attribute 'norm_k'; nothing was changed"
    ):
        accelerate(pipe)
    pipe.transformer_2.blocks[1].attn2.norm_k = lost
    assert all(map(untouched, (pipe.transformer, pipe.transformer_2, pipe.vae)))
    assert torch.equal(frames(pipe), expected)
