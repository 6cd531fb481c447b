"""Finds the operators: every module of ``swifti2v_kernels`` that has ``CASES``.

A new operator thus enters the compile report, the check, the timings, the tuner and the pytest-benchmark suite by being
written.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil

import swifti2v_kernels
from swifti2v_kernels.common.case import Case


@functools.cache
def all_cases() -> tuple[Case, ...]:
    """The cases of all operators, attention first, which takes the compiler longest."""
    found: list[Case] = []
    names = [m.name for m in pkgutil.iter_modules(swifti2v_kernels.__path__) if not m.ispkg]
    # A file of one kernel alone (``*_kernel``), and one that only newer hardware or software takes, has none.
    for name in sorted(names, key=lambda name: (not name.startswith("attention"), name)):
        if name.endswith(("_kernel", "_hopper", "_portable", "_launch", "_arguments")):
            continue
        found += getattr(importlib.import_module(f"swifti2v_kernels.{name}"), "CASES", ())
    return tuple(found)


def operator_name(case: Case) -> str:
    """How a case's operator is called."""
    return case.operator.__name__


def cases_of(text: str = "") -> list[Case]:
    """The cases whose name contains ``text``."""
    return [case for case in all_cases() if text in case.name]
