"""The ends of a page: the figures to be reached, the files, and the machines that they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.records.comparison import letter
from bench.records.markdown import Cell
from bench.records.metrics import format_value, significant
from bench.records.read import ROOT
from bench.report.grids import Grid, Line, verdict_grid

Document = Mapping[str, Any]


class Tile(NamedTuple):
    """A number in large letters, the words beneath it, and their badge."""

    value: str
    words: str
    badge: str = ""
    kind: str = ""


def card_line(document: Document, at: int | None = None) -> dict[str, Any]:
    """Returns the card and the versions that a file's figures depend on; ``at``: the file's number."""
    environment, git = document["environment"], document["environment"]["git"] or {}
    gpu, packages = environment.get("gpu", {}), environment["packages"]
    versions = {
        "driver": gpu.get("driver"), "CUDA": gpu.get("cuda"), "cuDNN": cudnn_version(gpu.get("cudnn")),
        "torch": packages.get("torch"), "Triton": packages.get("triton"), "Python": environment.get("python"),
        "commit": (git.get("commit") or "")[:9], "": environment["date"][:10],
    }  # fmt: skip
    words = ", ".join(f"{name} {value}".strip() for name, value in versions.items() if value)
    return {"device": environment["device"], "versions": words, "letter": None if at is None else letter(at)}


def cudnn_version(number: int | None) -> str | None:
    """Returns ``9.12.0`` for cuDNN's number 91200; None where there is none."""
    return None if number is None else f"{number // 10_000}.{number // 100 % 100}.{number % 100}"


def verdicts_of(documents: Sequence[Document]) -> dict[str, Any] | None:
    """Returns the figures to be reached, of all files, the missed ones first; None where there are none."""
    found = [
        (letter(i), name, verdict)
        for i, document in enumerate(documents)
        for name, section in document["sections"].items()
        for verdict in section["verdicts"]
    ]
    if not found:
        return None
    found.sort(key=lambda entry: {False: 0, True: 1, None: 2}[entry[2]["met"]])
    counts = {word: sum(v["met"] is met for _, _, v in found) for word, met in (("missed", False), ("met", True))}
    return {**counts, "grid": verdict_grid(found)}


def files_of(paths: Sequence[Path], documents: Sequence[Document], labels: Sequence[str]) -> dict[str, Any]:
    """Returns the files and the machines that they come from."""
    lines = []
    for i, (path, document) in enumerate(zip(paths, documents, strict=True)):
        environment, git = document["environment"], document["environment"]["git"] or {}
        cells = [
            letter(i), environment["device"], (git.get("commit") or "not known")[:9],
            environment["date"].replace("T", " "), ", ".join(document["sections"]), _shown(path),
        ]  # fmt: skip
        notes = [("uncommitted changes", "warn")] if git.get("dirty") else []
        lines.append(Line([Cell(text) for text in cells], notes=notes))
    return {
        "counts": _counts(documents),
        "grid": Grid("result files", ["", "machine", "commit", "date, UTC", "sections", "file"], lines),
        "machines": [
            {"letter": letter(i), "label": label, "facts": _facts(document), "runs": _runs(document, label)}
            for i, (document, label) in enumerate(zip(documents, labels, strict=True))
        ],
    }


def _counts(documents: Sequence[Document]) -> list[Tile]:
    """Returns how much there is in all files, and how much of it has no result."""
    sections = [section for document in documents for section in document["sections"].values()]
    rows = [row for section in sections for table in section["tables"] for row in table["rows"]]
    machines = len({d["environment"]["device"] for d in documents})
    tiles = [
        (len(documents), "file" if len(documents) == 1 else "files", ""),
        (machines, "machine" if machines == 1 else "machines", ""),
        (len(rows), "rows", ""),
        (sum(row["basis"] == "measured" for row in rows), "of them measured", ""),
        (sum(row["status"] != "ok" for row in rows), "without a result", "bad"),
        (sum(section["status"] != "complete" for section in sections), "incomplete sections", "bad"),
    ]
    return [Tile(f"{value:,}", words, kind=kind) for value, words, kind in tiles if value]


def _shown(path: Path) -> str:
    """Returns a path from the repository's root; elsewhere the name alone, since folders are nobody's business."""
    resolved = Path(path).resolve()
    return str(resolved.relative_to(ROOT)) if resolved.is_relative_to(ROOT) else resolved.name


def _facts(document: Document) -> dict[str, Any]:
    environment, gpu = document["environment"], document["environment"].get("gpu", {})
    facts = {
        "driver": gpu.get("driver"), "CUDA": gpu.get("cuda"), "cuDNN": cudnn_version(gpu.get("cudnn")),
        **environment["packages"],
        "Python": environment.get("python"), "platform": environment.get("platform"),
        "CPU": environment.get("cpu"), "cores": environment.get("cpu_count"),
        "capability": ".".join(map(str, gpu.get("capability") or ())),
        "multiprocessors": gpu.get("multiprocessors"), "memory": format_value(gpu.get("memory_bytes"), "bytes"),
        "power limit": f"{gpu['power_limit_watts']:.0f} W" if gpu.get("power_limit_watts") else None,
        "highest clock": f"{gpu['max_clock_mhz']} MHz" if gpu.get("max_clock_mhz") else None,
        "NVML": gpu.get("nvml_error"),
    }  # fmt: skip
    return {name: value for name, value in facts.items() if value not in (None, "")}


def _runs(document: Document, label: str) -> Grid:
    """Returns every section with its status, its seconds, how the card was before and after, and its ceilings."""
    heads = ["section", "seconds", "clock, MHz", "power, W", "\N{DEGREE SIGN}C", "copy, GB/s", "matmul, TFLOP/s"]
    lines = []
    for name, section in document["sections"].items():
        machine, ceilings = section.get("machine") or {}, section.get("ceilings") or {}
        states = [machine.get("before") or {}, machine.get("after") or {}]
        courses = [
            " \N{RIGHTWARDS ARROW} ".join(f"{state[field]:.0f}" for state in states if state.get(field) is not None)
            for field in ("clock_mhz", "power_watts", "temperature_celsius")
        ]
        matmul = ceilings.get("matmul_tflops")
        cells = [
            name, "" if section.get("seconds") is None else f"{section['seconds']:,.1f}", *courses,
            format_value(ceilings.get("copy_bytes_per_second"), "B/s"),
            "" if matmul is None else f"{significant(matmul)} ({ceilings.get('matmul_dtype', '')})",
        ]  # fmt: skip
        kind = "good" if section["status"] == "complete" else "bad"
        badges = [(section["status"], kind, section.get("reason") or "")]
        badges += [(f"throttled: {word}", "bad", "") for word in states[1].get("throttling") or ()]
        lines.append(Line([Cell(text) for text in cells], badges))
    # Without a card most of them are not known.
    kept = [at for at in range(len(heads)) if at < 2 or any(line.cells[at].text for line in lines)]
    lines = [line._replace(cells=[line.cells[at] for at in kept]) for line in lines]
    return Grid(f"runs of {label}", [heads[at] for at in kept], lines, first="")
