"""A benchmark's run: its device, folder, environment and section, and what is printed when it is over."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.harness.environment import capture, machine_state
from bench.harness.registry import Benchmark
from bench.harness.timing import Ceilings, Timer, make_timer, measure_ceilings
from bench.records.markdown import format_section, plain
from bench.records.write import Record, Section, dumps, make_folder
from bench.report.charts import Chart
from bench.report.figures import section_charts
from model.cli.options import pick_device
from model.errors import InputError, printable, require
from model.io.durable import write_text

RESULT = "result.json"


@dataclass
class Session:
    """The run of one benchmark: what its ``measure`` works with."""

    args: argparse.Namespace
    device: torch.device
    folder: Path
    section: Section
    environment: dict[str, Any]

    @property
    def cuda(self) -> bool:
        """True where there is a GPU to measure."""
        return self.device.type == "cuda"

    def say(self, text: str) -> None:
        """Prints a line, unless JSON was asked for."""
        if not self.args.json:
            print(printable(text), flush=True)

    def progress(self, items: Iterable[Any] | None = None, **options: Any) -> Any:
        """Returns a bar of progress on a terminal, over the items or to be advanced by hand."""
        return require("tqdm", "bench").tqdm(items, dynamic_ncols=True, disable=None, **options)

    def timer(self, milliseconds: float) -> Timer:
        """Returns a timer for the device."""
        return make_timer(self.device, milliseconds)

    def ceilings(self, timer: Timer | None = None, **sizes: int) -> Ceilings:
        """Measures both ceilings and writes them down."""
        found = measure_ceilings(self.device, timer or make_timer(self.device, 100, graphs=False), **sizes)
        self.section.set(ceilings=found._asdict())
        return found

    def draw(self, name: str, chart: Chart) -> None:
        """Leaves a chart in the results folder; those of the section's tables and timelines come by themselves."""
        write_text(self.folder / f"{name}.svg", chart.svg())


def default_folder(name: str) -> Path:
    """Returns the results folder of a run that names none: ``out/NAME-DATE-TIME``."""
    return Path("out") / f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


def run_benchmark(benchmark: Benchmark, args: argparse.Namespace) -> None:
    """Runs a subcommand, writes its results and prints its tables.

    Raises:
        InputError: a package that it needs is not installed, or an argument does not fit.
    """
    if benchmark.run is not None:
        benchmark.run(args)
        return
    require("tqdm", "bench")
    device = pick_device(args.device)
    if device.type == "cuda":
        require("pynvml", "bench")
    folder = args.out or default_folder(benchmark.name)
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    make_folder(folder)
    record = Record(folder / RESULT, capture(device))
    try:
        with record.section(benchmark.name, benchmark.title or benchmark.summary, _settings(args)) as section:
            section.data["machine"] = {"before": machine_state(device), "after": None}
            session = Session(args, device, folder, section, record.data["environment"])
            assert benchmark.measure is not None
            benchmark.measure(args, session)
            section.data["machine"]["after"] = machine_state(device)
    except InputError:
        # Bad input is found before anything is measured: then all is as it was.
        if not any(folder.iterdir()):
            for place in made:
                place.rmdir()
        raise
    for name, chart in section_charts(section.data).items():
        session.draw(name, chart._replace(description=f"{chart.description}; {session.environment['device']}"))
    text = format_section(section.data)
    write_text(folder / "table.md", text + "\n")
    if args.json:
        print(dumps(record.data), end="")
        return
    if text:
        print(f"\n{text}\n")
    measured = any(row["basis"] == "measured" for table in section.data["tables"] for row in table["rows"])
    where = f"{measured_on(record.data['environment'])} " if measured else ""
    print(f"{where}Results in {folder.resolve()}")


def measured_on(environment: dict[str, Any]) -> str:
    """Returns the sentence under every table: the device, and torch's version."""
    device, torch_version = plain(environment["device"]), plain(str(environment["packages"]["torch"]))
    return f"Measured on {device} ({environment['device_type']}), torch {torch_version}."


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the command's options as JSON has them; files and folders by the last part of their names."""
    hidden = ("command", "argv", "json", "out")
    found = {}
    for name, value in vars(args).items():
        value = ",".join(value) if isinstance(value, tuple) else value
        text = value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
        if name not in hidden:
            found[name] = Path(text).name if isinstance(text, str) and Path(text).is_absolute() else text
    return found
