"""SwiftI2V (arXiv 2605.06356) in lean PyTorch: two Wan-compatible DiTs, the Wan VAE and segment-wise generation.

One room a subject, in reading order; what comes later imports what comes before:

    config, sizes    configurations of the models; allowed widths, heights and numbers of frames
    machine          cards, host memory, counted memory, sizes and times
    io               photographs, video files, files that are whole or not there
    dit              the diffusion transformer
    vae              the autoencoder, whole or in exact tiles
    csg              windows, their sampler, the steps of one window
    streaming        where a DiT's layers live: device, host memory or files
    weights          checkpoints, 8-bit files and LoRAs
    pipeline         both stages, one clip
    memory           the planner: which placement and tiles fit, and what they take
    resume           runs that go on from any end
    cli              what the commands share

On top are the commands ``generate``, ``plan`` and ``inspect``.
"""

from model.config import DiTConfig, VAEConfig
from model.csg.sampler import SegmentPlan, sample_latents
from model.dit.model import WanDiT
from model.errors import InputError
from model.memory.vae_plan import plan_vae
from model.streaming.placement import Placement
from model.vae.model import WanVAE
from model.vae.tiles import VAEPlan
from model.weights.load import load_dit, load_vae
from model.weights.lora import LoRA, merge_loras

__all__ = [
    "DiTConfig",
    "InputError",
    "LoRA",
    "Placement",
    "SegmentPlan",
    "VAEConfig",
    "VAEPlan",
    "WanDiT",
    "WanVAE",
    "load_dit",
    "load_vae",
    "merge_loras",
    "plan_vae",
    "sample_latents",
]
