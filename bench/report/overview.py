"""What stands above the sections: the files and their machines, the figures to be reached, the paper beside ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.records.comparison import letter
from bench.records.metrics import format_value, significant
from bench.records.read import ROOT
from bench.report import charts
from bench.report.figures import clip_rows, is_ours, whole_clips
from bench.report.markup import Markup, tag
from bench.report.tables import BASES, Cell, badge, plain_table, sortable, verdict_table

TITLE = "swifti2v: benchmark results"

Document = Mapping[str, Any]


def page_header(documents: Sequence[Document]) -> Markup:
    """Title, counts over all files, and what the badges mean."""
    sections = [section for document in documents for section in document["sections"].values()]
    rows = [row for section in sections for table in section["tables"] for row in table["rows"]]
    verdicts = [verdict for section in sections for verdict in section["verdicts"]]
    cut = sum(section["status"] != "complete" for section in sections)
    machines = len({d["environment"]["device"] for d in documents})
    failed = sum(row["status"] != "ok" for row in rows)
    tiles = [
        (len(documents), "file" if len(documents) == 1 else "files", ""),
        (machines, "machine" if machines == 1 else "machines", ""),
        (f"{len(rows):,}", "rows", ""),
        (sum(row["basis"] == "measured" for row in rows), "of them measured", ""),
        (failed, "without a result", "bad" if failed else ""),
        (sum(v["met"] is True for v in verdicts), "figures met", "good"),
        (missed := sum(v["met"] is False for v in verdicts), "MISSED", "bad" if missed else ""),
        (cut, "incomplete sections", "bad" if cut else ""),
    ]
    meanings = [*((badge(name), text) for name, text in BASES.items())]
    meanings.append((badge("out of memory", "bad"), "no result; the note says why"))
    legend = [tag("div", tag("dt", word), tag("dd", text)) for word, text in meanings]
    return tag(
        "header", tag("h1", TITLE),
        tag("div", [tag("div", tag("b", f"{value}"), tag("span", text), class_=f"tile {kind}")
                    for value, text, kind in tiles], class_="tiles"),
        tag("details", tag("summary", "What the badges mean"), tag("dl", legend, class_="legend"), open=True),
    )  # fmt: skip


def files_block(paths: Sequence[Path], documents: Sequence[Document], labels: Sequence[str]) -> Markup:
    """The files and the machines that they come from."""
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
    return tag("section", tag("h2", "Files"), table, tag("div", cards, class_="panels"), id="files")


def _shown(path: Path) -> str:
    """Within the repository from its root; elsewhere the name alone, since folders are nobody's business."""
    resolved = Path(path).resolve()
    return str(resolved.relative_to(ROOT)) if resolved.is_relative_to(ROOT) else resolved.name


def _environment(i: int, document: Document, label: str) -> Markup:
    environment = document["environment"]
    gpu, packages = environment.get("gpu", {}), environment["packages"]
    capability, memory = gpu.get("capability"), gpu.get("memory_bytes")
    facts = {
        "driver": gpu.get("driver"), "CUDA": gpu.get("cuda"), "cuDNN": gpu.get("cudnn"),
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
    """A section's status, its seconds, how the card was before and after, and its ceilings."""
    machine, ceilings = section.get("machine") or {}, section.get("ceilings") or {}
    before, after = machine.get("before") or {}, machine.get("after") or {}

    def course(field: str) -> str:
        found = [format(state[field], ".0f") for state in (before, after) if state.get(field) is not None]
        return " \N{RIGHTWARDS ARROW} ".join(found)

    throttled = [badge(f"throttled: {word}", "bad") for word in after.get("throttling") or ()]
    status = badge(section["status"], "good" if section["status"] == "complete" else "bad", section.get("reason"))
    copy, product = ceilings.get("copy_bytes_per_second"), ceilings.get("matmul_tflops")
    return [
        name, [status, throttled], "" if section.get("seconds") is None else f"{section['seconds']:,.1f}",
        course("clock_mhz"), course("power_watts"), course("temperature_celsius"),
        "" if copy is None else format_value(copy, "B/s"),
        "" if product is None else f"{significant(product)} ({ceilings.get('matmul_dtype', '')})",
    ]  # fmt: skip


def verdicts_block(documents: Sequence[Document]) -> Markup | None:
    """The figures to be reached, of all files; None where there are none."""
    found = [
        (letter(i), name, verdict)
        for i, document in enumerate(documents)
        for name, section in document["sections"].items()
        for verdict in section["verdicts"]
    ]
    if not found:
        return None
    return tag("section", tag("h2", "Figures to be reached"), verdict_table(found), id="figures")


def paper_block(documents: Sequence[Document]) -> Markup | None:
    """What the paper reports beside our own, where a file has both."""
    letters = [letter(i) for i in range(len(documents))]
    rows = [(at, row) for document, at in zip(documents, letters, strict=True) for row in clip_rows(document)]
    if not any(row["basis"] == "reported" for _, row in rows) or all(row["basis"] == "reported" for _, row in rows):
        return None
    theirs = {is_ours(row, row["method"]): row for _, row in rows if row["basis"] == "reported"}
    lines, said = [], set()
    for at, row in sorted(rows, key=lambda pair: pair[1]["basis"] != "reported"):
        reported, ours = row["basis"] == "reported", is_ours(row, row["method"])
        if reported and row["method"] in said:
            continue
        said |= {row["method"]} if reported else set()
        same = theirs.get(ours)
        over = same["total_seconds"] / row["total_seconds"] if same and same["size"] == row["size"] else None
        cells = [
            Cell(badge(row["basis"]), row["basis"]), Cell(row["model"], row["model"]), Cell(row["size"], row["size"]),
            Cell(row["method"], row["method"]),
            Cell(tag("span", significant(row["total_seconds"]), class_="figure-value"), row["total_seconds"]),
            Cell(format_value(row.get("speedup"), "ratio"), row.get("speedup")),
            Cell("" if over is None or reported else format_value(over, "ratio"), over),
            Cell("" if reported else at, at), Cell(row.get("basis_note", ""), row.get("basis_note"), "notes"),
        ]  # fmt: skip
        kind = f"{'ours ' if ours and not reported else ''}unmeasured {row['basis']}"
        lines.append((kind if row["basis"] != "measured" else "ours" if ours else "", cells))
    headers = ["basis", "model", "size", "method", "whole clip, s", "times faster", "the paper's time over this"]
    note = "Times faster: than end-to-end with 50 steps and guidance, of the same model and size. The paper's card is"
    note += " another, and so are its models' weights and its baseline's code."
    chart = charts.clips("Seconds of one clip", whole_clips(documents, letters))
    heading = tag("h2", "The paper beside ours")
    return tag("section", heading, chart, sortable("the paper beside ours", [*headers, "file", "note"], lines),
               tag("p", note, class_="note"), id="paper")  # fmt: skip
