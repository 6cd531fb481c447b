"""Writing video: PyAV (FFmpeg) encodes; the extra ``generate`` has it."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryFile
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor

from model.errors import InputError, require
from model.io.durable import FileLock, check_place, open_plain, remove_strays, replacing, sync_folder, writing

#: FFmpeg's AVCOL_SPC_BT709, AVCOL_PRI_BT709 and AVCOL_TRC_BT709, and AVCOL_RANGE_MPEG, for which PyAV before 17 has no
#: names.
BT709, LIMITED_RANGE = 1, 1
#: crf: the quality; 0 is lossless, 18 visually so. mbtree: x264's macroblock tree made 4 different files of the same
#: frames in 150 runs. stitchable: headers that do not depend on the frames, so that those of the first piece are those
#: of all. aud: a mark before each picture, since two key frames in a row, from two encoders, have the same number.
X264 = {"crf": "16", "preset": "medium", "x264-params": "mbtree=0:stitchable=1:aud=1"}
#: Frames by which packets are decoded before they are shown: x264's B-frames refer to other B-frames, but not these.
REORDERED = 2
#: The end of a partial film, by which it is told from a user's file of its name: a box that readers of MP4 skip.
_UNFINISHED = struct.pack(">I4s28s", 36, b"free", b"unfinished video of swifti2v")


class VideoWriter:
    """A writer of H.264 MP4 files that takes frames as they come, in *pieces*.

    A piece has the frames between two calls of :meth:`end_piece`. It has an encoder of its own, so it starts with a key
    frame and refers to no other piece. The film is the packets of one piece after the other, nothing encoded again: the
    same frames in the same pieces are the same bytes. Until then all pieces are in a file without a name beside it.

    After each piece ``NAME.partial.mp4`` is a film of all pieces so far, whatever happens then, SIGKILL included. If
    the work fails or is interrupted, it also gets the frames of the piece that was begun; if the work is done, the film
    is there under its own name and the partial one is gone. With no frame nothing is left.

    Args:
        path: the file to write; must end in ``.mp4``.
        width, height: pixels, both even.
        fps: frames a second.

    Attributes:
        num_frames: frames that were written since the last :meth:`restart`.
        film_frames: frames of the film that this writer has made so far, at :attr:`partial_path` or ``path``.
        partial_path: the file that has the frames until the work is finished.

    Raises:
        InputError: as for :func:`check_video_path`.
    """

    def __init__(self, path: str | Path, width: int, height: int, fps: int):
        self.path = check_video_path(path)
        self.partial_path = _partial(self.path)
        self._av = require("av", "generate")
        self._settings = width, height, fps
        self._encoder: _Encoder | None = None
        self._sizes: list[int] = []
        self.num_frames = self.film_frames = self._shown = 0

    def __enter__(self) -> VideoWriter:
        with writing(f"out: {self.path}"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._pieces = TemporaryFile(dir=self.path.parent)
        remove_strays(self.path.parent, {self.path.name, self.partial_path.name}.__contains__)
        return self

    def restart(self, shown: int = 0) -> None:
        """Forgets all frames, which are to be written again.

        A partial film, which may have been left by another writer, is replaced when there are ``shown`` frames again.
        """
        self._encoder, self._sizes = None, []
        self.num_frames, self._shown = 0, shown

    def write(self, frames: Tensor) -> None:
        """Encodes frames ``[F, H, W, 3]`` uint8."""
        if self._encoder is None:
            self._encoder = _Encoder(self._av, *self._settings)
        for pixels in frames.cpu().numpy():
            self._encoder.write(pixels)
            self.num_frames += 1

    def end_piece(self) -> None:
        """Makes the frames since the last piece a piece of the film, on disk; does nothing if there are none."""
        if self._encoder is not None:
            self._take_begun()
            if self.num_frames >= self._shown:
                self._join(self.partial_path)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._pieces:
            self._take_begun()
            if kind is None and self._sizes:
                self._join(self.path)
                with writing(f"out: {self.path}"):
                    self.partial_path.unlink(missing_ok=True)
                    sync_folder(self.path.parent)
            elif self._sizes and self.num_frames >= self._shown:
                self._join(self.partial_path)

    def _take_begun(self) -> None:
        """Ends the piece that was begun, if any."""
        if self._encoder is not None:
            piece = self._encoder.close()
            self._encoder = None
            self._pieces.seek(sum(self._sizes))
            self._pieces.write(piece)
            self._sizes.append(len(piece))

    def _join(self, film: Path) -> None:
        """Makes the film of all pieces, which can be played while it is still loading; a partial one has its mark."""
        self._pieces.seek(0)
        with writing(f"out: {film}"), replacing(film) as temporary:
            _join(self._av, map(self._pieces.read, self._sizes), temporary, self._settings[2])
            if film == self.partial_path:
                with temporary.open("ab") as file:
                    file.write(_UNFINISHED)
        self.film_frames = self.num_frames


class _Encoder:
    """The encoder of one piece, which takes frames and gives the bytes of an MP4 file."""

    def __init__(self, av: ModuleType, width: int, height: int, fps: int):
        self._av, self._tick = av, Fraction(1, fps)
        self._file = io.BytesIO()
        self._container = av.open(self._file, "w", format="mp4")
        self._stream = self._container.add_stream("libx264", rate=fps, options=X264)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        # Tagged as BT.709, as players assume for HD: untagged files are shown with shifted colours by some.
        context = self._stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED_RANGE
        self._num_frames = self._num_packets = 0

    def write(self, pixels: np.ndarray) -> None:
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        # Converted here and not by the encoder, whose own conversion is not the same from run to run.
        frame = frame.reformat(format="yuv420p", src_colorspace="ITU709", dst_colorspace="ITU709")
        frame.pts, frame.time_base = self._num_frames, self._tick
        self._mux(self._stream.encode(frame))
        self._num_frames += 1

    def close(self) -> bytes:
        """Ends the piece, to which nothing can be written any more, and returns the bytes of its file."""
        self._mux(self._stream.encode())
        self._container.close()
        return self._file.getvalue()

    def _mux(self, packets: Iterable[Any]) -> None:
        for packet in packets:
            _place(packet, packet.pts, self._num_packets, self._tick)
            self._container.mux(packet)
            self._num_packets += 1


def _place(packet: Any, shown: int, number: int, tick: Fraction) -> None:
    """Sets the times of a packet: the frame that it shows, and how many packets come before it.

    x264 gives decoding times too, but those of pieces of one or two frames start later than those of longer ones.
    """
    packet.time_base = tick
    packet.pts, packet.dts, packet.duration = shown, number - REORDERED, 1


def _join(av: ModuleType, pieces: Iterable[bytes], target: Path, fps: int) -> None:
    """Writes the packets of one piece after the other."""
    tick = Fraction(1, fps)
    stream, num_packets = None, 0
    # Times are in whole ticks.
    options = {"movflags": "faststart", "video_track_timescale": str(1000 * fps)}
    with av.open(str(target), "w", format="mp4", options=options) as film:
        for source in pieces:
            before = num_packets
            with av.open(io.BytesIO(source)) as piece:
                given = piece.streams.video[0]
                if stream is None:
                    stream = film.add_stream_from_template(given)
                for packet in piece.demux(given):
                    if packet.size == 0:
                        continue  # the end
                    _place(packet, before + round(packet.pts * packet.time_base * fps), num_packets, tick)
                    packet.stream = stream
                    film.mux(packet)
                    num_packets += 1


def _partial(path: Path) -> Path:
    return path.with_suffix(".partial.mp4")


def _is_unfinished(path: Path) -> bool:
    """Returns whether a file is a partial film of this program."""
    try:
        with os.fdopen(open_plain(path), "rb") as file:
            file.seek(-len(_UNFINISHED), os.SEEK_END)
            return file.read() == _UNFINISHED
    except (OSError, InputError):
        return False


def check_video_path(path: str | Path) -> Path:
    """Returns ``path`` if an MP4 can be written there; its directory need not exist, since the writer makes it.

    Raises:
        InputError: another suffix, a directory, a place that cannot be written, or a file that is no partial film of
            this program where the partial film would be.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise InputError(f"out: expected a name that ends in .mp4, got {path}")
    if path.stem.lower().endswith(".partial"):
        raise InputError(f"out: {path} is the name of an unfinished video; expected one without .partial")
    partial = _partial(path)
    check_place(partial, "out")
    if path.exists() and not path.is_file():
        raise InputError(f"out: {path} is a directory or a device, expected a file or none")
    if os.path.lexists(partial) and not _is_unfinished(partial):
        raise InputError(
            f"out: {partial} is no unfinished video of this program, which would be there: move it away, or choose"
            " another name"
        )
    return path


@contextmanager
def reserved(path: str | Path) -> Iterator[Path]:
    """Keeps other processes from making the video at ``path`` while the body runs, and yields its path.

    The lock is a hidden file beside the video, for which missing folders are made; all of them are gone at the end
    unless something was put there.

    Raises:
        InputError: another process makes this video, or as for :func:`check_video_path`.
    """
    path = check_video_path(path)
    missing = [folder for folder in path.absolute().parents if not folder.exists()]
    with writing(f"out: {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # Videos whose names differ in their suffix alone (.mp4, .MP4) have the same partial film.
        with closing(FileLock(path.with_name(f".{path.stem}.lock"), "out", path)):
            yield path
    finally:
        for folder in missing:
            with suppress(OSError):  # something is there
                folder.rmdir()
