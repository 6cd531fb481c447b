"""Finds the operators: ``CASES`` of every ``swifti2v_kernels/*/cases.py``.

An operator enters the compile report, the check, the timings, the tuner and the pytest-benchmark suite by being in one.
"""

from __future__ import annotations

import functools

from swifti2v_kernels.common import case
from swifti2v_kernels.common.case import Case


@functools.cache
def all_cases() -> tuple[Case, ...]:
    """Returns the cases of all operators by family, attention first, which takes the compiler longest."""
    return tuple(case.all_cases())


def operator_name(case: Case) -> str:
    """Returns the name of a case's operator."""
    return case.operator.__name__


def cases_of(text: str = "") -> list[Case]:
    """Returns the cases whose name contains ``text``."""
    return [case for case in all_cases() if text in case.name]
