"""The page on adopting one kernel: every code block marked "after" gives what the one marked "before" gave."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import swifti2v_kernels
from tests.support.tolerances import PARITY, relative_error

PAGE = (Path(__file__).parent.parent.parent / "docs" / "adopt.md").read_text()
BLOCKS = re.findall(r"```python (\w+)\n(.*?)```", PAGE, re.S)
PAIRS = [(before[1], after[1]) for before, after in zip(BLOCKS[1::2], BLOCKS[2::2], strict=True)]
TITLES = re.findall(r"^## (.*)$", PAGE, re.M)


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def test_every_section_has_a_pair() -> None:
    assert [kind for kind, _ in BLOCKS] == ["setup", *["before", "after"] * len(TITLES)]
    assert len(set(TITLES)) == len(TITLES)


@pytest.mark.parametrize(("before", "after"), PAIRS, ids=TITLES)
def test_after_is_before(before: str, after: str) -> None:
    names: dict[str, Any] = {}
    exec(BLOCKS[0][1], names)
    with torch.no_grad():
        exec(before, names)
        expected = tensors(names.pop("out"))
        exec(after, names)
    used = re.findall(r"from swifti2v_kernels import (.*)", after)[0].split(", ")
    assert set(used) <= set(swifti2v_kernels.__all__)
    for a, e in zip(tensors(names["out"]), expected, strict=True):
        assert relative_error(a, e) < PARITY
