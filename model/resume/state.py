"""The folder that keeps what a run has made, so that it can go on after any end, SIGKILL and power loss included.

    job.json                  what is made, of which inputs, by which software on which device; written first
    inputs.safetensors        the picture at both sizes, text and image embeddings
    motion.safetensors        Stage I's latents
    condition.safetensors     the reference that Stage II starts from
    segment-0001.safetensors  the blocks of a segment, and so on
    piece-0000.mp4            the pieces of the film (:class:`model.io.media.VideoWriter`), if they are kept here
    lock                      there while a process works here (:class:`model.io.lock.FileLock`)

Every file is written under another name, flushed to disk and renamed, and carries the sha256 of what it holds, of its
name and of the run's job: a file of another run, or under another name, is damaged. Each of the tensor files is made
from those before it in this order, so saving one drops those after it: the files that are there always belong together.

A folder is judged before anything is written: whatever has the name of a run's file and is none stays as it is, and
the folder is refused. Nothing is read, written or deleted through a link.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import swifti2v_kernels
from model.errors import InputError, printable
from model.io.durable import open_plain, remove_strays, rename, sync_folder, write_text, writing
from model.io.lock import FileLock
from model.io.media import PIECE
from model.resume.changes import Changes, changes_between
from model.resume.files import DamagedError, Shapes, check_tensors, read_tensors, write_tensors

#: Version of the layout of the folder and its files.
SCHEMA = 2
_BEFORE = ("inputs", "motion", "condition")
_JOB, _LOCK = "job.json", "lock"
#: How a run's job begins, by which it is told from a user's file of its name.
_JOB_BEGINS = b'{\n  "schema": '
_TENSORS = re.compile(rf"({'|'.join(_BEFORE)})|segment-([0-9]{{4,}})")
_KNOWN = re.compile(rf"{re.escape(_JOB)}|(({_TENSORS.pattern})\.safetensors|{PIECE.pattern})(\.damaged)?")


class RunState:
    """The state of a run in a folder: :meth:`create` begins one, :meth:`open` goes on with it.

    It is a context manager, or is closed by :meth:`close`: until then no other process can open the folder (where the
    system has such locks; they end with the process).

    Attributes:
        folder: the folder that holds everything.
        job: the job that was given to :meth:`create`, with the section ``software``.
        digest: the sha256 of the job, which binds every other file to this run.
        damaged: a sentence for each file that was to be read and is damaged. Such files are renamed to
            ``NAME.damaged``.
    """

    def __init__(self, folder: Path, job: dict[str, Any], lock: FileLock):
        """Keeps the lock; use :meth:`create` or :meth:`open` instead of this."""
        self.folder, self.job, self.digest = folder, job, _job_digest(job)
        self.damaged: list[str] = []
        self._lock = lock

    @classmethod
    def create(cls, folder: str | Path, job: Mapping[str, Any], restart: bool = False) -> RunState:
        """Begins a run in a folder.

        Args:
            folder: is made if it is not there; it may hold other files.
            job: everything that defines the run, as JSON has it, in sections (dictionaries);
                ``model/resume/changes.py`` says which of them may differ when the run goes on. ``software`` is added.
            restart: whether a run that is there is deleted, and not an error.

        Raises:
            InputError: there is a run already, something else has the name of a run's file, another process works
                there, or the folder cannot be written.
        """
        folder = Path(folder)
        cls.holds(folder)  # nothing is made beside what is of no run
        with writing(f"run: {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            lock = held.enter_context(closing(FileLock(folder / _LOCK, "run", folder)))
            if cls.holds(folder) and not restart:
                raise InputError(f"run: {folder} already holds a run: resume it or name another folder")
            _discard(folder)
            complete = _as_json({**job, "software": software()})
            text = json.dumps({"schema": SCHEMA, "sha256": _job_digest(complete), "job": complete}, indent=2)
            with writing(f"run: {folder}"):
                write_text(folder / _JOB, text + "\n")
                sync_folder(folder.absolute().parent)
            held.pop_all()
        return cls(folder, complete, lock)

    @classmethod
    def open(cls, folder: str | Path) -> RunState:
        """Goes on with the run in a folder.

        Raises:
            InputError: there is no run, it cannot be read, something else has the name of a run's file, or another
                process works there.
        """
        folder = Path(folder)
        if not os.path.lexists(folder):
            raise InputError(f"run: {folder} does not exist")
        files = _files(folder)
        if folder / _JOB not in files:
            raise InputError(f"run: {folder} has no {_JOB}: no run was begun there")
        with ExitStack() as held:
            lock = held.enter_context(closing(FileLock(folder / _LOCK, "run", folder)))
            job = _read_job(folder / _JOB)
            remove_strays(folder, _KNOWN.fullmatch)
            held.pop_all()
        return cls(folder, job, lock)

    def close(self) -> None:
        """Releases the folder, so that others can open it."""
        self._lock.close()

    def __enter__(self) -> RunState:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def changes(self, job: Mapping[str, Any]) -> Changes:
        """Returns what differs between this run and ``job``, in sections as for :meth:`create`, and in the software."""
        return changes_between(self.job, _as_json({**job, "software": software()}))

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes tensors, on any device, and drops the files that were made from what this name held before.

        Args:
            name: ``inputs``, ``motion``, ``condition``, or ``segment-0001`` and so on (:func:`segment_name`).

        Raises:
            ValueError: ``name`` is none of these.
        """
        place = self._place(name)
        later = [(rank, path) for rank, path in self._saved() if rank > _rank(name)]
        # The last one first, so that no gap is left whenever this ends.
        with writing(f"run: {self.folder}"):
            for _, path in sorted(later, reverse=True):
                path.unlink()
            if later:
                sync_folder(self.folder)
        write_tensors(place, tensors, self.digest)

    def restore(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes, as :meth:`save`, tensors that are those saved before, made again, so that nothing is dropped."""
        write_tensors(self._place(name), tensors, self.digest)

    def save_segment(self, number: int, blocks: Tensor) -> None:
        """Saves the blocks of segment ``number``, from 1, as :meth:`finished_segments` reads them."""
        self.save(segment_name(number), {"blocks": blocks})

    def load(self, name: str, wanted: Shapes | None = None) -> dict[str, Tensor] | None:
        """Returns the tensors that :meth:`save` wrote under ``name``, on the CPU; None if they are missing or damaged.

        A damaged file is renamed to ``NAME.safetensors.damaged`` and told of in :attr:`damaged`. One that has other
        tensors than float32 ones of the shapes ``wanted`` counts as damaged; by default they may be any.

        Raises:
            ValueError: ``name`` is none that :meth:`save` takes.
        """
        place = self._place(name)
        if not os.path.lexists(place):
            return None
        try:
            tensors = read_tensors(place, self.digest)
            if wanted is not None:
                check_tensors(tensors, wanted)
        except DamagedError as error:
            rename(place, place.with_name(f"{place.name}.damaged"))
            # The names of tensors in it are whoever's who wrote the file.
            self.damaged.append(printable(f"{place.name} is damaged ({error}){_consequence(name)}"))
            return None
        return tensors

    def finished_segments(self, shapes: Iterable[tuple[int, ...]]) -> list[Tensor]:
        """Returns the blocks of the segments before the first one missing or damaged.

        ``shapes`` are those of the blocks of each segment that the run has, in order. This is to be asked for after
        ``condition`` was loaded: if that has to be made again, so have the segments, and saving it drops them. Files
        after a damaged one stay until it is saved again.
        """
        segments: list[Tensor] = []
        for number, shape in enumerate(shapes, start=1):
            tensors = self.load(segment_name(number), {"blocks": shape})
            if tensors is None:
                break
            segments.append(tensors["blocks"])
        return segments

    def remove(self) -> None:
        """Deletes the run's files and closes it; the folder is deleted too unless it holds anything else."""
        _discard(self.folder)
        self.close()
        with suppress(OSError):  # it holds something else
            self.folder.rmdir()

    @staticmethod
    def holds(folder: str | Path) -> bool:
        """Returns whether a folder, which may be missing, has a run, in whatever state.

        Raises:
            InputError: no run can be begun there, since something else has the name of a run's file.
        """
        folder = Path(folder)
        files = _files(folder)
        begins = b""
        if folder / _JOB in files:
            with writing(f"run: {folder}"), (folder / _JOB).open("rb") as file:
                begins = file.read(len(_JOB_BEGINS)) or _JOB_BEGINS  # empty, as a disk that failed may leave it
        if files and begins != _JOB_BEGINS:
            raise InputError(
                f"run: {folder} holds {files[0].name}, which is of no run: move it away or name another folder"
            )
        return bool(files)

    def _place(self, name: str) -> Path:
        _rank(name)
        return self.folder / f"{name}.safetensors"

    def _saved(self) -> Iterator[tuple[int, Path]]:
        for path in self.folder.glob("*.safetensors"):
            if _TENSORS.fullmatch(path.stem):
                yield _rank(path.stem), path


def segment_name(number: int) -> str:
    """Returns the name of a segment's file for :meth:`RunState.save`; segments are counted from 1."""
    return f"segment-{number:04d}"


def software() -> dict[str, str | None]:
    """Returns the versions of the software that computes and encodes; None for what is not installed."""
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "swifti2v_kernels": swifti2v_kernels.__version__,
    }
    for package in ("torch", "triton", "av"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def device_name(device: torch.device) -> str:
    """Returns the name of a device: the card's name, or the kind of processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


def _files(folder: Path) -> list[Path]:
    """Returns the files in a folder that have names of a run's files, in order; none if there is no folder.

    Raises:
        InputError: the folder is a link or none, or what has such a name is no file of a run.
    """
    if folder.is_symlink():
        raise InputError(f"run: {folder} is a link: name the folder that it leads to")
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise InputError(f"run: {folder} is not a folder")
    with writing(f"run: {folder}"):
        files = sorted(path for path in folder.iterdir() if _KNOWN.fullmatch(path.name))
    for path in files:
        if path.is_symlink() or not path.is_file():
            raise InputError(f"run: {path} is a link, a folder or a device, where a run has a file: move it away")
    return files


def _discard(folder: Path) -> None:
    with writing(f"run: {folder}"):
        remove_strays(folder, _KNOWN.fullmatch)
        # Last of all goes the job: until then it says what the rest is.
        for path in sorted(_files(folder), key=lambda path: path.name == _JOB):
            path.unlink()


def _rank(name: str) -> int:
    """Returns the place of a tensor file in the order in which these are made."""
    match = _TENSORS.fullmatch(name)
    if match is None:
        raise ValueError(f"name: expected inputs, motion, condition or segment-0001 and so on, got {name!r}")
    return _BEFORE.index(name) - len(_BEFORE) if match[1] else int(match[2])


def _consequence(name: str) -> str:
    return f"; starting from segment {_rank(name)}" if name.startswith("segment-") else "; it has to be made again"


def _as_json(job: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a job as it comes back from a file, where tuples are lists."""
    return json.loads(json.dumps(job, allow_nan=False))


def _job_digest(job: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()


def _read_job(path: Path) -> dict[str, Any]:
    try:
        with os.fdopen(open_plain(path), encoding="utf-8") as file:
            stored = json.load(file)
        schema, digest, job = stored["schema"], stored["sha256"], stored["job"]
        found = _job_digest(job)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"run: {path} is not readable as the job of a run: {error}") from error
    if schema != SCHEMA:
        raise InputError(
            f"run: {path} has schema version {schema!r}, this program reads {SCHEMA}: go on with the program that began"
            " the run, or begin anew"
        )
    if digest != found:
        raise InputError(f"run: {path} is damaged or was edited (sha256 differs)")
    if not isinstance(job, dict) or not all(isinstance(section, dict) for section in job.values()):
        raise InputError(f"run: {path} is not readable as the job of a run: expected sections, each an object")
    return job
