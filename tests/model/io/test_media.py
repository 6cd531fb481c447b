"""Video files are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import hashlib
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from model import InputError
from model.io.media import VideoWriter, check_video_path, reserved
from tests.support.tolerances import VIDEO_PIXELS


def frames(count, height=32, width=48):
    ramp = np.linspace(0, 200, width, dtype=np.float32)[None, :, None] + np.zeros((height, 1, 3), np.float32)
    return [(ramp + 2 * i).astype(np.uint8) for i in range(count)]


def moving(count, height=32, width=48, start=0):
    """Returns frames of a pattern that moves by a pixel each, of which x264 makes B-frames."""
    y, x = np.mgrid[0:height, 0 : width + 400].astype(np.float32)
    pattern = np.stack([120 + 80 * np.sin(x / period + y / 15) for period in (9, 13, 17)], axis=2)
    return [pattern[:, i : i + width].astype(np.uint8) for i in range(start, start + count)]


LENGTHS = [1, 12, 2, 5]
STARTS = [0, 1, 13, 15]


def write_pieces(path, lengths=LENGTHS, first=0, fps=16, **options):
    """Writes the film of all pieces, or goes on with it from piece ``first`` on; returns its sha256."""
    with VideoWriter(path, 48, 32, fps, **options) as writer:
        assert writer.num_pieces == first
        for start, length in list(zip(STARTS, lengths, strict=True))[first:]:
            writer.write(moving(length, start=start))
            writer.end_piece()
            assert len(decode(writer.partial_path)[0]) == start + length
    return sha256(path)


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def decode(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)], stream.average_rate


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
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name, told in (
        ("clip.gif", r"ends in \.mp4, got .*clip\.gif"),
        ("folder.mp4", "is a directory"),
        ("file/clip.mp4", "is not a directory that can be written to"),
        (f"{'a' * 240}.mp4", "out: cannot write .*: File name too long"),
        ("a\0.mp4", "out: cannot write .*: embedded null byte"),
        ("clip.partial.mp4", r"expected one without \.partial"),
        ("pipe.mp4", "is a device"),
        ("dangling/clip.mp4", "dangling is not a directory"),
    ):
        with pytest.raises(InputError, match=told):
            check_video_path(tmp_path / name)
    assert check_video_path(tmp_path / "new" / "clip.mp4") == tmp_path / "new" / "clip.mp4"
    assert not (tmp_path / "new").exists()  # made by the writer, when there is something to write


# Pieces


@pytest.mark.parametrize("fps", [7, 16])
def test_a_film_of_pieces_is_one_continuous_video(tmp_path, fps):
    """A film has exact times, a key frame for each piece, tagged colours, and plays while it loads."""
    write_pieces(tmp_path / "clip.mp4", fps=fps)
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
    assert np.abs(pixels - np.asarray(moving(20), np.float32)).mean() < VIDEO_PIXELS
    film = (tmp_path / "clip.mp4").read_bytes()
    assert film.index(b"moov") < film.index(b"mdat")


@pytest.mark.slow
def test_the_same_pieces_are_the_same_file_in_one_run_or_two(tmp_path):
    """Films are the same file ten times each: in one run, with the pieces kept, and resumed at every piece."""
    films = {write_pieces(tmp_path / f"{i}.mp4") for i in range(10)}
    for i in range(10):
        pieces = tmp_path / f"pieces {i}"
        films.add(write_pieces(tmp_path / "whole.mp4", pieces=pieces))
        kept = VideoWriter(tmp_path / "resumed.mp4", 48, 32, 16, pieces=pieces)
        assert (kept.num_pieces, kept.num_frames, kept.damaged) == (4, 20, [])
        kept.keep(i % 4)
        with kept:
            assert names(pieces) == [f"piece-000{n}.mp4" for n in range(i % 4)]
        if i % 4:
            assert len(decode(tmp_path / "resumed.mp4")[0]) == STARTS[i % 4]
        films.add(write_pieces(tmp_path / "resumed.mp4", first=i % 4, pieces=pieces))
    assert len(films) == 1
    assert not list(tmp_path.glob("*.partial.mp4"))
    assert not list(tmp_path.glob(".*"))


def test_frames_of_a_piece_that_was_begun_are_kept_too(tmp_path):
    """The partial film has them; a run that goes on makes them again, and its film is that of an unbroken run."""
    pieces = tmp_path / "pieces"
    with pytest.raises(ZeroDivisionError), VideoWriter(tmp_path / "clip.mp4", 48, 32, 16, pieces=pieces) as writer:  # noqa: PT012
        for start, length in ((0, 1), (1, 12)):
            writer.write(moving(length, start=start))
            writer.end_piece()
        writer.write(moving(1, start=13))
        _ = 1 / 0
    assert (writer.num_pieces, writer.num_frames) == (2, 14)
    assert len(decode(writer.partial_path)[0]) == 14
    assert names(pieces) == ["piece-0000.mp4", "piece-0001.mp4"]
    resumed = write_pieces(tmp_path / "clip.mp4", first=2, pieces=pieces)
    assert resumed == write_pieces(tmp_path / "whole.mp4")
    assert names(tmp_path) == ["clip.mp4", "pieces", "whole.mp4"]


@pytest.mark.parametrize("call", range(16))
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
    pieces = tmp_path / "pieces"
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "clip.mp4", 48, 32, 16, pieces=pieces) as writer:  # noqa: PT012
        for _ in range(2):
            writer.write(frames(3))
            writer.end_piece()
    films = ["clip.mp4"] * (call >= 14) + ["clip.partial.mp4"] * (call < 15)
    assert names(tmp_path) == [*films, "pieces"]
    for film in films:
        assert len(decode(tmp_path / film)[0]) == (3 if call < 6 else 6)


def test_a_film_that_was_whole_already_is_made_of_its_pieces(tmp_path):
    pieces = tmp_path / "pieces"
    film = write_pieces(tmp_path / "clip.mp4", pieces=pieces)
    (tmp_path / "clip.mp4").unlink()
    with VideoWriter(tmp_path / "clip.mp4", 48, 32, 16, pieces=pieces) as writer:
        writer.end_piece()
    assert (writer.num_pieces, sha256(writer.path)) == (4, film)


@pytest.mark.parametrize("harm", ["flipped", "cut", "empty", "unsealed"])
def test_a_damaged_piece_is_named_and_dropped_with_those_behind_it(tmp_path, harm):
    pieces = tmp_path / "pieces"
    film = write_pieces(tmp_path / "clip.mp4", pieces=pieces)
    data = bytearray((pieces / "piece-0002.mp4").read_bytes())
    if harm == "flipped":
        data[len(data) // 2] ^= 4
    unsealed = data.rindex(b"free") - 4
    (pieces / "piece-0002.mp4").write_bytes(data[: {"cut": 400, "empty": 0, "unsealed": unsealed}.get(harm)])
    writer = VideoWriter(tmp_path / "clip.mp4", 48, 32, 16, pieces=pieces)
    assert writer.damaged == ["piece-0002.mp4 is damaged (sha256 differs); starting from piece 2"]
    assert (writer.num_pieces, writer.num_frames) == (2, 13)
    assert len(names(pieces)) == 4  # nothing is moved before it is known that the run goes on
    assert write_pieces(tmp_path / "clip.mp4", first=2, pieces=pieces) == film
    assert names(pieces) == sorted(["piece-0002.mp4.damaged", *(f"piece-000{n}.mp4" for n in range(4))])


def test_a_piece_of_another_run_or_number_is_not_taken_over(tmp_path):
    """A piece is good as the number and in the run that it was made for, though its bytes are whole in any."""
    path, pieces, others = tmp_path / "clip.mp4", tmp_path / "pieces", tmp_path / "others"
    write_pieces(path, pieces=pieces, run="a" * 64)
    write_pieces(path, pieces=others, run="b" * 64)
    assert VideoWriter(path, 48, 32, 16, pieces=pieces).num_pieces == 0  # of no run
    for source, taken in ((pieces / "piece-0000.mp4", 3), (others / "piece-0002.mp4", 2)):
        place = pieces / f"piece-000{taken}.mp4"
        place.write_bytes(source.read_bytes())
        writer = VideoWriter(path, 48, 32, 16, pieces=pieces, run="a" * 64)
        assert (writer.num_pieces, len(writer.damaged)) == (taken, 1)


def test_a_piece_that_changes_while_the_film_is_made_does_not_get_into_it(tmp_path):
    writer = VideoWriter(tmp_path / "clip.mp4", 48, 32, 16, pieces=tmp_path / "pieces")
    told = r"piece-0000\.mp4 was changed while the video is made: sha256 differs"
    with pytest.raises(InputError, match=told), writer:  # noqa: PT012
        for _ in range(2):
            writer.write(frames(2))
            writer.end_piece()
            (tmp_path / "pieces" / "piece-0000.mp4").write_bytes(b"other")
    assert len(decode(writer.partial_path)[0]) == 2


@pytest.mark.parametrize("other", [(64, 32, 16), (48, 32, 25)])
def test_pieces_of_another_video_are_not_taken_over(tmp_path, other):
    write_pieces(tmp_path / "clip.mp4", pieces=tmp_path / "pieces")
    writer = VideoWriter(tmp_path / "clip.mp4", *other, pieces=tmp_path / "pieces")
    assert (writer.num_pieces, writer.num_frames) == (0, 0)
    (message,) = writer.damaged
    assert message.startswith("piece-0000.mp4 ")


def test_pieces_that_are_not_kept_are_dropped(tmp_path):
    pieces = tmp_path / "pieces"
    write_pieces(tmp_path / "clip.mp4", pieces=pieces)
    with VideoWriter(tmp_path / "clip.mp4", 48, 32, 16, pieces=pieces) as writer:
        writer.keep(3)
        assert names(pieces) == ["piece-0000.mp4", "piece-0001.mp4", "piece-0002.mp4"]
        writer.write(frames(1))
    assert (writer.num_pieces, writer.num_frames) == (4, 16)


def test_what_killed_writers_left_is_removed_and_what_others_write_is_not(tmp_path):
    for name in (".clip.12.tmp.mp4", ".clip.partial.12.tmp.mp4", ".other.12.tmp.mp4", ".clip.12.mp4"):
        (tmp_path / name).touch()
    (tmp_path / f".clip.partial.{os.getpid()}.tmp.mp4").symlink_to(tmp_path / ".other.12.tmp.mp4")
    (tmp_path / ".clip.012.tmp.mp4").mkdir()
    with VideoWriter(tmp_path / "clip.mp4", 48, 32, 16) as writer:
        writer.write(frames(2))
    assert names(tmp_path) == [".clip.012.tmp.mp4", ".clip.12.mp4", ".other.12.tmp.mp4", "clip.mp4"]
    assert (tmp_path / ".other.12.tmp.mp4").read_bytes() == b""  # not written to through the link


# Files of others


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
