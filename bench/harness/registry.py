"""The subcommands of ``python -m bench``: the ``BENCHMARK`` of every ``bench/*/command.py``.

A new benchmark is a folder with one small file, beside what it measures; docs/contributing.md has an example. Its
``measure`` gets a :class:`bench.harness.session.Session`: the device, the results folder and the section to fill.
Options that all of these have (``--device``, ``--out``, ``--json``, ``--quick``) come by themselves. A command that
measures nothing itself gives ``run`` instead, and has its own options alone.
"""

from __future__ import annotations

import argparse
import functools
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import bench
from model.cli.options import count, number, parse_path
from model.csg.schedule import MOST_STEPS
from model.errors import InputError

Item = TypeVar("Item")

#: Parsers of options that several benchmarks have (argparse types), with what is still a benchmark as their bounds.
MILLISECONDS, REPEATS, JOBS = count(1, 60_000), count(1, 1000), count(1, 256)
STEPS, MINUTES = count(1, MOST_STEPS), number(0.01, 10_000)
#: The capability of a card, two or three digits.
CAPABILITY = count(10, 999)


def names(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """Returns a parser (an argparse type) of names that commas separate, each one of ``known`` and kept once."""

    def parse(text: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
        if wrong := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, got {', '.join(map(repr, wrong))}")
        return found

    return parse


@dataclass(frozen=True)
class Benchmark:
    """One subcommand; ``order`` is its place in ``--help``."""

    name: str
    summary: str
    description: str
    examples: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[argparse.Namespace, Any], None] | None = None
    run: Callable[[argparse.Namespace], None] | None = None
    #: The title of the section that ``measure`` fills.
    title: str = ""
    order: int = 50
    #: The help of ``--quick``: what it leaves out.
    quick: str = "less of everything"


@functools.cache
def benchmarks() -> dict[str, Benchmark]:
    """Returns all subcommands by name, in the order of ``--help``."""
    files = sorted(path for folder in bench.__path__ for path in Path(folder).glob("*/command.py"))
    found = [importlib.import_module(f"bench.{file.parent.name}.command").BENCHMARK for file in files]
    return {b.name: b for b in sorted(found, key=lambda b: (b.order, b.name))}


def matches(texts: str, name: str) -> bool:
    """Returns whether ``name`` contains one of the texts, which ``|`` separates."""
    return any(text.strip() in name for text in texts.split("|"))


def chosen(option: str, texts: str, known: Iterable[Item], name: Callable[[Item], str] = str) -> list[Item]:
    """Returns those of ``known`` whose name contains one of the texts, which ``|`` separates.

    Raises:
        InputError: there are none; the message names the option and all that there are.
    """
    known = list(known)
    found = [item for item in known if matches(texts, name(item))]
    if not found:
        raise InputError(f"{option}: none contains {texts!r}; they are {'; '.join(dict.fromkeys(map(name, known)))}")
    return found


def add_parser(commands: Any, benchmark: Benchmark) -> None:
    """Adds a subcommand to the command line of ``python -m bench``."""
    parser = commands.add_parser(
        benchmark.name,
        help=benchmark.summary,
        description=benchmark.description,
        epilog=benchmark.examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    benchmark.add_arguments(parser)
    if benchmark.measure is not None:
        group = parser.add_argument_group("options of all benchmarks")
        group.add_argument("--quick", action="store_true", help=benchmark.quick)
        group.add_argument("--json", action="store_true", help="print JSON instead")
        group.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
        group.add_argument(
            "--out", type=parse_path, metavar="DIR", help=f"results folder (default out/{benchmark.name}-DATE-TIME)"
        )
