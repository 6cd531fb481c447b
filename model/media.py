"""Photographs in, video files out. Pillow decodes and PyAV (FFmpeg) encodes; both are in the ``generate`` extra."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.errors import InputError, require

#: FFmpeg's AVCOL_SPC_BT709, AVCOL_PRI_BT709 and AVCOL_TRC_BT709, and AVCOL_RANGE_MPEG, for which PyAV before 17 has no
#: names.
BT709, LIMITED_RANGE = 1, 1


def open_image(path: str | Path) -> Any:
    """A photograph as a PIL image in RGB, upright (EXIF orientation applied), transparency on white.

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

    With ``resize`` the result is then scaled to that size: the same framing at another resolution, for Stage I.

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


class VideoWriter:
    """Writes frames to an H.264 MP4 as they come.

    The file is written under a temporary name and takes its own when it is complete. If the work behind it fails or is
    interrupted, the frames written so far are kept, playable, as ``NAME.partial.mp4``; with no frame nothing is left.

    Args:
        path: the file to write; must end in ``.mp4``.
        width, height: pixels, both even.
        fps: frames a second.
        crf: quality of x264; 0 is lossless, 18 is visually lossless.

    Raises:
        InputError: another suffix, or a place that cannot be written to.
    """

    def __init__(self, path: str | Path, width: int, height: int, fps: int, crf: int = 16):
        self.path = check_video_path(path)
        self._av = require("av", "generate")
        self._numbers = width, height, fps, crf
        self._temporary = self.path.with_name(f".{self.path.stem}.{os.getpid()}.mp4")
        self.num_frames = 0

    @property
    def partial_path(self) -> Path:
        """Where the frames stay if the work is not finished."""
        return self.path.with_suffix(".partial.mp4")

    def __enter__(self) -> VideoWriter:
        width, height, fps, crf = self._numbers
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._container = self._av.open(str(self._temporary), "w")
        # Without x264's macroblock tree, which made 4 different files of the same frames in 150 runs.
        options = {"crf": str(crf), "preset": "medium", "x264-params": "mbtree=0"}
        self._stream = self._container.add_stream("libx264", rate=fps, options=options)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        # Tagged as BT.709, as players assume for HD: untagged files are shown with shifted colours by some.
        context = self._stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED_RANGE
        return self

    def write(self, frames: Tensor | Iterable[np.ndarray]) -> None:
        """Encodes frames ``[H, W, 3]`` uint8, or a tensor ``[F, H, W, 3]`` of them."""
        for pixels in frames.cpu().numpy() if isinstance(frames, Tensor) else frames:
            frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            # Converted here and not by the encoder, whose own conversion is not the same from run to run.
            frame = frame.reformat(format="yuv420p", src_colorspace="ITU709", dst_colorspace="ITU709")
            self._container.mux(self._stream.encode(frame))
            self.num_frames += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        complete = kind is None and self.num_frames > 0
        try:
            if self.num_frames:
                self._container.mux(self._stream.encode())
            self._container.close()
            if self.num_frames:
                os.replace(self._temporary, self.path if complete else self.partial_path)
        finally:
            self._temporary.unlink(missing_ok=True)


def check_video_path(path: str | Path) -> Path:
    """``path`` if an MP4 can be written there. Its directory need not exist: the writer makes it.

    Raises:
        InputError: another suffix, a directory, or a place that cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise InputError(f"out: expected a name that ends in .mp4, got {path}")
    if path.is_dir():
        raise InputError(f"out: {path} is a directory")
    place = next(parent for parent in path.absolute().parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise InputError(f"out: cannot write {path}: {place} is not a directory that can be written to")
    return path
