"""Video files are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import hashlib
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from model import InputError
from model.io.media import VideoWriter, check_video_path, reserved
from tests.support.tolerances import VIDEO_PIXELS


def frames(count, height=32, width=48, start=0):
    """Returns frames of a pattern that moves by a pixel each, of which x264 makes B-frames."""
    y, x = np.mgrid[0:height, 0 : width + 400].astype(np.float32)
    pattern = np.stack([120 + 80 * np.sin(x / period + y / 15) for period in (9, 13, 17)], axis=2).astype(np.uint8)
    return torch.from_numpy(np.stack([pattern[:, i : i + width] for i in range(start, start + count)]))


LENGTHS = [1, 12, 2, 5]
STARTS = [0, 1, 13, 15]


def write_pieces(writer):
    """Writes a film of pieces."""
    for start, length in zip(STARTS, LENGTHS, strict=True):
        writer.write(frames(length, start=start))
        writer.end_piece()
        assert len(decode(writer.partial_path)[0]) == start + length


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def decode(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)], stream.average_rate


def test_an_interrupted_video_keeps_its_frames_under_another_name(tmp_path):
    """Frames of a piece that was begun are kept too, and a file of the video's name stays as it was."""
    (tmp_path / "clip.mp4").write_text("an older clip")
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "clip.mp4", 48, 32, 16) as writer:  # noqa: PT012
        writer.write(frames(3))
        writer.end_piece()
        writer.write(frames(2))
        raise KeyboardInterrupt
    assert (tmp_path / "clip.mp4").read_text() == "an older clip"
    assert len(decode(tmp_path / "clip.partial.mp4")[0]) == writer.film_frames == 5
    assert names(tmp_path) == ["clip.mp4", "clip.partial.mp4"]


def test_a_video_without_a_frame_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), VideoWriter(tmp_path / "clip.mp4", 48, 32, 16):
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name, told in (
        ("clip.gif", r"ends in \.mp4, got .*clip\.gif"),
        ("folder.mp4", "is a directory or a device"),
        ("file/clip.mp4", "is not a directory that can be written to"),
        (f"{'a' * 240}.mp4", "out: cannot write .*: File name too long"),
        ("a\0.mp4", "out: cannot write .*: embedded null byte"),
        ("clip.partial.mp4", r"expected one without \.partial"),
        ("pipe.mp4", "is a directory or a device"),
        ("dangling/clip.mp4", "dangling is not a directory"),
    ):
        with pytest.raises(InputError, match=told):
            check_video_path(tmp_path / name)
    assert check_video_path(tmp_path / "new" / "clip.mp4") == tmp_path / "new" / "clip.mp4"
    assert not (tmp_path / "new").exists()  # made by the writer, when there is something to write


@pytest.mark.parametrize("fps", [7, 16])
def test_a_film_of_pieces_is_one_continuous_video(tmp_path, fps):
    """A film has exact times, a key frame for each piece, tagged colours, and plays while it loads."""
    with VideoWriter(tmp_path / "clip.mp4", 48, 32, fps) as writer:
        write_pieces(writer)
    assert names(tmp_path) == ["clip.mp4"]
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        read = list(container.decode(stream))
        assert (stream.frames, stream.average_rate, stream.start_time) == (20, fps, 0)
        assert stream.duration * stream.time_base == Fraction(20, fps)
        assert container.duration == pytest.approx(av.time_base * 20 / fps, abs=1)
        context = stream.codec_context
        tags = [context.colorspace, context.color_primaries, context.color_trc, context.color_range]
    assert [frame.pts * frame.time_base for frame in read] == [Fraction(i, fps) for i in range(20)]
    assert {int(frame.pict_type) for frame in read} == {1, 2, 3}  # also B-frames, for which all of this is hard
    assert [i for i, frame in enumerate(read) if frame.key_frame] == STARTS
    assert [int(tag) for tag in tags] == [1, 1, 1, 1]
    pixels = np.asarray([frame.to_ndarray(format="rgb24", src_colorspace="ITU709") for frame in read], np.float32)
    assert np.abs(pixels - frames(20).numpy()).mean() < VIDEO_PIXELS
    film = (tmp_path / "clip.mp4").read_bytes()
    assert film.index(b"moov") < film.index(b"mdat")


@pytest.mark.slow
def test_the_same_pieces_are_the_same_file_also_after_a_restart(tmp_path):
    """Films are the same file twenty times; frames that are written again replace a partial film once there are as many
    as it has."""
    films = set()
    for i in range(10):
        with VideoWriter(tmp_path / "whole.mp4", 48, 32, 16) as writer:
            write_pieces(writer)
        with pytest.raises(ZeroDivisionError), VideoWriter(tmp_path / "again.mp4", 48, 32, 16) as writer:  # noqa: PT012
            writer.write(frames(7))
            _ = 1 / 0
        with VideoWriter(tmp_path / "again.mp4", 48, 32, 16) as writer:
            writer.write(frames(i + 1, start=50))
            writer.restart(shown=7)
            writer.write(frames(1))
            writer.end_piece()
            assert len(decode(writer.partial_path)[0]) == 7
            writer.restart()
            write_pieces(writer)
        films |= {sha256(tmp_path / "whole.mp4"), sha256(tmp_path / "again.mp4")}
    assert len(films) == 1
    assert names(tmp_path) == ["again.mp4", "whole.mp4"]


@pytest.mark.parametrize("call", range(10))
def test_an_interruption_while_files_change_loses_and_doubles_no_frame(tmp_path, monkeypatch, call):
    """A writer of two pieces may be interrupted whenever it flushes or renames a file: no frame is lost or doubled."""
    count = 0

    def interrupted(function):
        def wrapped(*arguments):
            nonlocal count
            count += 1
            if count == call + 1:
                raise KeyboardInterrupt
            return function(*arguments)

        return wrapped

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, interrupted(getattr(os, name)))
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "clip.mp4", 48, 32, 16) as writer:  # noqa: PT012
        for _ in range(2):
            writer.write(frames(3))
            writer.end_piece()
    films = ["clip.mp4"] * (call >= 8) + ["clip.partial.mp4"] * (call < 9)
    assert names(tmp_path) == films
    for film in films:
        assert len(decode(tmp_path / film)[0]) == (3 if call < 3 else 6)


def test_what_killed_writers_left_is_removed_and_what_others_write_is_not(tmp_path):
    for name in (".clip.12.tmp.mp4", ".clip.partial.12.tmp.mp4", ".other.12.tmp.mp4", ".clip.12.mp4"):
        (tmp_path / name).touch()
    (tmp_path / f".clip.partial.{os.getpid()}.tmp.mp4").symlink_to(tmp_path / ".other.12.tmp.mp4")
    (tmp_path / ".clip.012.tmp.mp4").mkdir()
    with VideoWriter(tmp_path / "clip.mp4", 48, 32, 16) as writer:
        writer.write(frames(2))
        writer.end_piece()
    assert names(tmp_path) == [".clip.012.tmp.mp4", ".clip.12.mp4", ".other.12.tmp.mp4", "clip.mp4"]
    assert (tmp_path / ".other.12.tmp.mp4").read_bytes() == b""  # not written to through the link


def test_a_partial_film_replaces_nothing_but_a_partial_film(tmp_path):
    """A user's file of its name stays, a finished film of this program too, and so do links and folders."""
    path, partial = tmp_path / "clip.mp4", tmp_path / "clip.partial.mp4"
    with pytest.raises(ZeroDivisionError), VideoWriter(path, 48, 32, 16) as writer:  # noqa: PT012
        writer.write(frames(2))
        _ = 1 / 0
    with VideoWriter(path, 48, 32, 16) as writer:  # what was left unfinished is replaced
        writer.write(frames(2))
    makes = [lambda: path.rename(partial), partial.touch, partial.mkdir, lambda: partial.symlink_to("nowhere")]
    for make in makes:
        make()
        with pytest.raises(InputError, match=r"clip\.partial\.mp4 is no unfinished video of this program"):
            VideoWriter(path, 48, 32, 16)
        partial.rmdir() if partial.is_dir() else partial.unlink()  # it is still there


def test_one_video_is_made_by_one_process(tmp_path, monkeypatch):
    """A second writer is refused whatever it calls the folder, and neither lock nor folder is left."""
    (tmp_path / "link").symlink_to("new")
    (tmp_path / "new").mkdir()
    monkeypatch.chdir(tmp_path)
    with reserved(tmp_path / "new" / "clip.mp4"):
        for same in ("new/../link/clip.mp4", "link/clip.MP4"):
            with (
                pytest.raises(InputError, match=rf"is in use by another process \({os.getpid()}\)"),
                reserved(same),
            ):
                pass
        with reserved("new/other.mp4"):
            pass
        assert names(tmp_path / "new") == [".clip.lock"]
    with reserved("link/clip.mp4"), reserved("far/away/clip.mp4"), reserved("far/clip.mp4"):
        assert (tmp_path / "far" / "away").is_dir()
    assert names(tmp_path) == ["link", "new"]
    assert names(tmp_path / "new") == []
