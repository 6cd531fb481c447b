"""Errors of bad arguments, for every operator: one line that names the argument, what was given and what is allowed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from swifti2v_kernels.common.case import Case
from tests.kernels.test_global_state import LEAST

NAME = r"[\w.]+(\[\d+\])?(\.\w+)?(, \w+)*"
MESSAGE = re.compile(rf"{NAME}: (expected .+, got .+|.*\b(do not|but|has|have|differ|leave)\b.*)")


def error_of(case: Case, call: Any) -> str | None:
    """Returns what is said of a call's arguments, or None where the call is taken."""
    args, kwargs = call
    try:
        case.operator(*args, **kwargs | {"backend": "torch"})
    except (TypeError, ValueError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("case", LEAST, ids=lambda case: case.name)
def test_an_argument_that_does_not_fit_is_named_with_what_is_allowed(case: Case) -> None:
    """No tensor at all is always refused; another device or two axes more where anything else must fit the tensor."""
    leaves, spec = tree_flatten(case.inputs(torch.device("cpu")))
    for i, x in enumerate(leaves):
        if isinstance(x, Tensor):
            for bad in ("text", x.to("meta"), x[None, None]):
                message = error_of(case, tree_unflatten([*leaves[:i], bad, *leaves[i + 1 :]], spec))
                assert message is not None or isinstance(bad, Tensor)
                assert message is None or MESSAGE.fullmatch(message)
