"""Somebody else's Wan latents to frames within 4 GB, in tiles without seams."""

import tempfile

import torch
from diffusers import AutoencoderKLWan

from model import VAEConfig, VAEPlan, load_vae, plan_vae

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
with tempfile.TemporaryDirectory() as folder:
    # With real weights: vae = load_vae("Wan2.1_VAE.pth", decode_dtype=torch.bfloat16, device="cuda")
    theirs = AutoencoderKLWan(base_dim=4, z_dim=16)
    theirs.save_pretrained(folder)
    vae = load_vae(folder, decode_dtype=torch.float32, device=device)

# What the published VAE would do at 2560x1408 on a card of 4 GB: from shapes, on any machine. Pass planned.plan there.
planned = plan_vae(VAEConfig(), "decode", 2560, 1408, limit=4_000_000_000)
print(planned)

latents = torch.randn(1, 16, 3, 24, 32, device=device)  # as a pipeline has them: normalised; 9 frames of 192 x 256
tiles = VAEPlan(rows=planned.plan.rows, columns=planned.plan.columns)  # as many tiles of this small frame
frames = torch.cat(list(vae.decode_frames(latents.split(1, dim=2), tiles)), dim=1)

mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (theirs.config.latents_mean, theirs.config.latents_std))
with torch.no_grad():
    whole = theirs.decode(latents.cpu() * std + mean).sample.add(1).mul(127.5).round().to(torch.uint8)
largest = (frames.cpu().int() - whole.permute(0, 2, 3, 4, 1).int()).abs().max()
print(f"frames {tuple(frames.shape)} in {tiles.rows} x {tiles.columns} tiles")
print(f"largest difference from diffusers decoding all at once: {largest} of 255")
