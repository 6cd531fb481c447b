"""Writing video: PyAV (FFmpeg) encodes; the extra ``generate`` has it."""

from __future__ import annotations

import hashlib
import io
import os
import re
import struct
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from fractions import Fraction
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor

from model.errors import InputError, require
from model.io.durable import check_place, open_plain, remove_strays, rename, replacing, sync_folder, writing
from model.io.lock import FileLock

#: FFmpeg's AVCOL_SPC_BT709, AVCOL_PRI_BT709 and AVCOL_TRC_BT709, and AVCOL_RANGE_MPEG, for which PyAV before 17 has no
#: names.
BT709, LIMITED_RANGE = 1, 1
#: mbtree: x264's macroblock tree made 4 different files of the same frames in 150 runs. stitchable: headers that do not
#: depend on the frames, so that those of the first piece are those of all. aud: a mark before each picture, since two
#: key frames in a row, from two encoders, have the same number.
X264 = {"preset": "medium", "x264-params": "mbtree=0:stitchable=1:aud=1"}
#: Frames by which packets are decoded before they are shown: x264's B-frames refer to other B-frames, but not these.
REORDERED = 2
_SEAL = b"sha256 of name, run and the bytes before this box: "
_SEAL_BYTES = 8 + len(_SEAL) + 32
#: The form of the names that :func:`piece_name` gives.
PIECE = re.compile(r"piece-([0-9]{4,})\.mp4")


def _box(content: bytes) -> bytes:
    """Returns a box that every reader of MP4 skips, to be appended to a file."""
    return struct.pack(">I4s", 8 + len(content), b"free") + content


#: The end of a partial film, by which it is told from a user's file of its name.
_UNFINISHED = _box(b"unfinished video of swifti2v")


class VideoWriter:
    """A writer of H.264 MP4 files that takes frames as they come, in *pieces* that outlive the process.

    A piece has the frames between two calls of :meth:`end_piece`. It has an encoder of its own, so it starts with a key
    frame and refers to no other piece, and is kept as a small MP4 file. The film is the packets of one piece after the
    other, nothing encoded again: the same frames in the same pieces are the same bytes, in one run or in several.

    After each piece ``NAME.partial.mp4`` is a film of all pieces so far, whatever happens then, SIGKILL included. If
    the work fails or is interrupted, it also gets the frames of the piece that was begun; if the work is done, the film
    is there under its own name and the partial one is gone. With no frame nothing is left.

    Args:
        path: the file to write; must end in ``.mp4``.
        width, height: pixels, both even.
        fps: frames a second.
        crf: quality of x264; 0 is lossless, 18 is visually lossless.
        pieces: a folder in which the pieces stay, ``piece-0000.mp4`` and so on, so that another writer can go on after
            them. By default they are in memory until the film is made.
        run: the digest of the run that the pieces are of. A piece of another run, or of another number, is damaged.

    Attributes:
        film_frames: frames of the film that this writer has made so far, at :attr:`partial_path` or ``path``.
        damaged: a sentence about the damaged piece, if there is one. Entering the writer renames its file to
            ``piece-0002.mp4.damaged`` and deletes the pieces after it.

    Raises:
        InputError: as for :func:`check_video_path`.
    """

    def __init__(
        self,
        path: str | Path,
        width: int,
        height: int,
        fps: int,
        crf: int = 16,
        pieces: str | Path | None = None,
        run: str = "",
    ):
        self.path = check_video_path(path)
        self._av = require("av", "generate")
        self._settings = width, height, fps, crf
        self.pieces, self._run = None if pieces is None else Path(pieces), run
        self._encoder: _Encoder | None = None
        self.film_frames = 0
        self.damaged: list[str] = []
        self._bad: int | None = None
        #: Of each finished piece the number of frames, and its file or its bytes.
        self._finished: list[tuple[int, Path | bytes]] = []
        if self.pieces is not None:
            self._find(self.pieces)

    @property
    def num_pieces(self) -> int:
        """The number of finished pieces.

        A new writer counts those that it found, from the first on, up to one that is missing, damaged or encoded
        otherwise.
        """
        return len(self._finished)

    @property
    def num_frames(self) -> int:
        """The number of frames of the finished pieces and of the one begun."""
        begun = 0 if self._encoder is None else self._encoder.num_frames
        return begun + sum(frames for frames, _ in self._finished)

    @property
    def partial_path(self) -> Path:
        """The file that has the frames until the work is finished."""
        return _partial(self.path)

    def keep(self, pieces: int) -> None:
        """Keeps the first ``pieces`` finished pieces, to go on after them, and drops the others.

        There are as many, and no further one is begun.
        """
        del self._finished[pieces:]
        self._drop_others()

    def __enter__(self) -> VideoWriter:
        with writing(f"out: {self.path}"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.pieces is not None:
                self.pieces.mkdir(parents=True, exist_ok=True)
        remove_strays(self.path.parent, {self.path.name, self.partial_path.name}.__contains__)
        self._drop_others()
        return self

    def write(self, frames: Tensor | Iterable[np.ndarray]) -> None:
        """Encodes frames ``[H, W, 3]`` uint8, or a tensor ``[F, H, W, 3]`` of them."""
        for pixels in frames.cpu().numpy() if isinstance(frames, Tensor) else frames:
            if self._encoder is None:
                self._encoder = _Encoder(self._av, *self._settings)
            self._encoder.write(pixels)

    def end_piece(self) -> None:
        """Makes the frames since the last piece a piece of the film, on disk; does nothing if there are none."""
        if self._encoder is None:
            return
        piece: Path | bytes = self._encoder.close()
        # The film first: it has every finished piece at any moment.
        self._join(self.partial_path, [piece])
        if self.pieces is not None:
            place = self.pieces / piece_name(self.num_pieces)
            with writing(f"run: {place}"), replacing(place) as temporary:
                temporary.write_bytes(_sealed(piece, place.name, self._run))
            piece = place
        self._finished.append((self._encoder.num_frames, piece))
        self._encoder = None

    def drop_begun(self) -> None:
        """Forgets the frames since the last piece, which are to be made again."""
        if self._encoder is not None:
            self._encoder.close()
            self._encoder = None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.end_piece()
        begun = [] if self._encoder is None else [self._encoder.close()]
        if kind is None and self.num_pieces:
            self._join(self.path)
            with writing(f"out: {self.path}"):
                self.partial_path.unlink(missing_ok=True)
                sync_folder(self.path.parent)
        elif begun or self.num_pieces:
            self._join(self.partial_path, begun)

    def _drop_others(self) -> None:
        """Makes the counted pieces the only ones in the folder."""
        if self.pieces is None:
            return
        later = [(number, path) for number, path in _pieces(self.pieces) if number >= self.num_pieces]
        remove_strays(self.pieces, {piece_name(self.num_pieces), *(path.name for _, path in later)}.__contains__)
        # The last one first, so that no gap is left whenever this ends.
        for number, path in sorted(later, reverse=True):
            if number == self._bad:
                rename(path, path.with_name(f"{path.name}.damaged"))
            else:
                path.unlink()

    def _join(self, film: Path, further: Iterable[bytes] = ()) -> None:
        """Makes the film of the finished pieces and further ones; a partial one is marked as such."""
        with writing(f"out: {film}"), replacing(film) as temporary:
            _join(self._av, chain(self._read(), further), temporary, self._settings[2])
            if film == self.partial_path:
                with temporary.open("ab") as file:
                    file.write(_UNFINISHED)
        self.film_frames = self.num_frames

    def _read(self) -> Iterator[bytes]:
        """Yields the finished pieces."""
        for _, piece in self._finished:
            try:
                yield piece if isinstance(piece, bytes) else _unsealed(piece, self._run)
            except (OSError, ValueError) as error:
                raise InputError(f"out: {piece} was changed while the video is made: {error}") from error

    def _find(self, folder: Path) -> None:
        """Counts the good pieces in the folder, and records what is wrong with the next one, if any."""
        expected = None
        while os.path.lexists(path := folder / piece_name(self.num_pieces)):
            if expected is None:
                # The parameter sets that this encoder writes: those of all pieces, which the film has once.
                width, height, *_ = self._settings
                encoder = _Encoder(self._av, *self._settings)
                encoder.write(np.zeros((height, width, 3), np.uint8))
                expected = _described(self._av, encoder.close())[1:]
            try:
                frames, *described = _described(self._av, _unsealed(path, self._run))
                if tuple(described) != expected:
                    raise ValueError("its encoding is not this video's")
            except (OSError, ValueError, IndexError, self._av.error.FFmpegError) as error:
                self._bad = self.num_pieces
                self.damaged.append(f"{path.name} is damaged ({error}); starting from piece {self._bad}")
                break
            self._finished.append((frames, path))


def piece_name(number: int) -> str:
    """Returns the file name of a piece; pieces are counted from 0."""
    return f"piece-{number:04d}.mp4"


def _pieces(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.iterdir():
        match = PIECE.fullmatch(path.name)
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


def _join(av: ModuleType, pieces: Iterable[bytes], target: Path, fps: int) -> None:
    """Writes the packets of one piece after the other to a file that can be played while it is still loading."""
    tick = Fraction(1, fps)
    stream, num_packets = None, 0
    # Times are in whole ticks. PyAV before 14 does not let the stream be given a time base.
    options = {"movflags": "faststart", "video_track_timescale": str(1000 * fps)}
    with av.open(str(target), "w", format="mp4", options=options) as film:
        for source in pieces:
            before = num_packets
            with av.open(io.BytesIO(source)) as piece:
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


def _sealed(piece: bytes, name: str, run: str) -> bytes:
    """Returns the bytes of a file with a seal: a box with the sha256 of its name, its run and these bytes."""
    return piece + _box(_SEAL + hashlib.sha256(f"{name} of {run}: ".encode() + piece).digest())


def _unsealed(path: Path, run: str) -> bytes:
    """Returns the bytes of a sealed file without the box that :func:`_sealed` has appended.

    Raises:
        ValueError: the file is not as it was written, or was written under another name or for another run.
    """
    with os.fdopen(open_plain(path), "rb") as file:
        sealed = file.read()
    piece = sealed[:-_SEAL_BYTES]
    if _sealed(piece, path.name, run) != sealed:
        raise ValueError("sha256 differs")
    return piece


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
    if path.is_dir():
        raise InputError(f"out: {path} is a directory")
    if path.exists() and not path.is_file():
        raise InputError(f"out: {path} is a device, expected a file or none")
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
