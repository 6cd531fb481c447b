"""The models and sizes that are compared, and the ways to make a clip with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from model.config import PRESETS, DiTConfig, VAEConfig, stage_two_config
from model.csg.sampler import SegmentPlan
from swifti2v_kernels.common import shapes

SIZES = {name: shapes.SIZES[name] for name in ("720p", "1080p", "2K")}
#: Steps of the paper's end-to-end baseline.
BASELINE_STEPS = 50


@dataclass(frozen=True)
class Setup:
    """One model at one size: its DiT makes the clip end-to-end, or by CSG after ``stage_one``."""

    model: str
    size: str
    width: int
    height: int
    num_frames: int
    dit: DiTConfig
    stage_one: DiTConfig
    vae: VAEConfig
    steps: int = 4

    @property
    def num_blocks(self) -> int:
        """The number of latent frames."""
        return 1 + (self.num_frames - 1) // self.vae.temporal_stride

    @property
    def latent_size(self) -> tuple[int, int]:
        """The rows and columns of a latent frame."""
        return self.height // self.vae.spatial_stride, self.width // self.vae.spatial_stride

    @property
    def name(self) -> str:
        """The model and the size, for progress and messages."""
        return f"{self.model}, {self.size}"

    def reduced(self) -> Setup:
        """Returns the same structure with few channels, a sixteenth of the size and a short clip."""
        heads = max(1, self.dit.num_heads // 12)
        small = {"num_heads": heads, "head_dim": 64, "num_layers": 4, "ffn_dim": 128 * heads, "text_dim": 16}
        small |= {"freq_dim": 32}
        step = 2 * self.vae.spatial_stride
        width, height = (max(n // 16 // step, 2) * step for n in (self.width, self.height))
        return replace(
            self, size=f"small {self.size}", width=width, height=height, num_frames=33,
            dit=replace(self.dit, **small), stage_one=replace(self.stage_one, **small),
            vae=replace(self.vae, base_dim=4, decoder_base_dim=4),
        )  # fmt: skip


def _models() -> dict[str, tuple[DiTConfig, DiTConfig, VAEConfig]]:
    """Returns, by name, the DiT, Stage I before it and the VAE. The 1.3B has the paper's large Stage I."""
    mixed, small = PRESETS["14b-1.3b"], PRESETS["5b"]
    return {
        "1.3b": (mixed.stage_two, mixed.stage_one, mixed.vae),
        "5b": (small.stage_two, small.stage_one, small.vae),
        "14b": (stage_two_config(mixed.stage_one), mixed.stage_one, mixed.vae),
    }


MODELS = tuple(_models())


def setups(models: Sequence[str], sizes: Sequence[str], num_frames: int, steps: int) -> list[Setup]:
    """Returns all models at all sizes."""
    found = _models()
    return [Setup(model, size, *SIZES[size], num_frames, *found[model], steps) for size in sizes for model in models]


@dataclass(frozen=True)
class Variant:
    """A way to cut the clip, for the ablations."""

    name: str
    plan: SegmentPlan
    mode: str = "bidirectional"


def variants(num_blocks: int) -> list[Variant]:
    """Returns the paper's setting, then what its ablations change: M, N, the direction of attention, the anchor."""
    plans = {
        f"M={m}, N={left}{f'+{right}' if right else ''}": SegmentPlan(num_blocks, m, left, right)
        for m, left, right in ((3, 1, 0), (1, 1, 0), (2, 1, 0), (5, 1, 0), (3, 0, 0), (3, 2, 0), (3, 1, 1))
    }
    found = [Variant(name, plan) for name, plan in plans.items()]
    paper = found[0].plan
    found.append(Variant("M=3, N=1, causal", paper, "causal"))
    found.append(Variant("M=3, N=1, no anchor", replace(paper, anchor=False)))
    return found
