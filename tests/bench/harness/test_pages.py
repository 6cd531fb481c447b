"""The pages name benchmark commands, and files of the repository, that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from bench.__main__ import build_parser
from bench.harness.registry import benchmarks
from bench.records.read import ROOT

#: All pages but the changelog, which names what is no longer there.
PAGES = [ROOT / "README.md", *sorted(set((ROOT / "docs").rglob("*.md")) - {ROOT / "docs" / "changelog.md"})]
#: What stands for any subcommand, and the example of a new one.
EXAMPLES = ("SUBJECT", "warmth")
FILE = r"(?<![\w./])(?:tests|bench|model|swifti2v_kernels|examples|hub)/[\w/]+\.(?:py|json)\b"


def commands(page: Path) -> list[str]:
    """Returns what follows ``python -m bench`` on a page, up to the end of the code or to two spaces."""
    found = [match.split("  ")[0].strip() for match in re.findall(r"python -m bench( [^`\n]*)", page.read_text())]
    return [command for command in found if command and command.split()[0] not in (*EXAMPLES, "...")]


def test_commands_on_pages_are_command_lines_that_exist() -> None:
    """Each names a subcommand and only options that it has."""
    found, parser = [command for page in PAGES for command in commands(page)], build_parser()
    assert len(found) >= 20
    for command in found:
        arguments = shlex.split(command)
        if command not in benchmarks():  # a mention, which need not be all that the subcommand wants
            args = parser.parse_args(arguments if arguments[0] in benchmarks() else ["csg", *arguments])
            assert args.command in benchmarks(), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_a_page_names_exist(page: Path) -> None:
    """A name in the text, such as that of the test that holds what was mended, leads to a file."""
    named = {name for name in re.findall(FILE, page.read_text()) if EXAMPLES[1] not in name}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
