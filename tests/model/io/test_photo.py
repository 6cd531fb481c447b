"""Photographs: every kind of image becomes the pixels that a colour-managed viewer shows, or one line of error."""

import os
import struct
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, features
from PIL._util import DeferredError

from model.errors import InputError
from model.io.photo import fit_image, open_image
from tests.support import icc_profile as icc

needs_avif = pytest.mark.skipif("avif" not in features.get_supported(), reason="this Pillow has no AVIF")

BROWN = (200, 100, 50)
# BROWN of Display P3 as sRGB, by expected_srgb; other readings of the file are more than 3 levels away.
BROWN_OF_P3 = (215, 93, 31)


def read(path, data=None):
    """Returns the pixels ``[H, W, 3]`` that a file is opened as, first written from bytes if there are any."""
    if data is not None:
        path.write_bytes(data)
    opened = open_image(path)
    assert opened.mode == "RGB"
    return np.asarray(opened).astype(int)


def tiff(bits, data, sample_format=1, **more):
    """Returns a TIFF of two grey values in a row and one strip, with more tags, such as ``_254=1``."""
    tags = {256: 2, 257: 1, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 279: len(data), 339: sample_format}
    tags |= {int(tag[1:]): value for tag, value in more.items()}
    data += bytes(len(data) % 2)
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, tags[tag], 0) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def png(width, depth, colour_type, row, *chunks):
    """Returns a PNG of one row, with these chunks (name, content) before its pixels."""
    named = [(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour_type, 0, 0, 0)), *chunks]
    named += [(b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    written = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in named)
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "P transparent", "1", "CMYK", "L transparent"])
def test_pictures_of_8_bits_without_a_profile_keep_their_bytes(tmp_path, mode):
    """A plain picture is bit for bit Pillow's own conversion to RGBA, laid on white."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (20, 30, 4), dtype=np.uint8)).convert(
        "RGBA" if mode == "RGBA" else "RGB"
    )
    if mode not in ("RGB", "RGBA"):
        picture = picture.convert(mode.split()[0])
    if mode == "LA":
        picture.putalpha(Image.fromarray(rng.integers(0, 256, (20, 30), dtype=np.uint8)))
    path = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    picture.save(path, **({"transparency": 5} if "transparent" in mode else {}))
    rgba = Image.open(path).convert("RGBA")
    expected = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    assert (read(path) == np.asarray(expected)).all()


HDR = {"PQ": b"\x09\x10\0\1", "HLG": b"\x09\x12\0\1"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tiff(32, bytes(8), sample_format=3), "grey of more than 8 bits"),
        (tiff(12, bytes(3)), "grey of more than 8 bits"),
        (png(2, 16, 0, bytes(4)), "grey of more than 8 bits"),
        (tiff(8, bytes(2), sample_format=2), "samples with a sign"),
        (png(2, 16, 2, bytes(12), (b"tRNS", bytes(6))), "a transparent colour of 16 bits"),
        (png(2, 4, 0, b"\x12", (b"tRNS", b"\0\1")), "a transparent colour of 4 bits"),
        (tiff(8, bytes(2), _254=1), "a camera's raw file"),
        (tiff(8, bytes(2), _50706=0x104), "a camera's raw file"),
        (tiff(10, bytes(3)), "unusual TIFF"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom" + bytes(99), "a camera's raw file"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        *((png(1, 8, 2, bytes(3), (b"cICP", numbers)), f"an HDR image [(]{name}") for name, numbers in HDR.items()),
    ],
)
def test_samples_without_a_meaning_are_refused(tmp_path, data, message):
    """Samples that are no brightness from black to white are refused in one line, which says what is allowed."""
    with pytest.raises(InputError, match=message) as raised:
        read(tmp_path / "picture", data)
    assert "\n" not in str(raised.value)


def gamma(value):
    return value ** (563 / 256)


@pytest.mark.parametrize(
    ("space", "curve", "to_linear"),
    [
        (icc.DISPLAY_P3, icc.srgb_curve(), icc.srgb_to_linear),
        (icc.ADOBE_RGB, icc.gamma_curve(563 / 256), gamma),
        (icc.SRGB, icc.gamma_curve(1), lambda value: value),
    ],
    ids=["Display P3", "Adobe RGB", "linear"],
)
def test_colours_of_a_profile_become_srgb(tmp_path, space, curve, to_linear):
    """Every pixel is what the standards' matrices and curves say, within a level; so are transparent ones, on white."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    path, profile = tmp_path / "picture.png", icc.matrix_profile(space, curve)
    Image.fromarray(pixels).save(path, icc_profile=profile)
    expected = icc.expected_srgb(pixels, space, to_linear)
    assert np.abs(expected - pixels).max() > 40
    assert np.abs(read(path) - expected).max() <= 1
    alpha = np.arange(1024).reshape(32, 32, 1) % 256
    rgba = np.concatenate([pixels, alpha.astype(np.uint8)], -1)
    Image.fromarray(rgba).save(path, icc_profile=profile)
    assert np.abs(read(path) - (expected * alpha + 255 * (255 - alpha)) / 255).max() <= 2


def test_the_shipped_photograph_is_adobe_rgb_and_is_converted():
    """Adobe's own profile, in a JPEG as a camera's owner saves it, gives what the standard's numbers give."""
    path = Path(__file__).parents[3] / "bench" / "assets" / "rocket.jpg"
    stored = np.asarray(Image.open(path))[::8, ::8]
    expected = icc.expected_srgb(stored, icc.ADOBE_RGB, gamma)
    assert (np.abs(expected - stored).max(-1) > 1).mean() > 0.5
    assert np.abs(read(path)[::8, ::8] - expected).max() <= 1


def test_a_profile_that_is_srgb_changes_no_bit(tmp_path):
    """A profile that differs from sRGB by rounding alone, as HP's does, leaves every bit as it is."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png", icc_profile=icc.hp_srgb_profile())
    assert (read(tmp_path / "picture.png") == pixels).all()


def test_black_and_white_of_a_profile_are_black_and_white(tmp_path):
    """The darkest that a device shows is black: its black point is compensated for."""
    ramp = np.array([[0, 128, 255]], np.uint8)[..., None].repeat(3, -1)
    profile = icc.matrix_profile(icc.SRGB, icc.srgb_curve(black=0.05))
    Image.fromarray(ramp).save(tmp_path / "picture.png", icc_profile=profile)
    assert read(tmp_path / "picture.png")[0] == pytest.approx(ramp[0], abs=1)


@pytest.mark.parametrize("power", [1.0, 2.2])
def test_grey_of_a_profile_becomes_srgb(tmp_path, power):
    """Grey and grey with alpha are what the profile's curve says, in the shadows too."""
    levels, profile = np.arange(256), icc.grey_profile(icc.gamma_curve(power))
    expected = np.round(icc.linear_to_srgb((levels / 255) ** (round(power * 256) / 256)) * 255)
    grey = Image.fromarray(levels.astype(np.uint8)[None])
    path = tmp_path / "grey.png"
    for picture in (grey, grey.convert("LA")):
        picture.save(path, icc_profile=profile)
        assert np.abs(read(path)[0] - expected[:, None]).max() <= 1


def test_grey_and_palettes_take_a_profile_of_rgb(tmp_path):
    profile = icc.matrix_profile(icc.DISPLAY_P3, icc.gamma_curve(563 / 256))
    levels = np.arange(256, dtype=np.uint8)[None]
    Image.fromarray(levels).save(tmp_path / "grey.png", icc_profile=profile)
    expected = icc.expected_srgb(levels[..., None].repeat(3, -1), icc.DISPLAY_P3, gamma)
    assert np.abs(read(tmp_path / "grey.png") - expected).max() <= 1
    palette = Image.new("RGB", (8, 8), BROWN).quantize(4)
    palette.save(tmp_path / "palette.png", icc_profile=icc.matrix_profile(icc.DISPLAY_P3, icc.srgb_curve()))
    assert read(tmp_path / "palette.png")[0, 0] == pytest.approx(BROWN_OF_P3, abs=1)


def lightness(inks):
    """Returns the lightness of corners of CMYK: no printer's, but one that no formula without a profile gives."""
    cyan, magenta, yellow, black = inks.T
    return (100 - 40 * cyan - 50 * magenta - 10 * yellow) * (1 - black)


@pytest.mark.parametrize("name", ["tif", "jpg"])
def test_inks_are_the_colours_of_their_profile(tmp_path, name):
    """CMYK goes through its profile's table, in a TIFF and in a JPEG, where Adobe writes the inks inverted."""
    inks = np.concatenate([np.zeros((1, 4)), np.eye(4)])
    pixels = np.kron(255 * inks, np.ones((8, 1))).astype(np.uint8)[None].repeat(8, 0)
    path, options = tmp_path / f"inks.{name}", {"quality": 100, "subsampling": 0} if name == "jpg" else {}
    picture = Image.fromarray(pixels, "CMYK")
    picture.save(path, icc_profile=icc.ink_profile(lightness), **options)
    expected = icc.linear_to_srgb(icc.light(lightness(inks))) * 255
    assert read(path)[4, 4::8] == pytest.approx(expected[:, None].repeat(3, 1), abs=2)
    picture.save(path, **options)
    assert read(path)[4, 4::8] == pytest.approx(255 * (1 - inks[:, :3]) * (1 - inks[:, 3:]), abs=2)


@pytest.mark.parametrize(
    ("mode", "profile"),
    [
        ("RGB", icc.matrix_profile(icc.DISPLAY_P3, icc.srgb_curve())[:400]),
        ("RGB", icc.matrix_profile(icc.DISPLAY_P3, icc.srgb_curve()).replace(b"RGB ", b"\xe9\xe9\xe9\xe9")),
        ("RGB", icc.ink_profile(lightness)),
        ("CMYK", icc.matrix_profile(icc.DISPLAY_P3, icc.srgb_curve())),
    ],
)
def test_a_profile_that_is_damaged_or_of_another_kind_is_ignored_with_a_warning(tmp_path, mode, profile):
    """The picture is then the one that it would be without the profile, and the warning is one printable line."""
    path = tmp_path / "bell\a.tif"
    Image.new("RGB", (4, 4), BROWN).convert(mode).save(path, icc_profile=profile)
    with pytest.warns(RuntimeWarning, match="its ICC profile is ignored") as warned:
        pixels = read(path)
    assert [str(warning.message).isprintable() for warning in warned] == [True]
    Image.new("RGB", (4, 4), BROWN).convert(mode).save(path)
    assert (pixels == read(path)).all()


@pytest.mark.parametrize(
    ("chunks", "declared"),
    [
        ([(b"cICP", b"\x0c\x0d\0\1")], "primaries 12, transfer 13"),
        ([(b"cICP", b"\x01\x0d\0\1"), (b"gAMA", struct.pack(">I", 100000))], None),
    ],
)
def test_colours_declared_without_a_profile_are_warned_of(tmp_path, chunks, declared):
    """The pixels are read as sRGB; if the file's numbers say that they are not, a warning says so."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert read(tmp_path / "picture.png", png(1, 8, 2, bytes(BROWN), *chunks)).tolist() == [[list(BROWN)]]
    assert len(warned) == (declared is not None)
    assert declared is None or declared in str(warned[0].message)
    assert all(warning.filename == __file__ for warning in warned)


@needs_avif
def test_an_avif_that_declares_hdr(tmp_path):
    """HDR is refused, unless the HDR image is made of a gain map."""
    path = tmp_path / "picture.avif"
    Image.new("RGB", (16, 16), BROWN).save(path)
    plain = path.read_bytes()
    at = plain.index(b"colrnclx") + 8
    hdr = plain[:at] + struct.pack(">HH", 9, 16) + plain[at + 4 :]
    with pytest.raises(InputError, match="an HDR image"):
        read(path, hdr)
    assert read(path, hdr.replace(b"Color", b"tmap "))[0, 0] == pytest.approx(BROWN, abs=3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(tmp_path, orientation):
    """Each of EXIF's eight orientations is turned upright."""
    upright = np.arange(6, dtype=np.uint8).reshape(2, 3) * 20
    # Row 0 and column 0 of the file are these sides of the upright picture (EXIF 2.3, tag 274).
    lying = upright if orientation < 5 else upright.T
    rows, columns = (-1 if orientation in turned else 1 for turned in ((3, 4, 6, 7), (2, 3, 7, 8)))
    stored = lying[::rows, ::columns]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "picture.png", exif=exif.tobytes())
    assert (read(tmp_path / "picture.png")[..., 0] == upright).all()


@pytest.fixture(params=["jpg", "png", "webp", "tif", "mpo", pytest.param("avif", marks=needs_avif), "heic"])
def turned(request, tmp_path):
    """A picture with a profile in each format that has EXIF: white above on the right, once it is turned."""
    if request.param == "heic":
        pytest.importorskip("pillow_heif").register_heif_opener()
    picture, path = Image.new("RGB", (64, 48)), tmp_path / f"picture.{request.param}"
    picture.paste("white", (0, 0, 32, 24))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(path, exif=exif.tobytes(), icc_profile=icc.matrix_profile(icc.DISPLAY_P3, icc.srgb_curve()))
    if request.param == "heic":  # reading it must not need what writing it did
        Image.ID.remove("HEIF")
        del Image.OPEN["HEIF"]
    return path


def test_every_format_is_turned_once_and_converted(turned):
    """EXIF is applied once, whoever decodes it, and so is the profile: white stays white, and brown changes."""
    pixels = read(turned)
    assert pixels.shape == (64, 48, 3)
    assert (pixels[2:30, 26:46] > 250).all()
    assert (pixels[34:, :] < 5).all()
    Image.new("RGB", (16, 16), BROWN).save(turned, icc_profile=icc.matrix_profile(icc.DISPLAY_P3, icc.srgb_curve()))
    assert read(turned)[8, 8] == pytest.approx(BROWN_OF_P3, abs=3)


@pytest.mark.filterwarnings("ignore:Tag data larger than file")
def test_a_truncated_file_of_any_format_is_refused_in_one_line(turned):
    whole = turned.read_bytes()
    for share in (0.02, 0.6):
        turned.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(InputError, match="not a readable image") as raised:
            open_image(turned)
        assert "\n" not in str(raised.value)


def test_damaged_exif_leaves_the_picture_as_it_lies(tmp_path):
    """A picture whose EXIF cannot be read is read all the same; one odd tag does not keep it from being turned."""
    picture = Image.new("RGB", (64, 48))
    picture.save(tmp_path / "picture.png", exif=b"Exif\0\0XX*\0\x08\0\0\0")
    with pytest.warns(RuntimeWarning, match="its EXIF data are damaged"):
        assert read(tmp_path / "picture.png").shape == (48, 64, 3)
    odd = struct.pack("<HHIfHHIHH", 0x010F, 11, 1, 0.5, 0x0112, 3, 1, 6, 0)  # the maker's name as a number
    picture.save(tmp_path / "picture.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\2\0" + odd + bytes(4))
    assert read(tmp_path / "picture.jpg").shape == (64, 48, 3)


def test_what_pillow_lacks_is_named(tmp_path, monkeypatch):
    """HEIC names the command that installs it; without littleCMS a profile is ignored with a warning."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99)
    with pytest.raises(InputError, match=r"a HEIC: pillow_heif is not installed; run: pip install -e '.\[heif\]'"):
        read(tmp_path / "IMG_0001.HEIC", heic)
    monkeypatch.setattr(ImageCms, "core", DeferredError.new(ImportError("no littleCMS")))
    Image.new("RGB", (4, 4)).save(tmp_path / "p3.png", icc_profile=icc.matrix_profile(icc.DISPLAY_P3, icc.srgb_curve()))
    with pytest.warns(RuntimeWarning, match="its ICC profile is ignored .no littleCMS"):
        read(tmp_path / "p3.png")


def test_unreadable_paths_are_explained(tmp_path):
    """Whatever a path is, the answer is one line, and at once: a pipe is not waited for."""
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("not an image")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    for name, message in (
        ("nowhere.jpg", "does not exist"),
        (".", "is not a file"),
        ("pipe.jpg", "is not a file"),
        ("loop.jpg", "is not a file"),
        ("x" * 300, "File name too long"),
        ("empty.jpg", r"empty \(0 bytes\)"),
        ("text.jpg", "not a readable image"),
    ):
        with pytest.raises(InputError, match=message):
            open_image(tmp_path / name)


def test_a_picture_of_absurd_size_is_refused(tmp_path):
    header = png(1, 8, 2, bytes(3)).replace(struct.pack(">II", 1, 1), struct.pack(">II", 2**17, 2**17), 1)
    crc = struct.pack(">I", zlib.crc32(header[12:29]))
    with pytest.raises(InputError, match="exceeds limit of 500000000 pixels"):
        read(tmp_path / "bomb.png", header[:29] + crc + header[33:])


def test_fit_covers_and_crops_the_centre():
    image = Image.new("RGB", (40, 10), "black")
    image.paste("white", (15, 0, 25, 10))
    pixels = fit_image(image, (16, 16))
    assert pixels.shape == (1, 3, 1, 16, 16)
    assert pixels[..., 2:14].min() > 0.9  # the white square in the middle fills the frame
    assert fit_image(image, (64, 16))[0, :, 0, :, 0].max() == -1


def test_stage_one_sees_the_same_frame_as_stage_two():
    """A low size of another aspect ratio shows the whole frame, stretched, so that upsampling puts all of it back."""
    image = Image.linear_gradient("L").rotate(90).resize((90, 60)).convert("RGB")
    large, small = fit_image(image, (64, 64)), fit_image(image, (64, 64), (16, 32))
    assert small.shape == (1, 3, 1, 32, 16)
    averaged = torch.nn.functional.avg_pool2d(large[:, :, 0], (2, 4))
    assert (small[:, :, 0] - averaged)[..., 1:-1].abs().max() < 0.02
