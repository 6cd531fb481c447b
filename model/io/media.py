"""Writing video: PyAV (FFmpeg) encodes; the extra ``generate`` has it."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import struct
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
from torch import Tensor

from model.errors import InputError, require
from model.io.durable import remove_strays, rename, replacing, temporary_name

#: FFmpeg's AVCOL_SPC_BT709, AVCOL_PRI_BT709 and AVCOL_TRC_BT709, and AVCOL_RANGE_MPEG, for which PyAV before 17 has no
#: names.
BT709, LIMITED_RANGE = 1, 1
#: mbtree: x264's macroblock tree made 4 different files of the same frames in 150 runs. stitchable: headers that do not
#: depend on the frames, so that those of the first piece are those of all. aud: a mark before each picture, since two
#: key frames in a row, from two encoders, have the same number.
X264 = {"preset": "medium", "x264-params": "mbtree=0:stitchable=1:aud=1"}
#: Frames by which packets are decoded before they are shown: x264's B-frames refer to other B-frames, but not these.
REORDERED = 2
_SEAL = b"sha256 of the bytes before this box: "


class VideoWriter:
    """A writer of H.264 MP4 files that takes frames as they come, in *pieces* that outlive the process.

    A piece has the frames between two calls of :meth:`end_piece`. It has an encoder of its own, so it starts with a key
    frame and refers to no other piece, and is kept as a small MP4 file. The film is the packets of one piece after the
    other, nothing encoded again: the same frames in the same pieces are the same bytes, in one run or in several.

    After each piece ``NAME.partial.mp4`` is a film of all pieces so far, whatever happens then, SIGKILL included. If
    the work fails or is interrupted, it also gets the frames of the piece that was begun; if the work is done, the film
    takes its own name and the partial one is gone. With no frame nothing is left.

    Args:
        path: the file to write; must end in ``.mp4``.
        width, height: pixels, both even.
        fps: frames a second.
        crf: quality of x264; 0 is lossless, 18 is visually lossless.
        pieces: a folder in which the pieces stay, ``piece-0000.mp4`` and so on, so that another writer can go on after
            them. By default they are in a hidden folder next to ``path`` until the film is made.

    Attributes:
        film_frames: frames of the film that this writer has made so far, at :attr:`partial_path` or ``path``.
        num_pieces, num_frames: finished pieces, and frames of these and of the one begun. A new writer counts those
            that it found in ``pieces``, from the first on, up to one that is missing, damaged or encoded otherwise.
        damaged: a sentence about the damaged piece, if there is one. Entering the writer renames its file to
            ``piece-0002.mp4.damaged`` and deletes the pieces after it.

    Raises:
        InputError: ``path`` has another suffix, or is a place that cannot be written to.
    """

    def __init__(
        self, path: str | Path, width: int, height: int, fps: int, crf: int = 16, pieces: str | Path | None = None
    ):
        self.path = check_video_path(path)
        self._av = require("av", "generate")
        self._settings = width, height, fps, crf
        self._own = pieces is None
        self.pieces = temporary_name(self.path.with_suffix(".pieces")) if pieces is None else Path(pieces)
        self._encoder: _Encoder | None = None
        self._entered = self._joined = False
        self.film_frames = 0
        self.damaged: list[str] = []
        self._bad: int | None = None
        self._lengths = [] if self._own else self._found()
        self.num_frames = sum(self._lengths)

    @property
    def num_pieces(self) -> int:
        """The number of finished pieces."""
        return len(self._lengths)

    @property
    def partial_path(self) -> Path:
        """The file that has the frames until the work is finished."""
        return self.path.with_suffix(".partial.mp4")

    def keep(self, pieces: int) -> None:
        """Keeps the first ``pieces`` finished pieces, to go on after them, and drops the others.

        Raises:
            ValueError: there are fewer, or another one is begun.
        """
        if not 0 <= pieces <= self.num_pieces:
            raise ValueError(f"pieces: expected 0 to {self.num_pieces}, got {pieces}")
        if self._encoder is not None:
            raise ValueError("pieces: a further one is begun")
        if pieces < self.num_pieces:
            self._joined = False
        del self._lengths[pieces:]
        self.num_frames = sum(self._lengths)
        if self._entered:
            self._drop_others()

    def __enter__(self) -> VideoWriter:
        self._entered = True
        self.path.parent.mkdir(parents=True, exist_ok=True)
        names = self.path.name, self.partial_path.name, self.path.with_suffix(".pieces").name
        remove_strays(self.path.parent, *names)
        self.pieces.mkdir(parents=True, exist_ok=True)
        self._drop_others()
        return self

    def write(self, frames: Tensor | Iterable[np.ndarray]) -> None:
        """Encodes frames ``[H, W, 3]`` uint8, or a tensor ``[F, H, W, 3]`` of them."""
        for pixels in frames.cpu().numpy() if isinstance(frames, Tensor) else frames:
            if self._encoder is None:
                self._encoder = _Encoder(self._av, *self._settings)
            self._encoder.write(pixels)
            self.num_frames += 1

    def end_piece(self) -> None:
        """Makes the frames since the last piece a piece of the film, on disk; does nothing if there are none."""
        if self._encoder is None:
            return
        piece = self._encoder.close()
        # The film first: it has every finished piece at any moment.
        self._join([piece])
        with replacing(self.pieces / piece_name(self.num_pieces)) as temporary:
            temporary.write_bytes(_sealed(piece))
        self._lengths.append(self._encoder.num_frames)
        self._encoder = None

    def drop_begun(self) -> None:
        """Forgets the frames since the last piece, which are to be made again."""
        if self._encoder is not None:
            self._encoder.close()
            self.num_frames = sum(self._lengths)
            self._encoder = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.end_piece()
        begun = [] if self._encoder is None else [self._encoder.close()]
        if begun or (self.num_pieces and not (self._joined and self.partial_path.exists())):
            self._join(begun)
        if kind is None and self.num_pieces:
            rename(self.partial_path, self.path)
        if self._own:
            shutil.rmtree(self.pieces)

    def _drop_others(self) -> None:
        """Makes the counted pieces the only ones in the folder."""
        later = [(number, path) for number, path in _pieces(self.pieces) if number >= self.num_pieces]
        remove_strays(self.pieces, piece_name(self.num_pieces), *(path.name for _, path in later))
        # The last one first, so that no gap is left whenever this ends.
        for number, path in sorted(later, reverse=True):
            if number == self._bad:
                rename(path, path.with_name(f"{path.name}.damaged"))
            else:
                path.unlink()

    def _join(self, further: list[bytes]) -> None:
        """Makes the partial film of the finished pieces and further ones."""
        finished = [self.pieces / piece_name(number) for number in range(self.num_pieces)]
        with replacing(self.partial_path) as temporary:
            _join(self._av, [*map(str, finished), *map(io.BytesIO, further)], temporary, self._settings[2])
        self._joined = True
        self.film_frames = self.num_frames

    def _found(self) -> list[int]:
        """Returns the numbers of frames of the good pieces, and records what is wrong with the next one, if any."""
        lengths: list[int] = []
        expected = None
        while (path := self.pieces / piece_name(len(lengths))).exists():
            if expected is None:
                # The parameter sets that this encoder writes: those of all pieces, which the film has once.
                width, height, *_ = self._settings
                encoder = _Encoder(self._av, *self._settings)
                encoder.write(np.zeros((height, width, 3), np.uint8))
                expected = _described(self._av, encoder.close())[1:]
            try:
                frames, *described = _described(self._av, _unsealed(path))
                if tuple(described) != expected:
                    raise ValueError("its encoding is not this video's")
            except (OSError, ValueError) as error:
                self._bad = len(lengths)
                self.damaged.append(f"{path.name} is damaged ({error}); starting from piece {self._bad}")
                break
            lengths.append(frames)
        return lengths


def piece_name(number: int) -> str:
    """Returns the file name of a piece; pieces are counted from 0."""
    return f"piece-{number:04d}.mp4"


def _pieces(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.iterdir():
        match = re.fullmatch(r"piece-(\d{4,})\.mp4", path.name)
        if match:
            yield int(match[1]), path


class _Encoder:
    """The encoder of one piece, which takes frames and gives the bytes of an MP4 file."""

    def __init__(self, av: ModuleType, width: int, height: int, fps: int, crf: int):
        self._av, self._tick = av, Fraction(1, fps)
        self._file = io.BytesIO()
        self._container = av.open(self._file, "w", format="mp4")
        self._stream = self._container.add_stream("libx264", rate=fps, options={"crf": str(crf), **X264})
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        # Tagged as BT.709, as players assume for HD: untagged files are shown with shifted colours by some.
        context = self._stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED_RANGE
        self.num_frames = 0
        self._num_packets = 0
        self._bytes: bytes | None = None

    def write(self, pixels: np.ndarray) -> None:
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        # Converted here and not by the encoder, whose own conversion is not the same from run to run.
        frame = frame.reformat(format="yuv420p", src_colorspace="ITU709", dst_colorspace="ITU709")
        frame.pts, frame.time_base = self.num_frames, self._tick
        self._mux(self._stream.encode(frame))
        self.num_frames += 1

    def close(self) -> bytes:
        """Ends the piece, to which nothing can be written any more, and returns the bytes of its file."""
        if self._bytes is None:
            self._mux(self._stream.encode())
            self._container.close()
            self._bytes = self._file.getvalue()
        return self._bytes

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


def _join(av: ModuleType, pieces: Iterable[str | io.BytesIO], target: Path, fps: int) -> None:
    """Writes the packets of one piece after the other to a file that can be played while it is still loading."""
    tick = Fraction(1, fps)
    stream, num_packets = None, 0
    # Times are in whole ticks. PyAV before 14 does not let the stream be given a time base.
    options = {"movflags": "faststart", "video_track_timescale": str(1000 * fps)}
    with av.open(str(target), "w", format="mp4", options=options) as film:
        for source in pieces:
            before = num_packets
            with av.open(source) as piece:
                given = piece.streams.video[0]
                if stream is None:
                    # PyAV before 14 has the one, PyAV from 14 on the other.
                    copied = getattr(film, "add_stream_from_template", None)
                    stream = film.add_stream(template=given) if copied is None else copied(given)
                for packet in piece.demux(given):
                    if packet.size == 0:
                        continue  # the end
                    _place(packet, before + round(packet.pts * packet.time_base * fps), num_packets, tick)
                    packet.stream = stream
                    film.mux(packet)
                    num_packets += 1


def _described(av: ModuleType, piece: bytes) -> tuple[Any, ...]:
    """Returns the number of frames of a piece, and the settings that must be the same in all pieces of a film."""
    with av.open(io.BytesIO(piece)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        return stream.frames, context.width, context.height, stream.average_rate, context.extradata


def _sealed(piece: bytes) -> bytes:
    """Returns the bytes of a file with their sha256 appended in a box that every reader of MP4 skips."""
    return piece + struct.pack(">I4s", 8 + len(_SEAL) + 32, b"free") + _SEAL + hashlib.sha256(piece).digest()


def _unsealed(path: Path) -> bytes:
    """Returns the bytes of a sealed file without the box that :func:`_sealed` has appended.

    Raises:
        ValueError: the file is not as it was written.
    """
    sealed = path.read_bytes()
    piece = sealed[: -40 - len(_SEAL)]
    if _sealed(piece) != sealed:
        raise ValueError("sha256 differs")
    return piece


def check_video_path(path: str | Path) -> Path:
    """Returns ``path`` if an MP4 can be written there; its directory need not exist, since the writer makes it.

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
