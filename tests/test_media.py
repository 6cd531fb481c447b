"""Photographs in every shape they come in, and video files that are whole or not there."""

from __future__ import annotations

import av
import numpy as np
import pytest
import torch
from PIL import Image

from model import InputError
from model.media import VideoWriter, check_video_path, fit_image, open_image
from tests.tolerances import VIDEO_PIXELS


def frames(count, height=32, width=48):
    ramp = np.linspace(0, 200, width, dtype=np.float32)[None, :, None] + np.zeros((height, 1, 3), np.float32)
    return [(ramp + 2 * i).astype(np.uint8) for i in range(count)]


def decode(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)], stream.average_rate


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
    """Also where its aspect ratio is not quite the target's: stretched, so that upsampling puts everything back."""
    image = Image.linear_gradient("L").rotate(90).resize((90, 60)).convert("RGB")
    large, small = fit_image(image, (64, 64)), fit_image(image, (64, 64), (16, 32))
    assert small.shape == (1, 3, 1, 32, 16)
    averaged = torch.nn.functional.avg_pool2d(large[:, :, 0], (2, 4))
    assert (small[:, :, 0] - averaged)[..., 1:-1].abs().max() < 0.02


def test_a_finished_video_has_every_frame(tmp_path):
    written = frames(9)
    with VideoWriter(tmp_path / "clip.mp4", 48, 32, 16) as writer:
        writer.write(written)
    read, rate = decode(tmp_path / "clip.mp4")
    assert (len(read), rate) == (9, 16)
    assert np.abs(np.asarray(read, dtype=np.float32) - np.asarray(written)).mean() < VIDEO_PIXELS
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def test_an_interrupted_video_keeps_its_frames_under_another_name(tmp_path):
    (tmp_path / "clip.mp4").write_text("an older clip")
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "clip.mp4", 48, 32, 16) as writer:  # noqa: PT012
        writer.write(frames(5))
        raise KeyboardInterrupt
    assert (tmp_path / "clip.mp4").read_text() == "an older clip"
    assert len(decode(tmp_path / "clip.partial.mp4")[0]) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4", "clip.partial.mp4"]


def test_a_video_without_a_frame_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), VideoWriter(tmp_path / "clip.mp4", 48, 32, 16):
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written_are_named(tmp_path):
    with pytest.raises(InputError, match=r"ends in \.mp4, got .*clip\.gif"):
        check_video_path(tmp_path / "clip.gif")
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(InputError, match="is a directory"):
        check_video_path(tmp_path / "folder.mp4")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is not a directory that can be written to"):
        check_video_path(tmp_path / "file" / "clip.mp4")
    assert check_video_path(tmp_path / "new" / "clip.mp4") == tmp_path / "new" / "clip.mp4"
    assert not (tmp_path / "new").exists()  # made by the writer, when there is something to write
