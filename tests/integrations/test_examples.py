"""Every example of examples/ runs on this machine, does what it says, and is short."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
#: What each prints when it has worked.
PRINTS = {
    "csg_diffusers_wan": r"\(4, 5, 6\) given \(0, 3\): latents \(1, 16, 3, 8, 12\)[\s\S]* at most 5 of 11",
    "diffusers_wan_i2v": r"4 x WanAttnProcessor .* segment_attention[\s\S]*video \(1, 9, 3, 32, 48\), finite: True",
    "dit_layer": r"tokens \(2, 72, 256\) -> \(2, 72, 256\), finite: True",
    "joint_attention": r"video \(2, 300, 4, 128\), text \(2, 32, 4, 128\), relative difference \d\.\de[+-]0[03-9]",
    "vae_decode_4gb": r"peak 3\.\d+ GB, predicted [\s\S]*in 2 x 4 tiles[\s\S]* all at once: [01] of 255",
}


def examples() -> Iterator[Any]:
    """Yields the path of every example; that of the VAE at real width is slow."""
    for path in sorted(EXAMPLES.glob("*.py")):
        yield pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem == "vae_decode_4gb"))


@pytest.mark.parametrize("path", [*examples()])
def test_example(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(path.read_text().splitlines()) <= 40
    runpy.run_path(str(path), run_name="__main__")
    assert re.search(PRINTS[path.stem], capsys.readouterr().out)
