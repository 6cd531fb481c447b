"""Photographs: every kind of image becomes the pixels that a viewer shows."""

import numpy as np
import pytest
import torch
from PIL import Image

from model.errors import InputError
from model.io.photo import fit_image, open_image


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "1", "LA", "I;16"])
def test_any_image_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    grey = Image.linear_gradient("L").resize((30, 20))
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    (deep if mode == "I;16" else grey.convert(mode)).save(path)
    opened = open_image(path)
    assert (opened.mode, opened.size) == ("RGB", (30, 20))
    assert np.asarray(opened)[-1].mean() > np.asarray(opened)[0].mean() + 100  # dark above, bright below


def test_transparent_pixels_are_white_and_orientation_is_applied(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (20, 30)


def test_unreadable_images_are_explained(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("not an image")
    Image.new("RGB", (300, 300), "red").save(tmp_path / "cut.jpg", quality=95)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:700])
    for name, message in (
        ("nowhere.jpg", "does not exist"),
        (".", "is not a file"),
        ("empty.jpg", r"empty \(0 bytes\)"),
        ("text.jpg", "not a readable image"),
        ("cut.jpg", "not a readable image"),
    ):
        with pytest.raises(InputError, match=message):
            open_image(tmp_path / name)


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
