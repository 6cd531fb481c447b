"""The folder that keeps what a run has made, so that it can go on after any end, SIGKILL and power loss included.

    job.json                  what is made, of which inputs, by which software on which device; written first
    inputs.safetensors        the picture at both sizes, text and image embeddings
    motion.safetensors        Stage I's latents
    condition.safetensors     the reference that Stage II starts from
    segment-0001.safetensors  the blocks of a segment, and so on
    lock                      there while a process works here (:class:`model.io.durable.FileLock`)

Every file is written under another name, flushed to disk and renamed, and carries the sha256 of what it holds, of its
name and of the run's job: a file of another run, or under another name, is damaged. Each of the tensor files is made
from those before it in this order, so saving one drops those after it: the files that are there always belong together.

A folder is judged before anything is written: whatever has the name of a run's file and is none stays as it is, and
the folder is refused. Nothing is read, written or deleted through a link.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.errors import InputError, printable, require
from model.io.durable import FileLock, open_plain, remove_strays, rename, replacing, sync_folder, writing
from model.resume.job import (
    BEGINS,
    Changes,
    add_tensors,
    changes_between,
    complete_job,
    job_digest,
    read_job,
    write_job,
)

_BEFORE = ("inputs", "motion", "condition")
_JOB, _LOCK = "job.json", "lock"
_TENSORS = re.compile(rf"({'|'.join(_BEFORE)})|segment-([0-9]{{4,}})")
_KNOWN = re.compile(rf"{re.escape(_JOB)}|(({_TENSORS.pattern})\.safetensors)(\.damaged)?")


class RunState(AbstractContextManager["RunState"]):
    """The state of a run in a folder: :meth:`create` begins one, :meth:`open` goes on with it.

    Until the context ends, or :meth:`close`, no other process can open the folder (where the system has such locks;
    they end with the process).

    Attributes:
        folder: the folder that holds everything.
        job: the job that was given to :meth:`create`, with the section ``software``.
        digest: the sha256 of the job, which binds every other file to this run.
        damaged: a sentence for each file that was to be read and is damaged. Such files are renamed to
            ``NAME.damaged``.
    """

    def __init__(self, folder: Path, job: dict[str, Any], lock: FileLock):
        """Keeps the lock; use :meth:`create` or :meth:`open` instead of this."""
        self.folder, self.job, self.digest = folder, job, job_digest(job)
        self.damaged: list[str] = []
        self._lock = lock

    @classmethod
    def create(cls, folder: str | Path, job: Mapping[str, Any], restart: bool = False) -> RunState:
        """Begins a run in a folder.

        Args:
            folder: is made if it is not there; it may hold other files.
            job: everything that defines the run, as JSON has it, in sections (dictionaries);
                ``model/resume/job.py`` says which of them may differ when the run goes on. ``software`` is added.
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
            complete = complete_job(job)
            with writing(f"run: {folder}"):
                write_job(folder / _JOB, complete)
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
            job = read_job(folder / _JOB)
            remove_strays(folder, _KNOWN.fullmatch)
            held.pop_all()
        return cls(folder, job, lock)

    def close(self) -> None:
        """Releases the folder, so that others can open it."""
        self._lock.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def changes(self, job: Mapping[str, Any]) -> Changes:
        """Returns what differs between this run and ``job``, in sections as for :meth:`create`, and in the software."""
        return changes_between(self.job, complete_job(job))

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes tensors, on any device, and drops the files that were made from what this name held before.

        Args:
            name: ``inputs``, ``motion``, ``condition``, or ``segment-0001`` and so on (:func:`segment_name`).
        """
        saved = [path for path in self.folder.glob("*.safetensors") if _TENSORS.fullmatch(path.stem)]
        later = [path for path in saved if _rank(path.stem) > _rank(name)]
        # The last one first, so that no gap is left whenever this ends.
        with writing(f"run: {self.folder}"):
            for path in sorted(later, key=lambda path: _rank(path.stem), reverse=True):
                path.unlink()
            if later:
                sync_folder(self.folder)
        self.restore(name, tensors)

    def restore(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes, as :meth:`save`, tensors that are those saved before, made again, so that nothing is dropped."""
        path = self.folder / f"{name}.safetensors"
        # Each tensor is copied, since safetensors does not write tensors that share memory.
        host = {
            key: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for key, tensor in tensors.items()
        }
        metadata = {"sha256": _digest(host, name, self.digest)}
        data = require("safetensors.torch", "generate").save(host, metadata=metadata)
        # safetensors' own save_file writes to another temporary name, which nobody would clean up.
        with writing(f"run: {path}"), replacing(path) as temporary:
            temporary.write_bytes(data)

    def save_segment(self, number: int, blocks: Tensor) -> None:
        """Saves the blocks of segment ``number``, from 1, as :meth:`finished_segments` reads them."""
        self.save(segment_name(number), {"blocks": blocks})

    def load(self, name: str) -> dict[str, Tensor] | None:
        """Returns the tensors that :meth:`save` wrote under ``name``, on the CPU; None if they are missing or damaged.

        A damaged file is renamed to ``NAME.safetensors.damaged`` and told of in :attr:`damaged`.
        """
        place = self.folder / f"{name}.safetensors"
        if not os.path.lexists(place):
            return None
        safe_open = require("safetensors", "generate").safe_open
        try:
            os.close(open_plain(place))  # safe_open would follow a link and wait for a pipe
            with safe_open(place, framework="pt") as file:
                recorded = (file.metadata() or {}).get("sha256")
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        except Exception as error:
            # The error of a damaged header depends on its bytes, and safetensors' own is no OSError or ValueError.
            # Nothing but the reading of this file happens in here.
            problem = f"not readable: {error}"
        else:
            if recorded == _digest(tensors, name, self.digest):
                return tensors
            problem = "it has no sha256" if recorded is None else "sha256 differs"
        rename(place, place.with_name(f"{place.name}.damaged"))
        then = f"starting from segment {_rank(name)}" if _rank(name) > 0 else "it has to be made again"
        # The problem may cite the file, which is whoever's who wrote it.
        self.damaged.append(printable(f"{place.name} is damaged ({problem}); {then}"))
        return None

    def finished_segments(self, most: int) -> list[Tensor]:
        """Returns the blocks of the segments before the first one missing or damaged, of ``most`` that the run has.

        This is to be asked for after ``condition`` was loaded: if that has to be made again, so have the segments, and
        saving it drops them. Files after a damaged one stay until it is saved again.
        """
        segments: list[Tensor] = []
        for number in range(1, most + 1):
            tensors = self.load(segment_name(number))
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
                begins = file.read(len(BEGINS)) or BEGINS  # empty, as a disk that failed may leave it
        if files and begins != BEGINS:
            raise InputError(
                f"run: {folder} holds {files[0].name}, which is of no run: move it away or name another folder"
            )
        return bool(files)


def segment_name(number: int) -> str:
    """Returns the name of a segment's file for :meth:`RunState.save`; segments are counted from 1."""
    return f"segment-{number:04d}"


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
    """Returns the place of a tensor file in the order in which these are made: the number of a segment, or below 1."""
    return _BEFORE.index(name) - len(_BEFORE) if name in _BEFORE else int(name.removeprefix("segment-"))


def _digest(tensors: Mapping[str, Tensor], name: str, run: str) -> str:
    digest = hashlib.sha256(f"{name} of {run}".encode())
    for key, tensor in sorted(tensors.items()):
        add_tensors(digest, key, str(tensor.dtype), tuple(tensor.shape), [tensor])
    return digest.hexdigest()
