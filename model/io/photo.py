"""Reading photographs: Pillow decodes, littleCMS converts their colours; the extra ``generate`` has both."""

from __future__ import annotations

import io
import re
import stat
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

# The formats of which it is known what a grey value beyond 8 bits means: the bits of a TIFF, else Pillow scales to 16.
_DEEP_FORMATS = ("TIFF", "PNG", "PPM", "JPEG2000", "HEIF")

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
    a file declares without a profile. Grey of more than 8 bits is the value over the range of the file's bits.

    Raises:
        InputError: the file is missing, empty, damaged, not an image, or one whose pixels have no such meaning: a
            camera's raw file, HDR, signed samples and floats.
    """
    pil = require("PIL.Image", "generate")
    path = Path(path)
    file, head = _decode(path)
    profile = file.info.get("icc_profile")
    if not profile:
        _check_declared_colours(path, head, file)
    image = _apply_exif(path, file, profile)
    if image.mode.startswith(("I", "F")):
        image = _scale_grey(path, image, file)
    elif file.format == "PNG" and head[24] in (2, 4) and image.mode == "L" and "transparency" in image.info:
        image.info["transparency"] *= 255 // (2 ** head[24] - 1)  # Pillow scales the pixels alone
    elif file.format == "PNG" and head[24] == 16 and image.info.pop("transparency", None) is not None:
        _warn(path, "its transparent colour is ignored: it has 16 bits, and Pillow reads 8", 3)
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
        status = path.stat()
    except FileNotFoundError as error:
        raise InputError(f"image: {path} does not exist") from error
    except (OSError, ValueError) as error:  # a name that is too long, a loop of links, a folder that is closed
        raise InputError(f"image: {path}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(status.st_mode):  # a pipe is not opened either: that would wait for a writer
        raise InputError(f"image: {path} is not a file")
    if status.st_size == 0:
        raise InputError(f"image: {path} is empty (0 bytes)")
    try:
        with path.open("rb") as stream:
            head = stream.read(1 << 22)
        _require_decoder(path, head)
        with _left_alone(pil), pil.open(path) as file:
            if file.format == "TIFF":
                _check_tiff(path, head, file.tag_v2)
            file.load()
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
    """Makes Pillow read HEIC, for which it needs a package, and says what an AVIF needs where Pillow lacks it."""
    if head[4:8] != b"ftyp":
        return
    brands = head[8 : max(16, min(int.from_bytes(head[:4], "big"), 256))]
    if b"avif" in brands or b"avis" in brands:
        if "avif" not in require("PIL.features", "generate").get_supported():
            raise InputError(f"image: {path} is an AVIF, which this Pillow does not read; run: pip install -U pillow")
    elif any(brand in brands for brand in (b"mif1", b"msf1", b"hei", b"hev")):
        try:
            require("pillow_heif", "heif").register_heif_opener()
        except InputError as error:
            raise InputError(f"image: {path} is a HEIC: {error}") from error


def _check_tiff(path: Path, head: bytes, tags: Any) -> None:
    """Refuses what Pillow would read wrongly: the preview of a camera's raw file, and signed samples and floats."""
    # DNGVersion; NewSubfileType of a page that stands for a larger one (NEF, ARW); the mark of a CR2.
    if 50706 in tags or tags.get(254, 0) & 1 or head[8:10] == b"CR":
        raise InputError(f"image: {path} is a camera's raw file (or begins with a preview); export it as JPEG or PNG")
    if {2, 3} & set(tags.get(339, ())):
        raise InputError(f"image: {path} has samples that are signed or floats; allowed are unsigned integers")


def _apply_exif(path: Path, file: Any, profile: bytes | None) -> Any:
    """Returns the image turned as its EXIF says, once; as it lies, with a warning, if its EXIF is damaged."""
    try:
        exif = file.getexif()
        orientation = exif.get(0x0112)
        space = exif.get_ifd(0x8769).get(0xA001)
    except (SyntaxError, ValueError, TypeError, struct.error) as error:
        _warn(path, f"its EXIF data are damaged ({error}); it is not turned")
        return file.copy()
    if space in (2, 0xFFFF) and not profile:  # how cameras mark Adobe RGB, by two conventions
        _warn(path, "its EXIF says that it is not sRGB, but it has no ICC profile; it is read as sRGB")
    if orientation not in range(2, 9):
        return file.copy()
    # ImageOps.exif_transpose would also write the EXIF anew, and fail where any other tag in it is odd.
    return file.transpose(require("PIL.Image", "generate").Transpose[_TURNS[orientation - 2]])


def _scale_grey(path: Path, image: Any, file: Any) -> Any:
    """Returns grey of more than 8 bits as 8 bits, with alpha where a PNG has a transparent value."""
    pil = require("PIL.Image", "generate")
    if file.format not in _DEEP_FORMATS or image.mode == "F":
        raise InputError(f"image: {path} has grey of more than 8 bits in {file.format}; allowed are PNG and TIFF")
    values, tags = np.asarray(image), file.tag_v2 if file.format == "TIFF" else {}
    if image.mode == "I":  # Pillow holds unsigned samples of 32 bits as signed ones
        values = values.view(np.uint32)
    levels = np.round(values * np.float32(255 / (2 ** tags.get(258, (16,))[0] - 1)))
    if tags.get(262) == 0:  # WhiteIsZero, which Pillow leaves as it is beyond 8 bits
        levels = 255 - levels
    grey = pil.fromarray(levels.astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(pil.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def _check_declared_colours(path: Path, head: bytes, file: Any) -> None:
    """Refuses HDR, and warns of other colours that a file without a profile declares by numbers."""
    numbers, cicp, declared = None, None, None
    if file.format == "PNG":
        numbers = re.search(rb"cICP(.)(.)", head[: head.find(b"IDAT")], re.DOTALL)
        if numbers is None and "srgb" not in file.info:
            srgb = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
            corners = np.resize(file.info.get("chromaticity") or srgb, 8)
            if abs(file.info.get("gamma", 1 / 2.2) * 2.2 - 1) > 0.05 or not np.allclose(corners, srgb, atol=0.01):
                declared = "the chunks gAMA and cHRM"
    elif file.format == "HEIF" and "nclx_profile" in file.info:
        nclx = file.info["nclx_profile"]
        cicp = [nclx["color_primaries"], nclx["transfer_characteristics"]]
    elif file.format == "AVIF":
        boxes = head[: head.find(b"mdat")]
        # Beside a gain map (tmap) they may be those of the HDR image that it makes; Pillow reads the other.
        if b"tmap" not in boxes:
            numbers = re.search(rb"colrnclx(..)(..)", boxes, re.DOTALL)
    if numbers:
        cicp = [int.from_bytes(number, "big") for number in numbers.groups()]
    if cicp and cicp[1] in _HDR_TRANSFERS:
        raise InputError(f"image: {path} is an HDR image ({_HDR_TRANSFERS[cicp[1]]}); export it as SDR, in sRGB")
    if cicp and (cicp[0] not in _SRGB_PRIMARIES or cicp[1] not in _SRGB_TRANSFERS):
        declared = f"CICP numbers (primaries {cicp[0]}, transfer {cicp[1]})"
    if declared:
        _warn(path, f"it has no ICC profile, and {declared} say that it is not sRGB; it is read as sRGB")


def _convert_to_srgb(path: Path, image: Any, profile: bytes | None) -> Any:
    """Returns an image of mode L, RGB or CMYK as RGB in sRGB; unchanged if its profile is sRGB itself."""
    if not profile:
        return image.convert("RGB")
    pil, cms = require("PIL.Image", "generate"), require("PIL.ImageCms", "generate")
    if "littlecms2" not in require("PIL.features", "generate").get_supported():
        raise InputError(
            f"image: {path} has an ICC profile, for which this Pillow lacks littleCMS; "
            "run: pip install --force-reinstall pillow"
        )
    try:
        source = cms.ImageCmsProfile(io.BytesIO(profile))
        space = {"GRAY": "L"}.get(source.profile.xcolor_space, source.profile.xcolor_space.strip())
        if space == "RGB" and image.mode == "L":
            image = image.convert("RGB")
        elif space == "L" and image.mode == "RGB" and len({band.tobytes() for band in image.split()}) == 1:
            image = image.getchannel(0)  # Pillow gives grey with alpha, and palettes of greys, as RGB
        if space != image.mode:
            raise cms.PyCMSError(f"it is for {space}, the pixels are {image.mode}")
        # littleCMS's short cut for grey is wrong by 10 levels in the shadows of linear light.
        flags = cms.Flags.BLACKPOINTCOMPENSATION | (cms.Flags.NOOPTIMIZE if space == "L" else 0)
        intent = cms.Intent.RELATIVE_COLORIMETRIC
        transform = cms.buildTransform(source, cms.createProfile("sRGB"), space, "RGB", intent, flags)
    except (OSError, ValueError, cms.PyCMSError) as error:
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


def _warn(path: Path, message: str, depth: int = 4) -> None:
    """Warns about a photograph; its name is printed without what a terminal would obey."""
    warnings.warn(printable(f"image: {path}: {' '.join(message.split())}"), RuntimeWarning, stacklevel=depth)


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
