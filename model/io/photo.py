"""Reading photographs: Pillow decodes; the extra ``generate`` has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.errors import InputError, require


def open_image(path: str | Path) -> Any:
    """Returns a photograph as a PIL image in RGB, upright (EXIF orientation applied), transparency on white.

    Raises:
        InputError: the file is missing, empty or not an image.
    """
    pil = require("PIL.Image", "generate")
    ops = require("PIL.ImageOps", "generate")
    path = Path(path)
    if not path.is_file():
        raise InputError(f"image: {path} {'is not a file' if path.exists() else 'does not exist'}")
    if path.stat().st_size == 0:
        raise InputError(f"image: {path} is empty (0 bytes)")
    try:
        with pil.open(path) as file:
            image = ops.exif_transpose(file)
            if image.mode.startswith(("I", "F")):
                # 16-bit greyscale: Pillow's own conversion clips to 255 instead of scaling.
                levels = np.asarray(image, dtype=np.float32)
                image = pil.fromarray((levels / max(float(levels.max()), 1.0) * 255).astype(np.uint8))
            image = image.convert("RGBA")
    except (OSError, SyntaxError, ValueError, pil.DecompressionBombError) as error:
        raise InputError(f"image: {path} is not a readable image: {error}") from error
    white = pil.new("RGBA", image.size, "white")
    return pil.alpha_composite(white, image).convert("RGB")


def fit_image(image: Any, size: tuple[int, int], resize: tuple[int, int] | None = None) -> Tensor:
    """Scales a PIL image to cover ``size`` (width, height) and crops the centre.

    If ``resize`` is given, the result is then scaled to that size: the same framing at another resolution, for Stage I.

    Returns:
        ``[1, 3, 1, H, W]`` in -1..1.
    """
    pil = require("PIL.Image", "generate")
    ops = require("PIL.ImageOps", "generate")
    fitted = ops.fit(image, size, method=pil.Resampling.LANCZOS)
    if resize is not None:
        fitted = fitted.resize(resize, pil.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.asarray(fitted, dtype=np.float32)) / 127.5 - 1
    return pixels.permute(2, 0, 1)[None, :, None].contiguous()
