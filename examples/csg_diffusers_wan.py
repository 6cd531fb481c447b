"""A diffusers Wan transformer that makes a clip segment by segment: it never works on more than one window of it."""

import torch
from diffusers import WanTransformer3DModel

from swifti2v_kernels import SegmentPlan, sample_segments
from swifti2v_kernels.integrations.diffusers import DiffusersWanWindow

torch.manual_seed(0)
# With real weights: WanTransformer3DModel.from_pretrained("Wan-AI/Wan2.2-TI2V-5B-Diffusers", subfolder="transformer")
transformer = WanTransformer3DModel(
    num_attention_heads=2,
    attention_head_dim=24,
    in_channels=36,  # latents, mask and reference, as in Wan I2V
    out_channels=16,
    text_dim=32,
    freq_dim=32,
    ffn_dim=64,
    num_layers=2,
).eval()
z = transformer.config.out_channels
text = torch.randn(1, 512, transformer.config.text_dim)  # stands for WanPipeline.encode_prompt
reference = torch.randn(1, z, 11, 8, 12)  # stands for 41 encoded frames: the image, and a rough version of the clip

model = DiffusersWanWindow(transformer, text)
plan = SegmentPlan(num_blocks=11, blocks_per_segment=3, neighbours_left=1)
sigmas = [1.0, 0.9375, 0.8333, 0.625, 0.0]  # four steps
segments = sample_segments(model, reference, plan=plan, sigmas=sigmas, seed=0, mask_channels=model.mask_channels)
for window, blocks in zip(plan, segments, strict=True):
    print(f"blocks {window.noisy} given {window.conditioning}: latents {tuple(blocks.shape)}")
most = max(len(window.blocks) for window in plan)
print(f"clip {tuple(reference.shape)} in {len(plan)} segments, at most {most} of {plan.num_blocks} blocks at once")
