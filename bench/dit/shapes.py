"""The windows that ``python -m bench dit`` measures layers with: a model and its blocks of tokens."""

from __future__ import annotations

from dataclasses import dataclass

from model.config import PRESETS, DiTConfig
from model.dit.workspace import MAX_PART_TOKENS
from swifti2v_kernels.common.shapes import MODELS, WINDOWS


@dataclass(frozen=True)
class Shape:
    """A window of ``blocks`` latent frames of ``height x width`` tokens, the last ``targets`` of which are denoised."""

    name: str
    config: DiTConfig
    blocks: int
    height: int
    width: int
    targets: int
    text: int = 512
    part: int = MAX_PART_TOKENS

    @property
    def block_len(self) -> int:
        """The tokens of one block."""
        return self.height * self.width

    @property
    def tokens(self) -> int:
        """The tokens of the window."""
        return self.blocks * self.block_len

    @property
    def given(self) -> int:
        """Blocks that are not denoised."""
        return self.blocks - self.targets

    @property
    def layer_flops(self) -> int:
        """The operations of one layer; text keys and values are not counted."""
        length, dim = self.tokens, self.config.dim
        linear = 2 * length * dim * (6 * dim + 2 * self.config.ffn_dim)
        return linear + 4 * length * dim * (length + self.text)


def _shape(name: str) -> Shape:
    window = WINDOWS[name]
    presets = {"1.3B": PRESETS["1.3b"].stage_two, "5B": PRESETS["5b"].stage_two, "14B": PRESETS["14b-1.3b"].stage_one}
    (config,) = [config for model, config in presets.items() if MODELS[model] == window.model]
    return Shape(name, config, window.blocks, *window.grid, window.targets)


SHAPES = tuple(
    _shape(name)
    for name in (
        "CSG window 2560x1408, 1.3B", "CSG window 2560x1408, 5B", "Stage I 640x352, 14B", "Stage I 640x352, 1.3B",
    )
)  # fmt: skip
QUICK_SHAPES = (_shape("CSG window 1280x704, 1.3B"),)
