"""The errors that a user can put right: a wrong size, an unreadable file, weights that do not fit, lack of memory."""

from __future__ import annotations

import importlib
from types import ModuleType


class InputError(ValueError):
    """An error of the input: the message names what was given and what is allowed. Commands exit with code 2."""


class NoMemoryError(Exception):
    """A lack of memory; the message says what held it. Commands print it and exit with code 1."""


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


def printable(text: str) -> str:
    """Returns the text with every character that a terminal would obey, line ends aside, as its escape.

    Names of tensors, of devices and of files come from whoever wrote them: ``ESC [ 2 J`` in one would clear the screen.
    """
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def one_line(name: str) -> str:
    """Returns a name that someone else chose as a part of a line: :func:`printable`, line ends too."""
    return printable(name).replace("\n", "\\n")
