"""The name of this copy of the package, and so the namespace that its operators are registered in.

A process may hold several copies under different names (the Hub's ``kernels`` loads each under a name of its own). Each
registers a namespace of its own, so that none takes another's place: ``swifti2v`` for ``swifti2v_kernels``.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from .target import on_device

PACKAGE = __name__.removesuffix(".common.registration")
NAMESPACE = "swifti2v" if PACKAGE == "swifti2v_kernels" else re.sub(r"\W", "_", PACKAGE)


def add_op_namespace_prefix(operator: str) -> str:
    """Returns ``swifti2v::norm_rope`` for ``norm_rope``, which :func:`torch.library.custom_op` is given.

    The Hub's kernel-builder asks for a function of this name.
    """
    return f"{NAMESPACE}::{operator}"


def kernel_operator(name: str, schema: str, call: type[Any], module: str | None = None) -> Any:
    """Registers the operator that launches a kernel, and returns it; the operator itself returns nothing.

    With the device of its first argument (of a list: of its first tensor) as the current one, it runs
    ``call.check_written()`` and, unless all that is written is empty, ``launch(call)`` of the kernel's module. That
    needs Triton, so it is imported by the first launch. A method ``flops()`` of the call counts its operations for
    ``torch.utils.flop_counter``, from shapes in place of tensors.

    Args:
        name: of the operator, without the namespace.
        schema: of its arguments. What is written has no default: torch up to 2.11 leaves out arguments that equal
            theirs, and then misses it. It is spelled out since torch 2.6 cannot read it from a signature.
        call: a NamedTuple, whose first fields are these arguments in their order.
        module: the kernel's; by default it has the name of the call's own and ``_kernel``.
    """
    written = re.findall(r"!\)\S* (\w+)", schema)

    def run(*args: Any) -> None:
        arguments = call(*args)
        first = args[0][0] if isinstance(args[0], list) else args[0]
        with on_device(first.device):
            arguments.check_written()
            outputs = [getattr(arguments, output) for output in written]
            tensors = [x for y in outputs for x in (y if isinstance(y, list) else [y])]
            if any(x is not None and x.numel() for x in tensors):
                importlib.import_module(module or f"{call.__module__}_kernel").launch(arguments)

    operator = torch.library.custom_op(
        add_op_namespace_prefix(name), run, mutates_args=written, schema=f"{schema} -> ()"
    )
    operator.register_fake(lambda *args: None)
    if hasattr(call, "flops"):
        registered = getattr(getattr(torch.ops, NAMESPACE), name)
        register_flop_formula(registered)(lambda *shapes, **kwargs: call(*shapes).flops())
    return operator
