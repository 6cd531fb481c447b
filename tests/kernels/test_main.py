"""``python -m swifti2v_kernels`` says what a bug report needs, and nothing that is not so."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from swifti2v_kernels import __version__, pretend_gpu
from swifti2v_kernels.__main__ import KERNELS, describe_device, describe_kernels, main, version
from swifti2v_kernels.common.case import all_cases

CPU = torch.device("cpu")
CASES = Counter(case.operator.__name__ for case in all_cases())


def by_operator(lines: list[str]) -> dict[str, list[str]]:
    """Returns what is said of each operator."""
    found: dict[str, list[str]] = {}
    for line in lines:
        name, said = line.split(maxsplit=1)
        found.setdefault(name, []).append(said)
    return found


def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[str]]:
    """Returns what the command prints on a machine without a GPU: the text about it, and a line for each choice."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    head, kernels = out.split(f"{KERNELS}\n")
    return head, kernels.splitlines()


def test_without_a_gpu_every_operator_says_why_no_kernel_serves_it(capsys, monkeypatch) -> None:
    head, kernels = printed(capsys, monkeypatch)
    values = dict(line.split(":", 1) for line in head.splitlines())
    assert values["swifti2v_kernels"].split(",")[0].strip() == __version__
    assert values["torch"].strip() == version("torch") == torch.__version__
    assert version("no_such_package") == "cannot be imported: No module named 'no_such_package'"
    assert values["device"].strip().startswith("cpu: ")
    said = by_operator(kernels)
    assert set(said) == set(CASES)
    reason = "(kernels need an NVIDIA GPU or TRITON_INTERPRET=1, got cpu)"
    assert all("torch: reference" in line and line.endswith(reason) for lines in said.values() for line in lines)


@pytest.mark.parametrize("capability", [86, 90])
def test_on_a_gpu_every_choice_is_counted(capability: int) -> None:
    """Every call of a GPU of this capability is counted by its choice; nothing is launched."""
    with pretend_gpu(capability):
        said = by_operator(describe_kernels(CPU))
    assert {name: sum(int(line.split()[0]) for line in lines) for name, lines in said.items()} == CASES
    attention = "\n".join(said["segment_attention"])
    assert ("triton: hopper (warp-specialised for capability 9.0)" in attention) == (capability == 90)
    assert ("the Hopper kernel does not take it: " in attention) == (capability == 90)
    assert "triton: portable" in attention
    assert ("float8" in "\n".join(said["norm_modulate"])) == (capability == 86)


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=140 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert describe_device(torch.device("cuda:1")) == "cuda:1: NVIDIA H200, compute capability 9.0, 150.3 GB"


def test_an_argument_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--device", "cuda"])
    assert (done.value.code, *capsys.readouterr()) == (2, "", "error: expected no arguments, got '--device'\n")


def test_what_fails_is_in_the_report(capsys, monkeypatch) -> None:
    monkeypatch.setenv("SWIFTI2V_BACKEND", "abacus")
    head, kernels = printed(capsys, monkeypatch)
    assert "SWIFTI2V_BACKEND=abacus" in head
    failed = "calls: failed: ValueError: SWIFTI2V_BACKEND: expected one of auto, torch, triton, got 'abacus'"
    assert len(kernels) == len(CASES)
    assert all(line.endswith(failed) for line in kernels)
