"""Every command ends at an interruption, also at one that Python itself would lose, and at an unknown backend."""

from __future__ import annotations

import importlib
import signal
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from model.cli.options import run_command

pytestmark = pytest.mark.usefixtures("interruptible")


class Finalizer:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


class Plain:
    pass


def deleted() -> None:
    Finalizer()


def finalized() -> None:
    weakref.finalize(Plain(), signal.raise_signal, signal.SIGINT)


def called_back() -> None:
    gone = Plain()
    reference = weakref.ref(gone, lambda reference: signal.raise_signal(signal.SIGINT))
    del gone
    assert reference() is None


def lasts(seconds: float) -> bool:
    """Returns whether this long work comes to its end."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.001)
    return True


@pytest.mark.parametrize("meets", [deleted, finalized, called_back])
def test_an_interruption_that_meets_a_finalizer_ends_the_command(
    meets: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """An interruption that Python prints as ignored ends the command; else the work would come to its end."""
    ends = []

    def command() -> None:
        meets()
        ends.append(lasts(60))

    hook = sys.unraisablehook
    assert (run_command(command), ends) == (130, [])
    assert capsys.readouterr().err == "interrupted\n"
    assert sys.unraisablehook is hook


def test_an_interruption_is_raised_again_as_often_as_it_is_lost() -> None:
    ends = []

    def command() -> None:
        deleted()
        weakref.finalize(Plain(), lasts, 60)  # meets the second one, at once and for as long as it may
        ends.append("the second")
        ends.append(lasts(60))

    start = time.monotonic()
    assert (run_command(command), ends) == (130, ["the second"])
    assert time.monotonic() - start < 40


def test_what_else_a_finalizer_raises_is_python_s_to_report() -> None:
    reported: list[object] = []

    class Failing:
        def __del__(self) -> None:
            raise ValueError("of its own")

    hook = sys.unraisablehook
    sys.unraisablehook = lambda unraisable: reported.append(unraisable.exc_value)
    try:
        assert run_command(lambda: Failing() and None) == 0
    finally:
        sys.unraisablehook = hook
    assert [str(value) for value in reported] == ["of its own"]


@pytest.mark.parametrize("command", ["model.generate", "model.plan", "model.inspect", "bench.__main__"])
def test_a_backend_of_another_word_is_one_line_before_any_work(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("SWIFTI2V_BACKEND", "cuda")
    monkeypatch.chdir(tmp_path)
    arguments = {"model.inspect": ["file"], "bench.__main__": ["cost"]}.get(command, [])
    assert importlib.import_module(command).main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err == "error: SWIFTI2V_BACKEND: expected one of auto, torch, triton, got 'cuda'\n"
    assert printed.out == ""
    assert not list(tmp_path.iterdir())
