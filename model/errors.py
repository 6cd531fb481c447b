"""The error of everything that the user can put right: a wrong size, an unreadable file, weights that do not fit."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType


class InputError(ValueError):
    """Bad input: the message names what was given and what is allowed. Commands print it and exit with code 2."""


def require(module: str, extra: str) -> ModuleType:
    """Imports an optional package, or says which pip command installs it.

    Args:
        module: dotted module name, for example ``"av"``.
        extra: the extra of this project that contains it, for example ``"generate"``.

    Raises:
        InputError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        if error.name is None or error.name.split(".")[0] != package:
            raise
        raise InputError(f"{package} is not installed; run: pip install -e '.[{extra}]'") from error


def run_command(command: Callable[[], None]) -> int:
    """Runs a command's body and returns its exit code: 0, 2 with one line for bad input, 130 if interrupted.

    Any other exception is a defect of this project or of the machine and keeps its traceback.
    """
    try:
        command()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
