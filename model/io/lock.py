"""A lock between processes that ends with the process that holds it, however that ends."""

from __future__ import annotations

import errno
import fcntl
import os
import re
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO

from model.errors import InputError
from model.io.durable import open_plain, writing

_HELD = re.compile(rb"(locked by process ([0-9]+)\n)?")


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
