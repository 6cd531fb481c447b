"""The shapes of real models: one table for the cases of operators and for benchmarks of layers and clips."""

from __future__ import annotations

from typing import NamedTuple


class Model(NamedTuple):
    """A video DiT; ``patch`` is the side of a token in pixels, ``hidden`` are the features of its feed-forward."""

    heads: int
    hidden: int
    patch: int = 16
    head_dim: int = 128

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_dim


class Window(NamedTuple):
    """Blocks of tokens that a model takes at a time; the last ``targets`` of them are denoised."""

    name: str
    model: Model
    width: int
    height: int
    blocks: int
    targets: int

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens in a block."""
        return self.height // self.model.patch, self.width // self.model.patch

    @property
    def block_len(self) -> int:
        """The tokens of one block."""
        rows, columns = self.grid
        return rows * columns

    @property
    def tokens(self) -> int:
        """The tokens of the window."""
        return self.blocks * self.block_len


#: Width and height in pixels of the clips that are measured. Their VAE is Wan2.1's, with tokens of 16 pixels, or
#: Wan2.2's, with tokens of 32.
SIZES = {"360P": (640, 352), "720p": (1280, 704), "1080p": (1920, 1088), "2K": (2560, 1408)}
#: Wan's DiTs by their size, and two of others.
MODELS = {
    "1.3B": Model(12, 8960), "5B": Model(24, 14_336, 32), "14B": Model(40, 13_824),
    "HunyuanVideo": Model(24, 12_288), "LTX-Video": Model(32, 8192, 32, 64),
}  # fmt: skip


def _wan(name: str, model: str, size: str, blocks: int, targets: int) -> Window:
    width, height = SIZES[size]
    return Window(f"{name} {width}x{height}, {model}", MODELS[model], width, height, blocks, targets)


#: A CSG window holds the input image's block, one block before and three to denoise; Stage I is a clip of 81 frames.
WINDOWS = {
    window.name: window
    for window in (
        *(_wan("CSG window", "1.3B", size, 5, 3) for size in ("720p", "1080p", "2K")),
        _wan("CSG window", "5B", "2K", 5, 3),
        _wan("Stage I", "14B", "360P", 21, 20),
        _wan("Stage I", "1.3B", "360P", 21, 20),
        Window("HunyuanVideo 1280x720, 61 frames", MODELS["HunyuanVideo"], 1280, 720, 16, 16),
        Window("LTX-Video 1216x704, 121 frames", MODELS["LTX-Video"], 1216, 704, 16, 16),
    )
}
