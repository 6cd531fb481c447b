"""A diffusers image-to-video pipeline on our operators: two added lines."""

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from PIL import Image

from swifti2v_kernels.integrations.diffusers import accelerate  # added

torch.manual_seed(0)
# With real weights: pipe = WanImageToVideoPipeline.from_pretrained("Wan-AI/Wan2.2-I2V-A14B-Diffusers")
transformer = WanTransformer3DModel(
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=36,
    text_dim=32,
    freq_dim=32,
    ffn_dim=32,
    num_layers=2,
)
pipe = WanImageToVideoPipeline(
    tokenizer=None,
    text_encoder=None,
    vae=AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
    scheduler=FlowMatchEulerDiscreteScheduler(),
    transformer=transformer,
)
accelerate(pipe)  # added

video = pipe(
    image=Image.linear_gradient("L").convert("RGB").resize((48, 32)),
    prompt_embeds=torch.randn(1, 512, 32),  # with a text encoder: prompt="waves roll in"
    height=32,
    width=48,
    num_frames=9,
    num_inference_steps=2,
    guidance_scale=1.0,
    output_type="pt",
).frames
print(f"video {tuple(video.shape)}, finite: {bool(video.isfinite().all())}")
