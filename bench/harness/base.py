"""The option ``--base REV``: runs a benchmark on another git revision and on this tree, in turns, and compares them."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.records.comparison import compare_documents
from bench.records.markdown import format_comparison
from bench.records.read import ROOT, read_result
from bench.records.write import dumps, make_folder, spread_warning
from model.errors import InputError
from model.io.durable import write_text

#: Runs of each revision.
ROUNDS = 2


def compare_with_base(name: str, args: argparse.Namespace) -> None:
    """Runs a benchmark on both trees and prints the comparison; all result files stay in the folder.

    Raises:
        InputError: there is no such revision, or a run fails.
    """
    commit = resolve(args.base)
    folder = (args.out or Path("out") / f"{name}-against-{commit[:9]}").resolve()
    make_folder(folder)
    files: dict[str, list[Path]] = {"base": [], "here": []}
    with tempfile.TemporaryDirectory() as room:
        tree = Path(room) / "base"
        _git("worktree", "add", "--detach", "--quiet", str(tree), commit)
        try:
            for i in range(ROUNDS):
                # Base first and last alike, so that a drift does not favour either.
                for which in ("base", "here") if i % 2 == 0 else ("here", "base"):
                    out = folder / f"{which}-{i + 1}"
                    if not args.json:
                        print(f"{which} ({commit[:9] if which == 'base' else 'this tree'}), run {i + 1} of {ROUNDS}")
                    _run(args.argv, tree if which == "base" else ROOT, out)
                    files[which].append(out / "result.json")
        finally:
            _git("worktree", "remove", "--force", str(tree))
    documents = [merge_runs([read_result(path) for path in files[which]]) for which in ("base", "here")]
    labels = [f"{args.base} ({commit[:9]})", "this tree"]
    for document, which in zip(documents, ("base", "here"), strict=True):
        write_text(folder / f"{which}.json", dumps(document))
    comparison = compare_documents(documents, labels)
    text = format_comparison(comparison)
    write_text(folder / "comparison.md", text + "\n")
    print(dumps(comparison) if args.json else f"\n{text}\n\nresults in {folder}\n", end="")


def resolve(revision: str) -> str:
    """Returns the commit of a revision.

    Raises:
        InputError: there is none, or this is no git checkout, or there is no git.
    """
    command = ["git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}"]
    if not revision.isprintable():
        raise InputError(f"base: expected a revision of this git checkout, got {revision!r}")
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError as error:
        raise InputError(f"base: cannot run git: {error.strerror}") from error
    if done.returncode:
        raise InputError(f"base: {revision!r} is no revision of this git checkout")
    return done.stdout.strip()


def merge_runs(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns one document of several runs of the same: medians of their metrics, and the widest of their spreads."""
    merged = documents[0]
    for name, section in merged["sections"].items():
        others = [document["sections"].get(name, {"tables": []}) for document in documents[1:]]
        for table in section["tables"]:
            same = [t for other in others for t in other["tables"] if t["name"] == table["name"]]
            for row in table["rows"]:
                key = [row[field] for field in table["identity"]]
                rows = [r for t in same for r in t["rows"] if [r[field] for field in table["identity"]] == key]
                _merge_row(row, [r for r in rows if r["status"] == "ok"], table["metrics"])
    return merged


def _merge_row(row: dict[str, Any], others: list[dict[str, Any]], metrics: dict[str, Any]) -> None:
    if row["status"] != "ok" or not others:
        return
    for metric in metrics:
        known = [r for r in (row, *others) if isinstance(r.get(metric), (int, float))]
        if not known:
            continue
        middle = statistics.median(r[metric] for r in known)
        if metric == "seconds":  # the warning was the first run's own, and its count
            row["runs"] = sum(r.get("runs") or 1 for r in known)
            row.pop("warning", None)
        if metrics[metric]["unit"] == "s":
            for pick, end in ((min, "low"), (max, "high")):
                row[f"{metric}_{end}"] = pick(r.get(f"{metric}_{end}") or r[metric] for r in known)
        row[metric] = middle
    warning = spread_warning(row)
    if warning:
        row["warning"] = warning


def _run(argv: list[str], tree: Path, out: Path) -> None:
    arguments = without_run_options(argv)
    # Files are meant as seen from here, not from the other tree.
    given = [str(Path(a).resolve()) if "/" in a and Path(a).exists() else a for a in arguments]
    command = [sys.executable, "-m", "bench", *given, "--out", str(out)]
    done = subprocess.run(command, cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-5:])
        raise InputError(f"base: python -m bench {' '.join(arguments)} failed in {tree.name}:\n{tail}")


def without_run_options(arguments: list[str]) -> list[str]:
    """Returns the command line without ``--base``, ``--out`` and ``--json``."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--base")
    parser.add_argument("--out")
    parser.add_argument("--json", action="store_true")
    return parser.parse_known_args(arguments)[1]


def _git(*arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
