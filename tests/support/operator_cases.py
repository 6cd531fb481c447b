"""The named calls of single operators, of which a family's ``cases.py`` has several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from swifti2v_kernels.common.case import Case, all_cases


def cases_of(*operators: Callable[..., Any]) -> list[Case]:
    """Returns the cases of these operators."""
    return [case for case in all_cases() if case.operator in operators]
