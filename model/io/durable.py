"""Files that are whole or not there, whatever happens while they are written: a crash, SIGKILL, a loss of power."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: The form of the names that :func:`temporary_name` gives.
TEMPORARY = re.compile(r"\.(?P<stem>.+)\.(?P<pid>\d+)\.tmp(?P<suffix>(\.[^.]*)?)", re.DOTALL)


def temporary_name(path: Path) -> Path:
    """Returns a hidden name next to ``path``, with its suffix, for this process alone: ``.clip.4711.tmp.mp4``."""
    return path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name to write to; the file that is there at the end takes the place of ``path``, on disk.

    If the work inside fails, ``path`` is as it was and the temporary file is gone. A file that was open when its
    process was killed stays under its temporary name (:func:`remove_strays`).
    """
    temporary = temporary_name(path)
    try:
        yield temporary
        # "r+": Windows flushes only what may be written.
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file that is there as a whole or not at all (:func:`replacing`)."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def rename(source: Path, target: Path) -> None:
    """Renames a file inside its folder, replacing any file of that name, and waits until the name is on disk."""
    os.replace(source, target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Waits until the names of the files in ``folder`` are on disk, where the system can tell (Windows cannot)."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_strays(folder: Path, *names: str) -> None:
    """Removes temporary files and folders of ``names`` from ``folder`` if the processes that made them have ended."""
    wanted = {(Path(name).stem, Path(name).suffix) for name in names}
    for path in list(folder.iterdir()):
        match = TEMPORARY.fullmatch(path.name)
        if match and (match["stem"], match["suffix"]) in wanted and not _is_at_work(int(match["pid"])):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _is_at_work(pid: int) -> bool:
    """Returns whether another process of this number runs."""
    if pid == os.getpid():
        return False
    if os.name != "posix":
        return True  # os.kill would end it
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
