"""The versions, sizes and clip lengths that ``python -m bench vae`` measures, and small stand-ins for a CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

from model.config import PRESETS, VAEConfig
from swifti2v_kernels.common.shapes import SIZES

VERSIONS = {"2.1": VAEConfig(), "2.2": PRESETS["5b"].vae}
PARTS = ("decode", "encode")


@dataclass(frozen=True)
class Shape:
    """A clip of one size and length, for one version of the VAE."""

    version: str
    name: str
    width: int
    height: int
    num_frames: int
    config: VAEConfig
    #: diffusers' tiles and their distance, pixels.
    tile: int = 256
    stride: int = 192

    @property
    def blocks(self) -> int:
        """The number of latent frames."""
        return 1 + (self.num_frames - 1) // self.config.temporal_stride

    @property
    def latent_size(self) -> tuple[int, int]:
        """The rows and columns of a latent frame."""
        return self.height // self.config.spatial_stride, self.width // self.config.spatial_stride

    def __str__(self) -> str:
        return f"{self.version}, {self.name}, {self.num_frames} frames"

    def reduced(self) -> Shape:
        """Returns the shape with few channels, an eighth of its sides, and about as many of diffusers' tiles."""
        step = self.config.spatial_stride
        width, height = (n // 8 // step * step for n in (self.width, self.height))
        config = replace(self.config, base_dim=4, decoder_base_dim=4)
        frames = 1 + self.config.temporal_stride * (2 if self.num_frames <= 81 else 4)
        return Shape(self.version, f"small {self.name}", width, height, frames, config, 4 * step, 3 * step)


SHAPES = [
    Shape(version, name, width, height, frames, config)
    for version, config in VERSIONS.items()
    for name, (width, height) in SIZES.items()
    for frames in (81, 161)
]
QUICK_SHAPES = [shape for shape in SHAPES if str(shape) == "2.1, 720p, 81 frames"]
