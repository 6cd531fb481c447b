"""The outcome of an attempt, which its row states whatever happened."""

from __future__ import annotations

from triton.errors import TritonError

from model.machine.measure import full_memory

#: The statuses of a row. ``wrong``: its check failed, so it was not timed. ``not reached``: time ran out before.
STATUSES = ("ok", "out of memory", "failed", "wrong", "not available", "skipped", "not reached")
#: The sources of a row's numbers. ``counted``: on tensors without memory; ``compiled``: read from binaries;
#: ``reported``: by others.
BASES = ("measured", "extrapolated", "predicted", "counted", "compiled", "reported")


class Unavailable(Exception):
    """An implementation that cannot take this call, or is not installed."""


#: Errors that an attempt may end with so that the others go on; Triton's compiler and launcher have their own.
FAILURES = (Unavailable, RuntimeError, MemoryError, TritonError)


def failure(error: BaseException) -> dict[str, str]:
    """Returns status and reason of a row that could not be measured."""
    if isinstance(error, Unavailable):
        return {"status": "not available", "reason": str(error)}
    status = "failed" if full_memory(error) is None else "out of memory"
    return {"status": status, "reason": (str(error) or type(error).__name__).splitlines()[0][:300]}
