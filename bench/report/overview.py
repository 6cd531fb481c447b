"""The frame of a page: its title, the figures to be reached, and, last, the files and their machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.records.comparison import letter
from bench.records.metrics import format_value, significant
from bench.records.read import ROOT
from bench.report.answer import card_line, cudnn_version
from bench.report.markup import Markup, tag
from bench.report.tables import BASES, badge, plain_table, verdict_table

TITLE = "swifti2v: benchmark results"

Document = Mapping[str, Any]


def page_header(documents: Sequence[Document], clip: bool) -> Markup:
    """Returns the title; and, where no clip says so (``clip``), the cards that the figures are from."""
    newest = {d["environment"]["device"]: d for d in sorted(documents, key=lambda d: d["environment"]["date"])}
    return tag("header", tag("h1", TITLE), None if clip else [card_line(document) for document in newest.values()])


def legend() -> Markup:
    """Returns what the badges mean, folded away."""
    meanings = [*((badge(name), text) for name, text in BASES.items())]
    meanings.append((badge("out of memory", "bad"), "no result; the note says why"))
    words = [tag("div", tag("dt", word), tag("dd", text)) for word, text in meanings]
    return tag("details", tag("summary", "What the badges mean"), tag("dl", words, class_="legend"), class_="meanings")


def _counts(documents: Sequence[Document]) -> Markup:
    """Returns how much there is in all files, and how much of it has no result."""
    sections = [section for document in documents for section in document["sections"].values()]
    rows = [row for section in sections for table in section["tables"] for row in table["rows"]]
    cut = sum(section["status"] != "complete" for section in sections)
    machines = len({d["environment"]["device"] for d in documents})
    failed = sum(row["status"] != "ok" for row in rows)
    tiles = [
        (len(documents), "file" if len(documents) == 1 else "files", ""),
        (machines, "machine" if machines == 1 else "machines", ""),
        (f"{len(rows):,}", "rows", ""),
        (sum(row["basis"] == "measured" for row in rows), "of them measured", ""),
        (failed, "without a result", "bad" if failed else ""),
        (cut, "incomplete sections", "bad" if cut else ""),
    ]
    return tag("div", [tag("div", tag("b", f"{value}"), tag("span", text), class_=f"tile {kind}")
                       for value, text, kind in tiles if value], class_="tiles")  # fmt: skip


def files_block(paths: Sequence[Path], documents: Sequence[Document], labels: Sequence[str]) -> Markup:
    """Returns the files and the machines that they come from."""
    rows = []
    for i, (path, document) in enumerate(zip(paths, documents, strict=True)):
        environment, git = document["environment"], document["environment"]["git"] or {}
        commit = (git.get("commit") or "not known")[:9]
        changed = badge("uncommitted changes", "warn") if git.get("dirty") else None
        rows.append(
            [letter(i), environment["device"], tag("span", tag("code", commit), " ", changed),
             environment["date"].replace("T", " "), ", ".join(document["sections"]), tag("code", _shown(path))]
        )  # fmt: skip
    table = plain_table("result files", ["", "machine", "commit", "date, UTC", "sections", "file"], rows)
    cards = [
        _environment(i, document, label) for i, (document, label) in enumerate(zip(documents, labels, strict=True))
    ]
    heading = tag("h2", "Files and machines")
    return tag("section", heading, _counts(documents), table, tag("div", cards, class_="panels"), id="files")


def _shown(path: Path) -> str:
    """Returns a path from the repository's root; elsewhere the name alone, since folders are nobody's business."""
    resolved = Path(path).resolve()
    return str(resolved.relative_to(ROOT)) if resolved.is_relative_to(ROOT) else resolved.name


def _environment(i: int, document: Document, label: str) -> Markup:
    environment = document["environment"]
    gpu, packages = environment.get("gpu", {}), environment["packages"]
    capability, memory = gpu.get("capability"), gpu.get("memory_bytes")
    facts = {
        "driver": gpu.get("driver"), "CUDA": gpu.get("cuda"), "cuDNN": cudnn_version(gpu.get("cudnn")),
        **{name: version for name, version in packages.items() if version},
        "Python": environment.get("python"), "platform": environment.get("platform"),
        "CPU": environment.get("cpu"), "cores": environment.get("cpu_count"),
        "capability": ".".join(map(str, capability)) if capability else None,
        "multiprocessors": gpu.get("multiprocessors"), "memory": format_value(memory, "bytes") or None,
        "power limit": f"{gpu['power_limit_watts']:.0f} W" if gpu.get("power_limit_watts") else None,
        "highest clock": f"{gpu['max_clock_mhz']} MHz" if gpu.get("max_clock_mhz") else None,
        "NVML": gpu.get("nvml_error"),
    }  # fmt: skip
    listed = [tag("div", tag("dt", n), tag("dd", value)) for n, value in facts.items() if value is not None]
    runs = [_run(name, section) for name, section in document["sections"].items()]
    headers = ["section", "", "seconds", "clock, MHz", "power, W", "\N{DEGREE SIGN}C", "copy, GB/s", "matmul, TFLOP/s"]
    # Without a card most of them are not known.
    kept = [at for at, name in enumerate(headers) if at < 3 or any(run[at] for run in runs)]
    headers, runs = [headers[at] for at in kept], [[run[at] for at in kept] for run in runs]
    title = tag("h3", tag("span", letter(i), class_="file"), " ", label)
    return tag("div", title, tag("dl", listed, class_="facts"), plain_table(f"runs of {label}", headers, runs),
               class_="panel")  # fmt: skip


def _run(name: str, section: Mapping[str, Any]) -> list[Any]:
    """Returns a section's status, its seconds, how the card was before and after, and its ceilings."""
    machine, ceilings = section.get("machine") or {}, section.get("ceilings") or {}
    before, after = machine.get("before") or {}, machine.get("after") or {}

    def course(field: str) -> str:
        found = [format(state[field], ".0f") for state in (before, after) if state.get(field) is not None]
        return " \N{RIGHTWARDS ARROW} ".join(found)

    throttled = [badge(f"throttled: {word}", "bad") for word in after.get("throttling") or ()]
    status = badge(section["status"], "good" if section["status"] == "complete" else "bad", section.get("reason"))
    copy, matmul = ceilings.get("copy_bytes_per_second"), ceilings.get("matmul_tflops")
    return [
        name, [status, throttled], "" if section.get("seconds") is None else f"{section['seconds']:,.1f}",
        course("clock_mhz"), course("power_watts"), course("temperature_celsius"),
        "" if copy is None else format_value(copy, "B/s"),
        "" if matmul is None else f"{significant(matmul)} ({ceilings.get('matmul_dtype', '')})",
    ]  # fmt: skip


def verdicts_block(documents: Sequence[Document]) -> Markup | None:
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
    missed, met = (sum(verdict["met"] is state for _, _, verdict in found) for state in (False, True))
    counts = tag("p", tag("b", f"{missed} missed", class_="bad" if missed else None), ", ",
                 tag("b", f"{met} met", class_="good"))  # fmt: skip
    return tag("section", tag("h2", "Figures to be reached"), counts, verdict_table(found), id="figures")
