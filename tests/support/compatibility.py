"""The table of docs/compatibility.md, made by the tests that are marked ``compatibility``.

    pytest tests/integrations --compatibility
    TRITON_INTERPRET=1 pytest tests/interpreter/integrations --compatibility

A mark names features; the model is the test's parameter ``name``, or the mark's ``model``, which may name parameters.
Results are kept per version of the host in docs/compatibility.json, so running the same under another version adds to
the table.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model.io.durable import write_text

DOCS = Path(__file__).parent.parent.parent / "docs"
STORE, PAGE = DOCS / "compatibility.json", DOCS / "compatibility.md"
Pair = tuple[str, str]

_HEAD = """\
# What was tested with what

Made from test results by `pytest --compatibility`; do not edit. A cell holds the tested versions of diffusers under
which every test of that model and feature passed, on tiny random models, first to last; `yes` stands for tests against
a copy of the host's interface, which has no version. An empty cell was not tested, or not whole. What was shown on the
real ComfyUI and the real Wan code, which the test suite does not install, is on [get started](get-started.md).

`original Wan code` stands for its t2v, i2v and ti2v models. Of VACE no norms are replaced there, of S2V only
cross-attention, of Animate nothing; Wan2.1 i2v still needs `flash_attn`, for its CLIP encoder.

| feature | what its tests prove |
|---|---|
| attention, norms, restore | the host's output to 1e-5 (float32) with each and with both; identical after `restore` |
| no concatenation | on the kernels (interpreted), no `torch.cat` of queries, keys, values or their inputs is left |
| model, sequential, group offload | hooks before or after; weights elsewhere until their module is called |
| LoRA | PEFT adapters added before or after, switched off again |
| torch.compile | one graph without a break |
| VAE encode, VAE decode | the host's latents and frames to 1e-5: whole, in pieces, tiled |
| CSG | segment by segment through the adapter |

"""


def pairs(item: pytest.Item) -> Iterator[Pair]:
    """Yields every (model, feature) that a test speaks for."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    for mark in item.iter_markers("compatibility"):
        model = mark.kwargs.get("model", parameters.get("name"))
        if model is None:
            raise pytest.UsageError(f"{item.nodeid}: compatibility needs a parameter 'name' or model=")
        for feature in mark.args:
            yield model.format(**parameters), feature


def host_version(item: pytest.Item) -> str:
    """Returns the version of the host that a test runs, or ``yes`` for a stand-in."""
    mark = item.get_closest_marker("compatibility")
    host = "diffusers" if mark is None else mark.kwargs.get("host", "diffusers")
    return "yes" if host == "stand-in" else importlib.metadata.version(host)


class Recorder:
    """Collects the outcomes of a session by model, feature and version."""

    def __init__(self) -> None:
        self.outcomes: dict[tuple[str, str, str], set[str]] = {}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        """Notes the outcome of a test."""
        outcome: Any = yield
        report = outcome.get_result()
        if report.when == "call" or not report.passed:
            for model, feature in pairs(item):
                self.outcomes.setdefault((model, feature, host_version(item)), set()).add(report.outcome)

    def pytest_sessionfinish(self) -> None:
        """Puts pairs whose tests have all passed into the file, takes others out, and makes the page."""
        rows = {(r["model"], r["feature"], r["version"]): r for r in load()}
        torch_version = importlib.metadata.version("torch").split("+")[0]
        for key, outcomes in self.outcomes.items():
            rows.pop(key, None)
            if outcomes == {"passed"}:
                rows[key] = dict(zip(("model", "feature", "version", "torch"), (*key, torch_version), strict=True))
        ordered = [rows[key] for key in sorted(rows)]
        write_text(STORE, "[\n" + ",\n".join(json.dumps(row) for row in ordered) + "\n]\n")
        write_text(PAGE, render(ordered))


def load() -> list[dict[str, str]]:
    """Returns the rows kept so far."""
    return json.loads(STORE.read_text())


def render(rows: list[dict[str, str]]) -> str:
    """Returns the text of the page."""
    features = sorted({row["feature"] for row in rows}, key=_FEATURES.index)
    tested = sorted({row["version"] for row in rows} - {"yes"}, key=_version)
    lines = ["| " + " | ".join(["model", *features]) + " |", "|" + "---|" * (len(features) + 1)]
    for model in sorted({row["model"] for row in rows}):
        cells = []
        for feature in features:
            passed = {row["version"] for row in rows if (row["model"], row["feature"]) == (model, feature)}
            versions = sorted(passed, key=_version)
            together = len(versions) > 1 and versions == tested[tested.index(versions[0]) :][: len(versions)]
            cells.append(f"{versions[0]} to {versions[-1]}" if together else ", ".join(versions))
        lines.append("| " + " | ".join([model, *cells]) + " |")
    torch_versions = ", ".join(sorted({row["torch"] for row in rows}))
    return _HEAD + "\n".join(lines) + f"\n\nTested: diffusers {', '.join(tested)}; torch {torch_versions}.\n"


def _version(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


#: In the order of the columns.
_FEATURES = (
    *("attention", "norms", "no concatenation", "VAE encode", "VAE decode", "CSG", "restore", "model offload"),
    *("sequential offload", "group offload", "LoRA", "torch.compile"),
)
