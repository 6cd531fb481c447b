"""The way of a measured choice from what can be tuned into the package's table, and from there to a launch."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import swifti2v_kernels
from bench.operators.discover import all_cases, cases_of
from bench.records import package_tables
from bench.records.package_tables import dumps_table, merge, write_entries
from bench.static.compile_only import compiled_for
from bench.tuning.search import Outcome, entry
from bench.tuning.space import Target, targets
from swifti2v_kernels.common import configs
from swifti2v_kernels.common.configs import configured, seen_configs
from tests.support.bench_session import CPU
from tests.support.tuned_operator import OWN, Config

SOURCES = Path(swifti2v_kernels.__file__).parent


def choice(block: int, width: int = 8, capability: int = 90, **more: Any) -> dict[str, Any]:
    key = {"width": width}
    return {"capability": capability, "kernel": "scaled", "key": key, "config": {"block": block}, **more}


def test_every_kernel_with_a_space_is_a_target() -> None:
    """The targets are the classes in the sources that have a SPACE, by the names that launches look up."""
    spaces: set[type] = set()
    for module in pkgutil.walk_packages(swifti2v_kernels.__path__, "swifti2v_kernels."):
        classes = inspect.getmembers(importlib.import_module(module.name), inspect.isclass)
        spaces |= {c for _, c in classes if hasattr(c, "SPACE")}
    sources = "".join(path.read_text() for path in SOURCES.rglob("*.py"))
    names = set(re.findall(r"\b(?:configured|tiles)\(\s*\"(\w+)\"", sources))
    found = targets(90)
    assert {type(target.heuristic) for target in found} == spaces
    assert {target.kernel for target in found} == names
    assert len(spaces) >= 8
    assert len({target.name for target in found}) == len(found)


@pytest.mark.parametrize("capability", [89, 90])
def test_a_small_call_looks_up_what_its_real_size_looks_up(capability: int) -> None:
    """Targets are read from small calls; their entries must be those of real ones."""
    keys = 0
    for one in all_cases():
        if one.real is None or one.least_capability > capability:
            continue
        seen_by = []
        for inputs in (one.inputs, one.real.inputs):
            with compiled_for(capability, compile=False), seen_configs() as seen:
                arguments, options = inputs(CPU)
                one.operator(*arguments, **options)
            seen_by.append([found[:3] for found in seen])
        assert seen_by[0] == seen_by[1], one.name
        keys += len(seen_by[0])
    assert keys >= len(targets(capability))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package's tables that may be written."""
    for name in ("tuned", "conv3d"):
        (tmp_path / f"{name}.json").write_text(dumps_table({"entries": []}))
    monkeypatch.setattr(package_tables, "CONFIGS", tmp_path)
    return tmp_path


def test_an_entry_replaces_that_for_the_same_and_no_other() -> None:
    """The same kernel, card and shape: whatever was found for it, where and when, and in whatever order it is told."""
    old = choice(1, card="old", gain=1.5, provenance={"date": "2026-01-01"})
    others = [choice(1, width=16), choice(1, capability=89), choice(1) | {"kernel": "other"}]
    new = choice(2, card="new", gain=1.1, provenance={"date": "2026-02-02"})
    table = merge({"schema": "s", "entries": [old, *others]}, [new])
    assert sorted(table["entries"], key=str) == sorted([new, *others], key=str)
    assert merge({"schema": "s", "entries": [new]}, others) == table  # in whatever order it has grown
    first = choice(1) | {"key": {"width": 8, "itemsize": 2}}
    turned = choice(2) | {"key": {"itemsize": 2, "width": 8}}
    assert merge({"entries": [first]}, [turned])["entries"] == [turned]


@pytest.mark.parametrize("path", sorted((SOURCES / "configs").glob("*.json")), ids=lambda path: path.name)
def test_shipped_tables_are_as_the_writer_writes_them(path: Path) -> None:
    """A new measurement changes its own lines only, since the tables are formatted as the writer formats them."""
    table = json.loads(path.read_text())
    assert path.read_text() == dumps_table(merge(table, []))
    assert len(merge(table, [])["entries"]) == len(table["entries"])


@pytest.fixture
def shipped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The tables that launches read are those in the folder."""
    configs._measured.cache_clear()
    monkeypatch.setattr(
        configs, "load_table", lambda name: json.loads((folder / f"{name}.json").read_text())["entries"]
    )
    yield folder
    configs._measured.cache_clear()


def test_what_a_search_found_is_what_launches_take(shipped: Path) -> None:
    """A launch of the same kernel, capability and key takes the choice; all others keep their heuristic."""
    target = Target("scaled", 90, {"width": 8, "itemsize": 2}, OWN, ())
    found = entry(Outcome(target, best={"block": 2, "warps": 4}, gain=1.23456), "a card", {"date": "today"})
    assert found is not None
    assert found["gain"] == 1.235
    write_entries({"tuned": [found]})
    assert configured("scaled", 90, OWN, width=8, itemsize=2) == Config(2, 4)
    assert configured("scaled", 90, OWN, itemsize=2, width=8) == Config(2, 4)
    assert configured("scaled", 90, replace(OWN, fixed="other"), width=8, itemsize=2) == Config(2, 4, "other")
    for kernel, capability, key in (
        ("scaled", 89, target.key), ("other", 90, target.key), ("scaled", None, target.key),
        ("scaled", 90, {"width": 8}), ("scaled", 90, {"width": 8, "itemsize": 4}),
    ):  # fmt: skip
        assert configured(kernel, capability, OWN, **key) == OWN


def test_a_real_launch_takes_the_table_s_configuration(shipped: Path) -> None:
    """The configuration is read from the compiled kernel; ``rms_norm_silu`` of another width keeps its heuristic."""
    (one,) = cases_of("rms_norm_silu C384")
    (target,) = [target for target in targets(89) if "rms_norm_silu block_c: 512" in target.name]

    def compiled() -> tuple[Any, int]:
        with compiled_for(89) as kernels:
            one.run(CPU)
        return kernels[0].constants["BLOCK_M"], kernels[0].num_warps

    assert one in target.cases
    assert compiled() == (target.heuristic.block_m, 4)
    found = entry(Outcome(target, best={"block_m": 2, "num_warps": 8}), "a card", {})
    assert found is not None
    write_entries({"tuned": [found]})
    configs._measured.cache_clear()
    assert compiled() == (2, 8)
