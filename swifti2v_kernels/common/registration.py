"""The name of this copy of the package, and so the namespace that its operators are registered in.

A process may hold several copies under different names (the Hub's ``kernels`` loads each under a name of its own). Each
registers a namespace of its own, so that none takes another's place: ``swifti2v`` for ``swifti2v_kernels``.
"""

from __future__ import annotations

import re
from typing import Any

import torch

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
