"""Sizes of clips: allowed widths, heights and numbers of frames, and Stage I's size for a target."""

from __future__ import annotations

from model.config import DiTConfig, VAEConfig
from model.errors import InputError

# Stage I works at 360P: its shorter side has at most this many pixels, and at most half of the target's.
STAGE_ONE_SHORT_SIDE = 352
#: Pixels of a side and of a frame at most: x264's limit, and that of H.264's highest level (6.2).
MOST_SIDE, MOST_PIXELS = 16384, 139_264 * 16 * 16
#: Frames at most: 7 minutes at 24 a second. Stage I has all of them in one window.
MOST_FRAMES = 10_001


def nearest_multiple(size: int, multiple: int) -> int:
    """Returns the multiple of ``multiple`` (at least one) next to ``size``."""
    return max(round(size / multiple), 1) * multiple


def size_multiple(vae: VAEConfig, dit: DiTConfig) -> int:
    """Returns the pixels that frame width and height must be multiples of: latent pixel times patch."""
    return vae.spatial_stride * max(dit.patch_size[1:])


def check_pixels(width: int, height: int) -> None:
    """Raises :class:`InputError` for more pixels than an H.264 video has."""
    if max(width, height) > MOST_SIDE or width * height > MOST_PIXELS:
        raise InputError(
            f"size: expected at most {MOST_SIDE} pixels a side and {MOST_PIXELS:,} a frame (H.264 has no more), got"
            f" {width}x{height}"
        )


def check_size(width: int, height: int, multiple: int) -> None:
    """Raises :class:`InputError` unless both are positive multiples, not too large; offers the nearest size that is."""
    check_pixels(width, height)
    if width < 1 or height < 1 or width % multiple or height % multiple:
        near = f"{nearest_multiple(width, multiple)}x{nearest_multiple(height, multiple)}"
        raise InputError(
            f"size: width and height must be multiples of {multiple}, got {width}x{height}; nearest: {near}"
        )


def check_frames(num_frames: int, stride: int = 4) -> int:
    """Returns the number of latent frames of ``num_frames`` frames, which must be ``1 + stride * n``, n at least 1."""
    if num_frames > MOST_FRAMES:
        raise InputError(f"frames: expected at most {MOST_FRAMES}, got {num_frames}")
    if num_frames < 1 + stride or (num_frames - 1) % stride:
        near = 1 + stride * max(round((num_frames - 1) / stride), 1)
        raise InputError(f"frames: expected 1 + {stride}n (5, 9, ... for 4), got {num_frames}; nearest: {near}")
    return 1 + (num_frames - 1) // stride


def area_size(image_size: tuple[int, int], area: int, multiple: int) -> tuple[int, int]:
    """Returns width and height with about ``area`` pixels in the aspect ratio of ``image_size`` (width, height)."""
    ratio = image_size[0] / image_size[1]
    width, height = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
    return nearest_multiple(width, multiple), nearest_multiple(height, multiple)


def stage_one_size(width: int, height: int, multiple: int) -> tuple[int, int]:
    """Returns Stage I's size for a target of ``width x height``: 640x352 for 2560x1408."""
    scale = min(STAGE_ONE_SHORT_SIDE / min(width, height), 0.5)
    return nearest_multiple(round(width * scale), multiple), nearest_multiple(round(height * scale), multiple)
