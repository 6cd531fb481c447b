"""Reading photographs: Pillow decodes, littleCMS converts their colours; the extra ``generate`` has both."""

from __future__ import annotations

import io
import os
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.errors import InputError, printable, require

#: Pixels of a photograph at most: 1.5 GB in RGB. Phones make 200 million.
MOST_PIXELS = 500_000_000

# What EXIF's orientations 2 to 8 ask for.
_TURNS = (
    *("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM"),
    *("TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"),
)

# ISO 23091-2 (CICP): colour primaries and transfer functions that are sRGB's, or close enough to be shown as such.
_SRGB_PRIMARIES, _SRGB_TRANSFERS, _HDR_TRANSFERS = (1, 2, 5, 6), (1, 2, 4, 5, 6, 13, 14, 15), {16: "PQ", 18: "HLG"}


def open_image(path: str | Path) -> Any:
    """Returns a photograph as a PIL image in RGB: sRGB of 8 bits, the first frame, upright, transparency on white.

    The pixels are those that a colour-managed viewer shows. An ICC profile is converted by its relative colorimetric
    intent (its only table, if it has none for this intent) with black-point compensation. A profile that is damaged,
    or of another kind than the pixels, is ignored with a warning, as browsers do; so are colours other than sRGB that
    a file without a profile declares by CICP's numbers.

    Raises:
        InputError: the file is missing, empty, damaged, not an image, or one whose pixels have no such meaning: a
            camera's raw file, HDR, grey of more than 8 bits (floats included), samples with a sign, and a transparent
            colour of other than 8 bits.
    """
    pil = require("PIL.Image", "generate")
    path = Path(path)
    file, head = _decode(path)
    profile = file.info.get("icc_profile")
    if not profile:
        _check_declared_colours(path, head, file.format)
    image = _turn_upright(path, file)
    if image.mode.startswith(("I", "F")):
        raise InputError(f"image: {path} has grey of more than 8 bits; export it with 8 bits, as JPEG or PNG")
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    elif image.mode in ("P", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("L" if image.mode in ("1", "LA") else "RGB")
    image = _convert_to_srgb(path, image, profile)
    if alpha is None:
        return image
    image.putalpha(alpha)
    return pil.alpha_composite(pil.new("RGBA", image.size, "white"), image).convert("RGB")


def _decode(path: Path) -> tuple[Any, bytes]:
    """Returns the first frame as Pillow decodes it, and the file's first bytes, with all that precedes the pixels."""
    pil = require("PIL.Image", "generate")
    try:
        if not path.is_file():  # a pipe would be waited for
            raise InputError(f"image: {path} {'is not a file' if os.path.lexists(path) else 'does not exist'}")
        with path.open("rb") as stream:
            head = stream.read(1 << 22)
        if not head:
            raise InputError(f"image: {path} is empty (0 bytes)")
        _require_decoder(path, head)
        with _left_alone(pil), pil.open(path) as file:
            # DNGVersion; NewSubfileType of a page that stands for a larger one (NEF, ARW); the mark of a CR2.
            if file.format == "TIFF" and (50706 in file.tag_v2 or file.tag_v2.get(254, 0) & 1 or head[8:10] == b"CR"):
                raise InputError(
                    f"image: {path} is a camera's raw file (or begins with a preview); export it as JPEG or PNG"
                )
            if file.format == "TIFF" and 2 in file.tag_v2.get(339, ()):  # Pillow reads them as if they had no sign
                raise InputError(f"image: {path} has samples with a sign; export it with 8 bits, as JPEG or PNG")
            file.load()
            # Pillow brings the pixels to 8 bits, and then compares them with a transparent colour of 2, 4 or 16 bits.
            if file.format == "PNG" and head[24] != 8 and file.mode in ("L", "RGB") and "transparency" in file.info:
                raise InputError(f"image: {path} has a transparent colour of {head[24]} bits; export it with 8 bits")
            return file, head
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(f"image: {path} does not fit the memory of this machine; make it smaller") from error
    except pil.UnidentifiedImageError as error:
        raise InputError(
            f"image: {path} is not a readable image: it is damaged, or of a format that Pillow does not read; "
            "export a camera's raw file, a drawing (SVG, PDF) or an unusual TIFF as JPEG or PNG"
        ) from error
    except Exception as error:  # a decoder raises whatever a damaged file makes it run into
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"image: {path} is not a readable image: {reason}") from error


@contextmanager
def _left_alone(pil: Any) -> Iterator[None]:
    """Keeps Pillow from warnings, which name no file, and from its own limit of pixels, which phones exceed."""
    # It refuses from twice this number on.
    limit, pil.MAX_IMAGE_PIXELS = pil.MAX_IMAGE_PIXELS, MOST_PIXELS // 2
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        pil.MAX_IMAGE_PIXELS = limit


def _require_decoder(path: Path, head: bytes) -> None:
    """Makes Pillow read HEIC, for which it needs a package."""
    brands = head[8 : max(16, min(int.from_bytes(head[:4], "big"), 256))] if head[4:8] == b"ftyp" else b""
    is_avif = b"avif" in brands or b"avis" in brands
    if not is_avif and any(brand in brands for brand in (b"mif1", b"msf1", b"hei", b"hev")):
        try:
            require("pillow_heif", "heif").register_heif_opener()
        except InputError as error:
            raise InputError(f"image: {path} is a HEIC: {error}") from error


def _turn_upright(path: Path, file: Any) -> Any:
    """Returns the image turned as its EXIF says, once; as it lies, with a warning, if its EXIF is damaged."""
    try:
        orientation = file.getexif().get(0x0112)
    except (SyntaxError, ValueError, TypeError, struct.error) as error:
        _warn(path, f"its EXIF data are damaged ({error}); it is not turned")
        return file.copy()
    if orientation not in range(2, 9):
        return file.copy()
    # ImageOps.exif_transpose would also write the EXIF anew, and fail where any other tag in it is odd.
    return file.transpose(require("PIL.Image", "generate").Transpose[_TURNS[orientation - 2]])


def _check_declared_colours(path: Path, head: bytes, kind: str) -> None:
    """Refuses HDR, and warns of other colours that a file without a profile declares by numbers."""
    if kind not in ("PNG", "AVIF", "HEIF"):
        return
    # The numbers come before the pixels.
    declaration, pixels = (rb"cICP(.)(.)", b"IDAT") if kind == "PNG" else (rb"colrnclx(..)(..)", b"mdat")
    before = head[: head.find(pixels)]
    numbers = re.search(declaration, before, re.DOTALL)
    # Beside a gain map (tmap) they may be those of the HDR image that it makes; Pillow reads the other.
    if numbers is None or b"tmap" in before:
        return
    primaries, transfer = (int.from_bytes(number, "big") for number in numbers.groups())
    if transfer in _HDR_TRANSFERS:
        raise InputError(f"image: {path} is an HDR image ({_HDR_TRANSFERS[transfer]}); export it as SDR, in sRGB")
    if primaries not in _SRGB_PRIMARIES or transfer not in _SRGB_TRANSFERS:
        given = f"CICP numbers (primaries {primaries}, transfer {transfer})"
        _warn(path, f"it has no ICC profile, and {given} say that it is not sRGB; it is read as sRGB")


def _convert_to_srgb(path: Path, image: Any, profile: bytes | None) -> Any:
    """Returns an image of mode L, RGB or CMYK as RGB in sRGB; unchanged if its profile is sRGB itself."""
    if not profile:
        return image.convert("RGB")
    pil, cms = require("PIL.Image", "generate"), require("PIL.ImageCms", "generate")
    try:
        source = cms.ImageCmsProfile(io.BytesIO(profile))
        space = {"GRAY": "L"}.get(source.profile.xcolor_space, source.profile.xcolor_space.strip())
        if space == "RGB" and image.mode == "L":
            image = image.convert("RGB")
        if space != image.mode:
            raise cms.PyCMSError(f"it is for {space}, the pixels are {image.mode}")
        # littleCMS's short cut for grey is wrong by 10 levels in the shadows of linear light.
        flags = cms.Flags.BLACKPOINTCOMPENSATION | (cms.Flags.NOOPTIMIZE if space == "L" else 0)
        intent = cms.Intent.RELATIVE_COLORIMETRIC
        transform = cms.buildTransform(source, cms.createProfile("sRGB"), space, "RGB", intent, flags)
    except (OSError, ValueError, ImportError, cms.PyCMSError) as error:  # ImportError: Pillow has no littleCMS
        _warn(path, f"its ICC profile is ignored ({error})")
        return image.convert("RGB")
    if space == "L":  # each level once: without the short cut every pixel would take a microsecond
        levels = pil.fromarray(np.arange(256, dtype=np.uint8)[None])
        return pil.fromarray(np.asarray(transform.apply(levels))[0][np.asarray(image)])
    if space == "RGB":
        steps = np.arange(0, 256, 15, dtype=np.uint8)
        cube = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
        if np.abs(np.asarray(transform.apply(pil.fromarray(cube))).astype(int) - cube).max() <= 1:
            return image  # sRGB by another name
    return transform.apply(image)


def _warn(path: Path, message: str) -> None:
    """Warns about a photograph; its name is printed without what a terminal would obey."""
    warnings.warn(printable(f"image: {path}: {' '.join(message.split())}"), RuntimeWarning, stacklevel=4)


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
