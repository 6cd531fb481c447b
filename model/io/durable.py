"""Files that are whole or not there, whatever happens while they are written: a crash, SIGKILL, a loss of power."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from model.errors import InputError

#: The form of the names that :func:`temporary_name` gives.
TEMPORARY = re.compile(r"\.(?P<stem>.+)\.[0-9]+\.tmp(?P<suffix>(\.[^.]*)?)", re.DOTALL)


def temporary_name(path: Path) -> Path:
    """Returns a hidden name next to ``path``, with its suffix, for this process alone: ``.clip.4711.tmp.mp4``."""
    return path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")


def open_plain(path: Path, flags: int = os.O_RDONLY) -> int:
    """Returns a descriptor of a regular file, which is opened neither through a link nor by waiting for a pipe.

    Raises:
        InputError: something else has this name; it is not touched.
        OSError: the file cannot be opened.
    """
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise InputError(f"{path} is a link, a folder or a device, expected a file")
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Turns a folder that is gone, and a place that must not be written to, into one line that begins with ``what``.

    Raises:
        InputError: the body failed for such a reason. A disk that is full is an ``OSError`` as before.
    """
    try:
        yield
    except (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise InputError(f"{what} cannot be written: {error}") from error


def check_place(path: Path, what: str) -> None:
    """Checks that a file can be written to ``path``, whose folder need not exist yet.

    Raises:
        InputError: it cannot; the message begins with ``what``.
    """
    try:
        os.lstat(temporary_name(path))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # too long a name; a zero byte in it
        raise InputError(f"{what}: cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    place = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise InputError(f"{what}: cannot write {path}: {place} is not a directory that can be written to")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name to write to; the file that is there at the end takes the place of ``path``, on disk.

    If the work inside fails, ``path`` is as it was and the temporary file is gone. A file that was open when its
    process was killed stays under its temporary name (:func:`remove_strays`).
    """
    temporary = temporary_name(path)
    # A process of the same number may have left it; a link of this name would be written through.
    if os.path.lexists(temporary):
        temporary.unlink()
    try:
        yield temporary
        with temporary.open("rb") as file:
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
    """Waits until the names of the files in ``folder`` are on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_strays(folder: Path, is_own: Callable[[str], object]) -> None:
    """Removes temporary files of own names, as killed processes leave them, from a folder where no other is at work."""
    for path in list(folder.iterdir()):
        match = TEMPORARY.fullmatch(path.name)
        if match and is_own(match["stem"] + match["suffix"]) and not path.is_symlink() and path.is_file():
            path.unlink(missing_ok=True)
