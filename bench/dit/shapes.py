"""The windows that ``python -m bench dit`` measures: a model, its blocks of tokens, and the stores that they lie in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from model.config import MASK_CHANNELS, PRESETS, DiTConfig
from model.dit.workspace import MAX_PART_TOKENS

ITEMSIZE = 2  # bf16
STORE_ITEMSIZE = 4  # latents are float32


@dataclass(frozen=True)
class Shape:
    """A window of ``blocks`` latent frames of ``height x width`` tokens, the last ``targets`` of which are denoised."""

    name: str
    config: DiTConfig
    blocks: int
    height: int
    width: int
    targets: int
    clip: int = 21
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
    def latent_channels(self) -> int:
        """Channels of the stores of latents."""
        return self.config.out_channels

    @property
    def mask_channels(self) -> int:
        """Channels of the mask among the model's inputs."""
        return MASK_CHANNELS if self.config.in_channels > self.latent_channels else 0

    @property
    def pixels(self) -> int:
        """Latent pixels of a token."""
        return prod(self.config.patch_size)

    @property
    def index(self) -> tuple[int, ...]:
        """The positions of the blocks in the clip: the input image first, then the clip's last ones."""
        return (0, *range(self.clip - self.blocks + 1, self.clip))

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

    def reduced(self) -> Shape:
        """Returns the same structure with one to three heads and at most a few hundred tokens, for the interpreter."""
        heads = max(1, self.config.num_heads // 12)
        dim = heads * self.config.head_dim
        hidden = round(self.config.ffn_dim * dim / self.config.dim)
        small = replace(self.config, num_heads=heads, num_layers=1, ffn_dim=hidden, text_dim=16, freq_dim=32)
        blocks = min(self.blocks, 4)
        targets = max(1, min(self.targets, blocks - 1))
        return Shape(self.name, small, blocks, 3, 5, targets, clip=6, text=9, part=20)


_1B, _5B, _14B = PRESETS["1.3b"].stage_two, PRESETS["5b"].stage_two, PRESETS["14b-1.3b"].stage_one
#: Tokens of a block: (height / 16) * (width / 16) with the Wan2.1 VAE, / 32 with the Wan2.2 one.
SHAPES = (
    Shape("CSG window 2560x1408, 1.3B", _1B, 5, 88, 160, 3),
    Shape("CSG window 2560x1408, 5B", _5B, 5, 44, 80, 3),
    Shape("Stage I 640x352, 14B", _14B, 21, 22, 40, 20),
    Shape("Stage I 640x352, 1.3B", _1B, 21, 22, 40, 20),
)
QUICK_SHAPES = (Shape("CSG window 1280x704, 1.3B", _1B, 5, 44, 80, 3),)
