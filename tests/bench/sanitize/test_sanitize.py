"""compute-sanitizer is called as it documents, its reports are understood, every kernel comes before it, and one case
is to blame for what a process of many finds. The tool needs a GPU; here a stand-in writes reports of its form."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.operators.discover import all_cases
from bench.records.read import ROOT
from bench.sanitize import command as sanitize
from bench.sanitize import program, run
from bench.sanitize.planted import PLANTED, run_planted
from bench.sanitize.program import launched, run_cases
from bench.sanitize.run import PORTS, find_planted, watch_cases
from bench.sanitize.tool import KERNELS, TOOLS, command_of, errors_of, find_tool, first_words
from bench.static.compile_only import compiled_for
from model.errors import InputError
from swifti2v_kernels.common.case import Case
from tests.support.bench_session import CPU, rows_of, session

CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
INVALID = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 2 bytes
=========     at frames_out_fwd_kernel+0x1a0 in frames_out_kernel.py:60
=========     by thread (12,0,0) in block (3,0,0)
=========     Address 0x7f0000000200 is out of bounds
=========
========= Invalid __global__ write of size 2 bytes
=========     at frames_out_fwd_kernel+0x1a0 in frames_out_kernel.py:60
=========
========= ERROR SUMMARY: 2 errors
"""
RACE = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at segment_attention_hopper_kernel+0xb0 in attention_hopper.py:80
=========     and Read access at segment_attention_hopper_kernel+0x1c0 in attention_hopper.py:120 [160 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
REFUSED = "========= COMPUTE-SANITIZER\n========= Error: Device not supported. Please refer to the documentation.\n"
#: compute-sanitizer, which runs no program: what becomes of a case is told by its number.
STAND_IN = """#!{python} -SsE
import json, sys
a = sys.argv
out, check = a[a.index("bench.sanitize.program") + 1], a[a.index("--tool") + 1]
print("========= COMPUTE-SANITIZER")
errors = 0
if "--planted" in a:
    errors = {planted}
    place = {{"memcheck": "planted_overrun_kernel", "racecheck": "planted_race_kernel"}}[check] if {named} else "exit"
    print("========= Error\\n=========     at", place, "\\n=========" if errors else "")
for n in [int(x) for x in a[a.index("--cases") + 1].split(",")] if "--cases" in a else []:
    kind = {kinds}.get(n)
    if kind == "crash":
        sys.exit(9)
    line = {{"case": n, "kernels": [] if kind == "idle" else ["a_fwd_kernel"]}}
    if kind == "raises":
        line = {{"case": n, "status": "failed", "reason": "no such layout"}}
    if kind == "invalid":
        errors += 1
        print("========= Invalid read of case", n, "\\n=========")
    with open(out, "a") as file:
        file.write(json.dumps(line) + "\\n")
print("========= ERROR SUMMARY:", errors, "errors" if check == "memcheck" else "hazards displayed (0 errors)")
"""


def stand_in(room: Path, kinds: dict[int, str] | None = None, planted: int = 1, named: bool = True) -> Path:
    path = room / "compute-sanitizer"
    path.write_text(STAND_IN.format(python=sys.executable, kinds=kinds or {}, planted=planted, named=named))
    path.chmod(0o755)
    return path


# The tool


def test_reports_are_understood() -> None:
    assert [errors_of(text) for text in (CLEAN, INVALID, RACE, REFUSED, "")] == [0, 2, 1, None, None]
    assert first_words(CLEAN) is None
    assert first_words("") is None
    assert str(first_words(INVALID)).startswith(
        "Invalid __global__ write of size 2 bytes at frames_out_fwd_kernel+0x1a0 in frames_out_kernel.py:60 by thread"
    )
    assert "and Read access at segment_attention_hopper_kernel+0x1c0" in str(first_words(RACE))
    assert str(first_words(REFUSED)).startswith("Error: Device not supported")


def test_the_tool_is_found_as_given_in_path_or_in_a_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    (tmp_path / "bin").mkdir()
    made = stand_in(tmp_path / "bin")
    for name, value in (("CUDA_PATH", tmp_path), ("PATH", tmp_path / "bin")):
        with monkeypatch.context() as patch:
            patch.setenv(name, str(value))
            assert find_tool() == find_tool(str(made)) == made
    with pytest.raises(InputError, match="tool: expected a program, 'no-such-tool' is none"):
        find_tool("no-such-tool")
    monkeypatch.setattr("bench.sanitize.tool.shutil.which", lambda name, path=None: None)
    with pytest.raises(InputError, match="no compute-sanitizer in PATH, CUDA_HOME, CUDA_PATH or /usr/local/cuda"):
        find_tool()


# What is watched


def kernels_in_the_source() -> set[str]:
    """Returns the compiled functions that are launched somewhere, as ``kernel[grid](...)``."""
    nodes = [n for p in (ROOT / "swifti2v_kernels").rglob("*.py") for n in ast.walk(ast.parse(p.read_text()))]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    compiled = {f.name for f in functions if any(".jit" in ast.unparse(d) for d in f.decorator_list)}
    calls = [node.func.value for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)]
    return compiled & {called.id for called in calls if isinstance(called, ast.Name)}


@pytest.mark.parametrize("capability", [80, 90])
def test_every_case_launches_kernels_and_the_filter_takes_them_all(capability: int) -> None:
    """Each case launches kernels with names that are watched; others would run unwatched and be called clean."""
    seen: set[str] = set()
    with compiled_for(capability, compile=False):
        for case in all_cases():
            if case.least_capability > capability:
                continue
            with launched() as names:
                case.run(CPU)
            assert names, case.name
            assert all(re.match(KERNELS, name) for name in names), (case.name, names)
            seen |= set(names)
    assert ("segment_attention_hopper_kernel" in seen) == (capability == 90)
    if capability == 90:
        assert seen == kernels_in_the_source()
    assert not any(re.match(KERNELS, name) for name in ("_ZN2at6native27unrolled_elementwise_kernelE", "ampere_gemm"))


def test_planted_faults_compile_and_are_what_they_say() -> None:
    for check, kernel in PLANTED.items():
        assert re.match(KERNELS, kernel.__name__)
        with compiled_for(90) as kernels:
            run_planted(check, CPU)
        (made,) = kernels
        assert made.error is None, made.error
        # A race needs shared memory; a write beyond the end none.
        assert (made.shared_bytes > 0) == (check == "racecheck")


def test_the_program_keeps_a_line_for_each_case_as_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("no such layout\nand more")

    broken = Case("broken", fail, lambda device: ((), {}), lambda constants: None)  # type: ignore[arg-type,return-value]
    number = next(i for i, case in enumerate(all_cases()) if case.name == "rms_norm_silu C96 bfloat16")
    cases = [all_cases()[number], broken]
    monkeypatch.setattr(program, "all_cases", lambda: cases)
    path = tmp_path / "out.jsonl"
    with compiled_for(90, compile=False):
        run_cases([1, 0], CPU, path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"case": 1, "status": "failed", "reason": "no such layout"},
        {"case": 0, "kernels": ["rms_norm_silu_fwd_kernel"]},
    ]


# Who is to blame


@pytest.mark.parametrize("jobs", [1, 3])
def test_each_case_has_one_row_and_only_what_is_to_blame_is_not_clean(jobs: int, tmp_path: Path) -> None:
    """A fault may be reported, end its process without a report, or be an exception; its neighbours run again."""
    kinds = {2: "invalid", 3: "crash", 7: "raises", 10: "idle"}
    tool, numbers = stand_in(tmp_path, kinds), list(range(1, 12))
    rows = list(watch_cases(tool, "memcheck", numbers, jobs, tmp_path))
    names = {all_cases()[n].name: n for n in numbers}
    found = {names[row["case"]]: row for row in rows}
    assert len(rows) == len(found) == len(numbers)
    assert {n for n, row in found.items() if row.get("status", "ok") != "ok"} == set(kinds)
    assert (found[2]["errors"], found[2]["reason"]) == (1, "Invalid read of case 2")
    assert (found[3]["errors"], found[3]["reason"]) == (None, "its process ended with 9 and said nothing")
    assert found[7]["reason"] == "no such layout"
    assert found[10]["reason"] == "it launched no kernel of this library"
    assert all(found[n]["errors"] == 0 and found[n]["kernels"] == "a_fwd_kernel" for n in (1, 4, 5, 6, 8, 9, 11))


def test_processes_at_once_use_ports_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ports: list[int] = []

    def command(tool: Path, check: str, port: int, rest: Any) -> list[str]:
        ports.append(port)
        return command_of(tool, check, port, rest)

    monkeypatch.setattr(run, "command_of", command)
    assert len(list(watch_cases(stand_in(tmp_path), "racecheck", [1, 2, 3], 3, tmp_path))) == 3
    assert len({port // PORTS for port in ports}) == 3


def test_a_check_that_misses_its_planted_fault_is_not_trusted(tmp_path: Path) -> None:
    assert find_planted(stand_in(tmp_path), "racecheck", tmp_path) is None
    blind = str(find_planted(stand_in(tmp_path, planted=0), "memcheck", tmp_path))
    assert blind.startswith("it did not find the fault planted for it: ")
    # An error of another kind, as of a program that cannot begin, is not what was planted.
    other = str(find_planted(stand_in(tmp_path, named=False), "memcheck", tmp_path))
    assert other == "it did not find the fault planted for it: Error at exit"


# The command


def on_a_card(room: Path, tool: Path, **options: Any) -> None:
    """Runs the command on a device that says it is a GPU."""
    chosen = {"checks": tuple(TOOLS), "cases": "scaled_linear", "tool": str(tool), "check": False, "jobs": 2}
    with session(room, **chosen | options) as found:
        found.device = SimpleNamespace(type="cuda")  # type: ignore[assignment]
        sanitize.run(found.args, found)


def test_a_run_has_a_row_for_each_case_that_the_card_can_run_and_says_what_is_not_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float8 is not for this card. What is not clean is an error where asked for, and not what is not to be trusted."""
    monkeypatch.setattr(sanitize, "capability_of", lambda device: 80)
    names = [case.name for case in all_cases() if "scaled_linear" in case.name and case.least_capability <= 80]
    number = next(i for i, case in enumerate(all_cases()) if case.name == names[0])
    with pytest.raises(InputError, match="check: 2 of 6 not clean"):
        on_a_card(tmp_path / "a", stand_in(tmp_path, {number: "crash"}), check=True)
    rows = {(row["tool"], row["case"]): row["status"] for row in rows_of(tmp_path / "a", "watched")}
    assert rows == {(tool, name): "failed" if name == names[0] else "ok" for tool in TOOLS for name in names}
    on_a_card(tmp_path / "b", stand_in(tmp_path, planted=0))
    rows = rows_of(tmp_path / "b", "watched")
    assert {row["status"] for row in rows} == {"not available"}
    assert all("planted" in row["reason"] for row in rows)
