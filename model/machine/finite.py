"""Results are finite, or the work ends where they are made: a picture has no NaN, and a state would keep it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.errors import InputError


class NotFiniteError(InputError):
    """An error of results that are NaN or infinite; the message says what gave them and where."""


class Finite:
    """Tensors that have to be finite: :meth:`note` reads each where it is made, :meth:`check` waits for them.

    Args:
        name: what makes them, in words that an error begins with.
    """

    def __init__(self, name: str):
        self._name = name
        self._noted: list[tuple[str, Tensor]] = []

    def note(self, tensor: Tensor, where: str = "") -> None:
        """Reads a floating tensor once and keeps two numbers of it; nothing waits for the device."""
        if not tensor.is_meta:
            self._noted.append((where, torch.stack(tensor.detach().aminmax()).float()))

    def check(self) -> None:
        """Waits for what was noted, and forgets it.

        Raises:
            NotFiniteError: a tensor holds NaN or infinity; the message says where the first one is.
        """
        noted, self._noted = self._noted, []
        if not noted:
            return
        for (where, _), numbers in zip(noted, torch.stack([numbers for _, numbers in noted]).tolist(), strict=True):
            if not all(map(math.isfinite, numbers)):
                found = "NaN" if any(map(math.isnan, numbers)) else "infinity"
                raise NotFiniteError(f"{self._name}: {found}{' ' * bool(where)}{where}")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises :class:`NotFiniteError`, whose message begins with ``name``, if a tensor holds NaN or infinity."""
    finite = Finite(name)
    finite.note(tensor)
    finite.check()
