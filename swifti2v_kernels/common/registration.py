"""The name of this copy of the package, and so the namespace that its operators are registered in.

A process may hold several copies under different names (the Hub's ``kernels`` loads each under a name of its own). Each
registers a namespace of its own, so that none takes another's place: ``swifti2v`` for ``swifti2v_kernels``.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import torch

from .target import on_device

PACKAGE = __name__.removesuffix(".common.registration")
NAMESPACE = "swifti2v" if PACKAGE == "swifti2v_kernels" else re.sub(r"\W", "_", PACKAGE)


def add_op_namespace_prefix(operator: str) -> str:
    """Returns ``swifti2v::norm_rope`` for ``norm_rope``, which :func:`torch.library.custom_op` is given.

    The Hub's kernel-builder asks for a function of this name.
    """
    return f"{NAMESPACE}::{operator}"


def registered(operator: str) -> Any:
    """Returns ``torch.ops.swifti2v.norm_rope`` for ``norm_rope``, which is registered already."""
    return getattr(getattr(torch.ops, NAMESPACE), operator)


def registered_operator(name: str, schema: str, call: type[Any]) -> Callable[[Callable[[Any], None]], Any]:
    """Returns a decorator that registers a function of a call as an operator which returns nothing.

    The function runs with the device of the first argument (of a list: of its first tensor) as the current one.

    Args:
        name: of the operator, without the namespace.
        schema: of its arguments. What is written has no default: torch up to 2.11 leaves out arguments that equal
            theirs, and then misses it. It is spelled out since torch 2.6 cannot read it from a signature.
        call: a NamedTuple, whose first fields are these arguments in their order.
    """

    def mark(function: Callable[[Any], None]) -> Any:
        def run(*args: Any) -> None:
            first = args[0][0] if isinstance(args[0], list) else args[0]
            with on_device(first.device):
                function(call(*args))

        operator = torch.library.custom_op(
            add_op_namespace_prefix(name), run, mutates_args=_written(schema), schema=f"{schema} -> ()"
        )
        operator.register_fake(lambda *args: None)
        return operator

    return mark


def kernel_operator(name: str, schema: str, call: type[Any]) -> Any:
    """Registers the operator that launches a kernel, with arguments as of :func:`registered_operator`.

    It runs ``call.check_written()`` and, unless all that is written is empty, ``launch(call)`` of the module that has
    the name of the call's own and ``_kernel``. That needs Triton, so it is imported by the first launch.
    """
    written = _written(schema)

    def run(arguments: Any) -> None:
        arguments.check_written()
        outputs = [getattr(arguments, output) for output in written]
        if any(x is not None and x.numel() for x in outputs):
            importlib.import_module(f"{call.__module__}_kernel").launch(arguments)

    return registered_operator(name, schema, call)(run)


def _written(schema: str) -> list[str]:
    return re.findall(r"!\)\S* (\w+)", schema)
