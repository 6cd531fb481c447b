"""Products of parameters, most of which are left to CI."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def half(*axes: Iterable[Any]) -> list[Any]:
    """Returns the product of the axes for ``parametrize``, with every second combination marked slow.

    What remains has every value of every axis; of three axes or more it has every pair of values of two axes.
    """
    chosen = []
    for indexed in itertools.product(*(enumerate(axis) for axis in axes)):
        marks = [pytest.mark.slow] if sum(index for index, _ in indexed) % 2 else []
        chosen.append(pytest.param(*(value for _, value in indexed), marks=marks))
    return chosen
