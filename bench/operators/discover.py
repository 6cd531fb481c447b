"""Finds the operators: ``CASES`` of every ``swifti2v_kernels/*/cases.py``.

An operator enters the compile report, the check, the timings and the tuner by being in one.
"""

from __future__ import annotations

import functools
from operator import attrgetter

from bench.harness.registry import chosen
from swifti2v_kernels.common import case
from swifti2v_kernels.common.case import Case


@functools.cache
def all_cases() -> tuple[Case, ...]:
    """Returns the cases of all operators by family, attention first, which takes the compiler longest."""
    return tuple(case.all_cases())


def operator_name(case: Case) -> str:
    """Returns the name of a case's operator."""
    return case.operator.__name__


def cases_of(text: str = "", quick: bool = False) -> list[Case]:
    """Returns the cases whose name contains ``text``; with ``quick`` one of every operator.

    Raises:
        InputError: there are none.
    """
    found = chosen("cases", text, all_cases(), attrgetter("name"))
    # The last of an operator, which is seldom the plainest.
    return list({case.operator: case for case in found}.values()) if quick else found
