"""The check that ComfyUI has what the nodes need, and the reports after its runs."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any

from ..recipe import HostChanged


def need(owner: Any, owner_name: str, *attributes: str) -> None:
    """Checks that an object of ComfyUI has the attributes that a node reads.

    Raises:
        HostChanged: one is not; the message names it.
    """
    for attribute in attributes:
        if not hasattr(owner, attribute):
            raise HostChanged(
                f"this version of ComfyUI is not what the node was written for: {owner_name} has no attribute"
                f" {attribute!r}; nothing was changed"
            )


def told_after(
    function: Callable[..., Any], begin: Callable[[], Any], end: Callable[[Any, bool], None]
) -> Callable[..., Any]:
    """Returns ``function`` with a report after each of its runs, also after one that an exception ends.

    A run within a run, or beside it in another thread, belongs to the one that began first.

    Args:
        function: what is run.
        begin: called before a run.
        end: called after it with what ``begin`` returned, and whether the run came to its end.
    """
    running = Lock()

    def run(*args: Any, **kwargs: Any) -> Any:
        if not running.acquire(blocking=False):
            return function(*args, **kwargs)
        before, finished = begin(), False
        try:
            out = function(*args, **kwargs)
            finished = True
            return out
        finally:
            running.release()
            end(before, finished)

    return run
