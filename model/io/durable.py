"""Files that are whole or not there, whatever happens while they are written: a crash, SIGKILL, a loss of power.

And a lock between processes that ends with the process that holds it, however that ends.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from model.errors import InputError

#: The form of the names that :func:`temporary_name` gives.
TEMPORARY = re.compile(r"\.(?P<stem>.+)\.[0-9]+\.tmp(?P<suffix>(\.[^.]*)?)", re.DOTALL)
_HELD = re.compile(rb"(locked by process ([0-9]+)\n)?")


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


class FileLock:
    """A lock on a small file of its own, which is there until :meth:`close` and says which process holds it.

    What others have made is never written to: not through a link, and no file of another text. A file that a killed
    process left is taken over. Where there are no file locks (some network file systems) nobody is kept out.

    Args:
        path: the file; its folder is there.
        argument: the argument that errors name, such as ``"run"``.
        guarded: what the lock is for, which another process uses if it holds it.

    Raises:
        InputError: another process holds the lock, something else has the name, or it cannot be written.
    """

    def __init__(self, path: Path, argument: str, guarded: Path):
        self._path = path
        self._file: BinaryIO | None = None
        # Its last holder may remove the file between its opening and its locking here.
        while self._file is None:
            with writing(f"{argument}: {path}"):
                self._file = self._taken(argument, guarded)

    def close(self) -> None:
        """Releases the lock and removes its file."""
        if self._file is not None:
            # If somebody has removed it, the name may be another process's by now. If it cannot be removed, it stays.
            with suppress(OSError):
                if os.fstat(self._file.fileno()).st_nlink:
                    self._path.unlink()
            self._file.close()
            self._file = None

    def _taken(self, argument: str, guarded: Path) -> BinaryIO | None:
        """Returns the locked file; None if its holder has removed it meanwhile."""
        other = f"{argument}: {self._path} is not the lock that this program would make there: move it away"
        with ExitStack() as opened:
            try:
                file = os.fdopen(open_plain(self._path, os.O_RDWR | os.O_CREAT), "r+b", buffering=0)
            except InputError as error:  # a link, a folder or a device
                raise InputError(other) from error
            opened.enter_context(file)
            held = _HELD.fullmatch(file.read(64))
            if held is None:
                raise InputError(other)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = held[2].decode() if held[2] else "of unknown number"
                raise InputError(f"{argument}: {guarded} is in use by another process ({holder})") from error
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
            if os.fstat(file.fileno()).st_nlink == 0:
                return None
            file.seek(0)
            file.truncate()
            file.write(f"locked by process {os.getpid()}\n".encode())
            opened.pop_all()
            return file
