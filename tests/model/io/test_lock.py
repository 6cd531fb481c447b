"""A lock is held by one process at most, ends with it, and touches nothing that another has made."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from contextlib import closing

import pytest

from model.errors import InputError
from model.io.durable import FileLock


def test_a_lock_ends_with_its_process_and_the_file_that_it_left_is_taken_over(tmp_path):
    path = tmp_path / "lock"
    code = """
import fcntl, os, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print(f"locked by process {os.getpid()}", file=file, flush=True)
print("ready", flush=True)
sys.stdin.read()
"""
    holder = subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    with pytest.raises(InputError, match=rf"^run: .*lock is in use by another process \({holder.pid}\)$"):
        FileLock(path, "run", path)
    holder.kill()
    holder.communicate()
    with (
        closing(FileLock(path, "run", path)),
        pytest.raises(InputError, match=rf"^run: .*lock is in use by another process \({os.getpid()}\)"),
    ):
        FileLock(path, "run", path)
    assert not path.exists()


def test_a_lock_that_its_holder_removes_while_another_waits_to_open_it_is_not_taken(tmp_path, monkeypatch):
    """A lock on a file without a name would keep nobody out, so another file is made and locked."""
    path, first, flock = tmp_path / "lock", None, fcntl.flock

    def removed_before(file, operation):
        if first is not None:
            first.close()
        flock(file, operation)

    first = FileLock(path, "run", path)
    monkeypatch.setattr(fcntl, "flock", removed_before)
    second = FileLock(path, "run", path)
    monkeypatch.undo()
    with pytest.raises(InputError, match="in use"):
        FileLock(path, "run", path)
    path.unlink()
    path.write_text("of somebody else")
    second.close()
    assert path.read_text() == "of somebody else"


def test_what_others_have_made_is_neither_changed_nor_removed(tmp_path):
    """A link, a file of another program, a folder and a pipe stay as they are."""
    path, mine = tmp_path / "lock", tmp_path / "mine"
    mine.write_text("")
    makes = [
        lambda: path.symlink_to(mine),
        lambda: path.symlink_to(tmp_path / "nowhere"),
        lambda: path.write_text("4711\n"),
        path.mkdir,
        lambda: os.mkfifo(path),
    ]
    for make in makes:
        make()
        before = path.lstat()
        with pytest.raises(InputError, match="lock is not the lock that this program would make"):
            FileLock(path, "run", path)
        after = path.lstat()
        assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)
        assert mine.read_text() == ""
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()
    assert [name.name for name in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(InputError, match="cannot be written"):
        FileLock(tmp_path / "no folder" / "lock", "run", tmp_path)


def test_where_there_are_no_locks_nobody_is_kept_out(tmp_path, monkeypatch):
    def unsupported(file, operation):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with closing(FileLock(tmp_path / "lock", "run", tmp_path)), closing(FileLock(tmp_path / "lock", "run", tmp_path)):
        pass
    assert list(tmp_path.iterdir()) == []
