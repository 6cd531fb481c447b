"""The folder that keeps what a run has made, so that it can go on after any end, SIGKILL and power loss included.

    job.json                  what is made, of which inputs, by which software on which device; written first
    inputs.safetensors        the picture at both sizes, text and image embeddings
    motion.safetensors        Stage I's latents
    condition.safetensors     the reference that Stage II starts from
    segment-0001.safetensors  the blocks of a segment, and so on
    piece-0000.mp4            the pieces of the film (:class:`model.io.media.VideoWriter`), if they are kept here
    lock                      held by the process that works here

Every file is written under another name, flushed to disk and renamed, and carries the sha256 of what it holds. Each of
the tensor files is made from those before it in this order, so saving one drops those after it: the files that are
there always belong together.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch
from torch import Tensor

import swifti2v_kernels
from model.errors import InputError
from model.io.durable import TEMPORARY, rename, replacing, sync_folder
from model.resume.changes import Changes, changes_between
from model.resume.files import DamagedError, read_tensors, write_tensors

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

#: Version of the layout of the folder and its files.
SCHEMA = 1
_BEFORE = ("inputs", "motion", "condition")
_JOB, _LOCK, _FINISHED = "job.json", "lock", "finished"
_TENSORS = re.compile(rf"({'|'.join(_BEFORE)})|segment-(\d{{4,}})")
_KNOWN = re.compile(rf"(({_TENSORS.pattern})\.safetensors|piece-\d{{4,}}\.mp4)(\.damaged)?")


class RunState:
    """The state of a run in a folder: :meth:`create` begins one, :meth:`open` goes on with it.

    It is a context manager, or is closed by :meth:`close`: until then no other process can open the folder (where the
    system has such locks; they end with the process).

    Attributes:
        folder: the folder that holds everything.
        job: the job that was given to :meth:`create`, with the section ``software``.
        damaged: a sentence for each file that was to be read and is damaged. Such files are renamed to
            ``NAME.damaged``.
    """

    def __init__(self, folder: Path, job: dict[str, Any], lock: TextIO):
        """Keeps the open lock file; use :meth:`create` or :meth:`open` instead of this."""
        self.folder, self.job = folder, job
        self.damaged: list[str] = []
        self._file = lock

    @classmethod
    def create(cls, folder: str | Path, job: Mapping[str, Any]) -> RunState:
        """Begins a run in a folder.

        Args:
            folder: is made if it is not there; it may hold other files, but no run.
            job: everything that defines the run, as JSON has it, in sections (dictionaries);
                ``model/resume/changes.py`` says which of them may differ when the run goes on. ``software`` is added.

        Raises:
            InputError: there is a run already, another process works there, or the folder cannot be written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = _locked(folder)
        except OSError as error:
            raise InputError(f"run: {folder} cannot be written: {error}") from error
        try:
            if (folder / _FINISHED).exists():
                # A run was being removed here, and its removal was broken off.
                _discard(folder)
            found = sorted(path.name for path in folder.iterdir() if _is_known(path.name))
            if found:
                raise InputError(
                    f"run: {folder} already holds {', '.join(found[:3])}: resume that run or name another folder"
                )
            _remove_temporaries(folder)
            complete = _as_json({**job, "software": software()})
            with replacing(folder / _JOB) as temporary:
                text = json.dumps({"schema": SCHEMA, "sha256": _job_digest(complete), "job": complete}, indent=2)
                temporary.write_text(text + "\n", encoding="utf-8")
            sync_folder(folder.absolute().parent)
        except BaseException:
            lock.close()
            raise
        return cls(folder, complete, lock)

    @classmethod
    def open(cls, folder: str | Path) -> RunState:
        """Goes on with the run in a folder.

        Raises:
            InputError: there is no run, it cannot be read, or another process works on it.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"run: {folder} {'is not a folder' if folder.exists() else 'does not exist'}")
        if (folder / _FINISHED).exists():
            raise InputError(f"run: {folder} is finished, and its video complete; what is left there can be deleted")
        if not (folder / _JOB).is_file():
            raise InputError(f"run: {folder} has no {_JOB}: no run was begun there")
        try:
            lock = _locked(folder)
        except OSError as error:
            raise InputError(f"run: {folder} cannot be written: {error}") from error
        try:
            job = _read_job(folder / _JOB)
            _remove_temporaries(folder)
        except BaseException:
            lock.close()
            raise
        return cls(folder, job, lock)

    def close(self) -> None:
        """Releases the folder, so that others can open it."""
        self._file.close()

    def __enter__(self) -> RunState:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
        for _, path in sorted(later, reverse=True):
            path.unlink()
        if later:
            sync_folder(self.folder)
        write_tensors(place, tensors, _job_digest(self.job))

    def restore(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes tensors that are the same as those saved before, made again, so that nothing is dropped.

        Raises:
            ValueError: ``name`` is none that :meth:`save` takes.
        """
        write_tensors(self._place(name), tensors, _job_digest(self.job))

    def save_segment(self, number: int, blocks: Tensor) -> None:
        """Saves the blocks of segment ``number``, from 1, as :meth:`finished_segments` reads them."""
        self.save(segment_name(number), {"blocks": blocks})

    def load(self, name: str) -> dict[str, Tensor] | None:
        """Returns the tensors that :meth:`save` wrote under ``name``, on the CPU; None if they are missing or damaged.

        A damaged file is renamed to ``NAME.safetensors.damaged`` and told of in :attr:`damaged`.

        Raises:
            ValueError: ``name`` is none that :meth:`save` takes.
        """
        place = self._place(name)
        if not place.exists():
            return None
        try:
            return read_tensors(place, _job_digest(self.job))
        except DamagedError as error:
            rename(place, place.with_name(f"{place.name}.damaged"))
            self.damaged.append(f"{place.name} is damaged ({error}){_consequence(name)}")
            return None

    def finished_segments(self) -> tuple[list[Tensor], list[str]]:
        """Returns the blocks of the segments before the first one missing or damaged, and what is wrong with that one.

        This is to be asked for after ``condition`` was loaded: if that has to be made again, so have the segments, and
        saving it drops them. Files after a damaged one stay until it is saved again.
        """
        told = len(self.damaged)
        segments: list[Tensor] = []
        while (tensors := self.load(segment_name(len(segments) + 1))) is not None:
            segments.append(tensors["blocks"])
        return segments, self.damaged[told:]

    def remove(self) -> None:
        """Deletes the run's files and closes it; the folder is deleted too unless it holds anything else.

        First of all the run is marked as finished, so that one whose removal is broken off is not taken for another.
        """
        with replacing(self.folder / _FINISHED) as temporary:
            temporary.write_text("what is left here can be deleted\n", encoding="utf-8")
        _discard(self.folder)
        self.close()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    @staticmethod
    def holds(folder: str | Path) -> bool:
        """Returns whether a folder has files of a run that is not finished."""
        folder = Path(folder)
        if not folder.is_dir() or (folder / _FINISHED).exists():
            return False
        return any(_is_known(path.name) for path in folder.iterdir())

    @classmethod
    def discard(cls, folder: str | Path) -> None:
        """Deletes a run's files, whatever state they are in, so that another run can begin in the folder.

        Raises:
            InputError: another process works on the run, or it cannot be deleted.
        """
        folder = Path(folder)
        try:
            with _locked(folder):
                _discard(folder)
        except OSError as error:
            raise InputError(f"run: {folder} cannot be written: {error}") from error

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


def _discard(folder: Path) -> None:
    _remove_temporaries(folder)
    for path in sorted(folder.iterdir()):
        if _is_known(path.name) and path.name != _FINISHED:
            path.unlink()
    # The mark that the run is finished goes last: until then it says what the rest is.
    for name in (_LOCK, _FINISHED):
        (folder / name).unlink(missing_ok=True)


def _rank(name: str) -> int:
    """Returns the place of a tensor file in the order in which these are made."""
    match = _TENSORS.fullmatch(name)
    if match is None or match[2] == "0000":
        raise ValueError(f"name: expected inputs, motion, condition or segment-0001 and so on, got {name!r}")
    return _BEFORE.index(name) - len(_BEFORE) if match[1] else int(match[2])


def _is_known(name: str) -> bool:
    """Returns whether a file of this name is part of a run."""
    return name in (_JOB, _FINISHED) or _KNOWN.fullmatch(name) is not None


def _consequence(name: str) -> str:
    return f"; starting from segment {_rank(name)}" if name.startswith("segment-") else "; it has to be made again"


def _as_json(job: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a job as it comes back from a file, where tuples are lists."""
    return json.loads(json.dumps(job, allow_nan=False))


def _job_digest(job: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()


def _read_job(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"run: {path} is not readable: {error}") from error
    if not isinstance(stored, dict) or not {"schema", "sha256", "job"} <= stored.keys():
        raise InputError(f"run: {path} is not readable: expected an object with schema, sha256 and job")
    if stored["schema"] != SCHEMA:
        raise InputError(f"run: {path} has schema version {stored['schema']!r}, this program reads {SCHEMA}")
    if not isinstance(stored["job"], dict) or stored["sha256"] != _job_digest(stored["job"]):
        raise InputError(f"run: {path} is damaged or was edited (sha256 differs)")
    return stored["job"]


def _remove_temporaries(folder: Path) -> None:
    """Removes temporary files of a run, which nobody is writing, since its lock is held here."""
    for path in list(folder.iterdir()):
        match = TEMPORARY.fullmatch(path.name)
        if match and _is_known(f"{match['stem']}{match['suffix']}"):
            path.unlink()


def _locked(folder: Path) -> TextIO:
    """Returns the lock file, locked until it is closed, unless the file system has no locks."""
    file = (folder / _LOCK).open("a+")
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise InputError(f"run: {folder} is in use by another process ({holder or 'of unknown number'})") from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            file.close()
            raise
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file
