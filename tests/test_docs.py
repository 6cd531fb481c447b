"""Documentation: links and names lead somewhere, the site shows every page, commands exist and examples run."""

from __future__ import annotations

import importlib.util
import re
import shlex
import types
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench.__main__ import build_parser
from bench.harness.registry import benchmarks

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
MARKDOWN = [ROOT / "README.md", ROOT / "hub" / "CARD.md", *PAGES]
#: All pages but the changelog, which names what is no longer there.
CURRENT = [page for page in MARKDOWN if page.name != "changelog.md"]
#: What stands for any subcommand of the benchmarks, and the example of a new one.
STANDING_FOR = ("SUBJECT", "warmth", "...")
PLACE = r"(?<![\w./<>*-])(?:tests|bench|model|swifti2v_kernels|examples|hub|docs)/[\w./<>*-]*[\w>*/]"
RUN = [*sorted((DOCS / "operators").glob("*.md")), DOCS / "csg.md"]


def _load_hooks() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = _load_hooks()


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings that are the same on a forge and on the site."""
    found = set()
    text = re.sub(r"^( *)(`{3,}).*?^\1\2", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#+ +(.+?) *#*$", text, re.MULTILINE):
        plain = re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", heading)
        forge = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        ascii_text = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
        site = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_text).strip().lower())
        if forge == site:
            found.add(forge)
    return found


def broken(page: Path) -> Iterator[str]:
    for link in hooks.links(page.read_text()):
        path, _, anchor = link.target.partition("#")
        if "://" in link.target or link.target.startswith("mailto:"):
            continue
        target = (page.parent / path).resolve() if path else page
        where = f"{name_of(page)}:{link.line}: {link.target}"
        if not target.exists() or not target.is_relative_to(ROOT):
            yield f"{where}: no such file"
        elif anchor and (target.suffix != ".md" or anchor not in anchors(target)):
            yield f"{where}: no such heading"


@pytest.mark.parametrize("page", MARKDOWN, ids=name_of)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    """Every relative link of a Markdown file leads to a file, and every anchor to a heading."""
    assert list(broken(page)) == []


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_files_and_folders_that_a_page_names_exist(page: Path) -> None:
    """A name in the text, such as that of the test that holds what was mended, is that of a file; ``<name>`` is any."""
    named = {name for name in re.findall(PLACE, page.read_text()) if "warmth" not in name}
    assert [name for name in sorted(named) if not any(ROOT.glob(re.sub(r"<\w+>", "*", name).rstrip("/")))] == []


def benchmark_commands(page: Path) -> list[str]:
    """Returns what follows ``python -m bench`` on a page, up to the end of the code or to two spaces."""
    found = [match.split("  ")[0].strip() for match in re.findall(r"python -m bench( [^`\n]*)", page.read_text())]
    return [command for command in found if command and command.split()[0] not in STANDING_FOR]


def test_benchmark_commands_on_pages_are_command_lines_that_exist() -> None:
    """Each names a subcommand and only options that it has."""
    found, parser = [command for page in CURRENT for command in benchmark_commands(page)], build_parser()
    assert len(found) >= 20
    for command in found:
        arguments = shlex.split(command)
        if command not in benchmarks():  # a mention, which need not be all that the subcommand wants
            args = parser.parse_args(arguments if arguments[0] in benchmarks() else ["csg", *arguments])
            assert args.command in benchmarks(), command


def test_every_page_is_in_the_navigation_once() -> None:
    """The site's navigation names all pages of docs/ and nothing else."""
    text = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    assert sorted(re.findall(r"([\w/-]+\.md)$", text, re.MULTILINE)) == sorted(
        page.relative_to(DOCS).as_posix() for page in PAGES
    )


def test_the_site_loads_nothing_from_other_servers() -> None:
    """No page brings scripts, styles or pictures of another server, and fonts are the reader's own."""
    settings = (ROOT / "mkdocs.yml").read_text()
    assert "font: false" in settings
    assert "://" not in settings
    for page in PAGES:
        text = page.read_text()
        assert not re.search(r"<(?:script|link|img|iframe)\b|!\[[^\]]*\]\(\w+://", text), name_of(page)


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_examples_of_a_page_run(page: Path) -> None:
    """The Python blocks of a page about operators run in their order, on a CPU, in one namespace."""
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    torch.manual_seed(0)
    exec(compile("\n".join(blocks), name_of(page), "exec"), {})


TEXT = """[a page](../vae.md#plans) [`code`](../../bench/static/bounds.py) [the examples](../../examples/)
[bench/static/bounds.py](../../bench/static/bounds.py#L1) `[not](../../a/link.py)` [gone](../../bench/nothing.py)
```
[not](../../bench/static/bounds.py)
```
<!-- [not](../../bench/static/bounds.py) -->
![picture](../csg.svg)
"""


CODE = "[`code`](../../bench/static/bounds.py)"
EXAMPLES = "[the examples](../../examples/)"
LINE = "[bench/static/bounds.py](../../bench/static/bounds.py#L1)"


@pytest.mark.parametrize(
    ("address", "code", "examples", "line"),
    [
        (None, "`code` (`bench/static/bounds.py`)", "the examples (`examples`)", "`bench/static/bounds.py`"),
        (
            "https://forge/owner/name/",
            "[`code`](https://forge/owner/name/blob/main/bench/static/bounds.py)",
            "[the examples](https://forge/owner/name/tree/main/examples)",
            "[bench/static/bounds.py](https://forge/owner/name/blob/main/bench/static/bounds.py#L1)",
        ),
    ],
)
def test_links_to_source_files_lead_to_the_repository_or_become_paths(
    address: str | None, code: str, examples: str, line: str
) -> None:
    """Links that leave docs/ lead to a public address, or are paths without one; the others, code and comments stay."""
    text, missing = hooks.with_source_links(TEXT, DOCS / "results" / "page.md", address)
    assert missing == ["../../bench/nothing.py"]
    assert text == TEXT.replace(CODE, code).replace(EXAMPLES, examples).replace(LINE, line)


def test_roles_of_docstrings_become_links_to_references() -> None:
    """A role names an object by its path, or by its name in the library; code that is no role stays."""
    html = ":func:<code>~swifti2v_kernels.explain</code> :meth:<code>explain</code> <code>explain</code>"
    link = '<autoref identifier="swifti2v_kernels.explain" optional><code>explain</code></autoref>'
    assert hooks.on_page_content(html, page=None, config=None, files=None) == f"{link} {link} <code>explain</code>"
