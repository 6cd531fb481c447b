"""SwiftI2V (arXiv 2605.06356) in lean PyTorch: two Wan-compatible DiTs, the Wan VAE and segment-wise generation.

Reading order: ``config`` (what is built), ``dit``, ``tiling`` and ``vae`` (with ``vae_layers``, ``vae_decoder``,
``vae_encoder``), ``vae_plan`` (which tiles fit), ``csg`` (the windows and their sampler), ``pipeline`` (the two
stages), ``generate`` (the command). ``placement``, ``placed`` and ``block_stream`` put a DiT's blocks on the device, in
host memory or in files; ``memory_plan`` (with ``memory_search``, ``stage_choice``, ``vae_choice`` and the cost model in
``cost``) decides where, and ``plan`` is its command. ``run_state`` and ``resumable`` keep a run. ``weights`` loads
checkpoints, ``lora`` merges LoRAs into them and ``inspect`` says what a file is; ``encoders`` makes text and image
embeddings, ``media`` reads photographs and writes video files.
"""

from typing import TYPE_CHECKING, Any

from model.config import DiTConfig, VAEConfig
from model.csg import SegmentPlan, sample_latents
from model.dit import WanDiT
from model.errors import InputError
from model.lora import LoRA, apply_loras, merge_loras
from model.placement import Placement
from model.tiling import VAEPlan
from model.vae import WanVAE
from model.weights import load_dit, load_vae

if TYPE_CHECKING:
    from model.vae_plan import plan_vae

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
    "apply_loras",
    "load_dit",
    "load_vae",
    "merge_loras",
    "plan_vae",
    "sample_latents",
]


def __getattr__(name: str) -> Any:
    # Not imported with the package, because ``python -m model.vae_plan`` would then find it imported already and warn.
    if name == "plan_vae":
        from model.vae_plan import plan_vae

        return plan_vae
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
