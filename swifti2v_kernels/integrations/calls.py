"""Counts of calls: which of them ours computed, and which the host, and why.

In compiled code nothing is counted: ``torch.compile`` guards what traced code reads, so a count that grows would have
the code compiled anew at every call. That such calls are there at all is noted when they are traced, and told.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch

from ..common.tracing import constant_when_traced

#: What reports say of calls that were not counted. Whose they are is not known.
COMPILED = "this process also has compiled calls, perhaps of another model, which are not counted"

_any_traced = False


def counts() -> bool:
    """Returns whether a call is to be counted: not in code that ``torch.compile`` traces, which is noted."""
    if not torch.compiler.is_compiling():
        return True
    _note()
    return False


def any_traced() -> bool:
    """Returns whether ``torch.compile`` has traced, in this process, a call that would otherwise be counted."""
    return _any_traced


# Called as the code is traced, and no part of it.
@constant_when_traced
def _note() -> None:
    global _any_traced
    _any_traced = True


@dataclass
class AttentionCalls:
    """Counts of a model's attention calls; printed, one line for each kind of call.

    Attributes:
        implementations: the calls that our operator served, by the implementation that computed them.
        not_served: the other calls, by the reason; they went where they would have gone anyway.
    """

    implementations: Counter[str] = field(default_factory=Counter)
    not_served: Counter[str] = field(default_factory=Counter)

    @property
    def served(self) -> int:
        """The number of calls that our operator served."""
        return self.implementations.total()

    @property
    def kinds(self) -> int:
        """The number of kinds of calls, which is 0 if no call was counted."""
        return len(self.implementations) + len(self.not_served)

    def serve(self, implementation: str) -> None:
        """Counts a call that our operator serves by this implementation."""
        if counts():
            self.implementations[implementation] += 1

    def refuses(self, *reasons: tuple[bool, str]) -> bool:
        """Returns whether one of these reasons holds, whose call goes where it would have gone; counts the first."""
        for holds, reason in reasons:
            if holds:
                self.decline(reason)
                return True
        return False

    def decline(self, reason: str) -> None:
        """Counts a call that goes where it would have gone anyway."""
        if counts():
            self.not_served[reason] += 1

    def since(self, before: AttentionCalls) -> AttentionCalls:
        """Returns the calls that were counted after ``before`` was copied from these."""
        return AttentionCalls(self.implementations - before.implementations, self.not_served - before.not_served)

    def __str__(self) -> str:
        rows = [(str(n), f"served by {name}") for name, n in self.implementations.most_common()]
        rows += [(str(n), f"not served: {reason}") for reason, n in self.not_served.most_common()]
        rows += [("?", COMPILED)] if any_traced() else []
        return "\n".join(["attention calls", *(f"{n:>8}  {text}" for n, text in rows or [("0", "none seen")])])
