"""A process that loads gathered kernels: ``python -I hub_process.py BACKEND BLOCKED CHECKOUT FOLDER ...``.

BACKEND computes the operators; BLOCKED are packages, with commas between them, that this process does not have; with
CHECKOUT, where it is not ``-``, the library itself is loaded too, from there. Prints a line of JSON for each copy.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

BACKEND, BLOCKED, CHECKOUT, *FOLDERS = sys.argv[1:]


class Without:
    """A finder in place of another, which does not find the packages that are blocked."""

    def __init__(self, finder: Any) -> None:
        self.finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Returns None for a blocked package, as for any that is not installed."""
        return None if name.split(".")[0] in BLOCKED.split(",") else self.finder.find_spec(name, path, target)


sys.meta_path[:] = map(Without, sys.meta_path)

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402


class Called(TorchDispatchMode):
    """A mode that collects the namespaces of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.namespaces: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Notes the operator's namespace and calls it."""
        self.namespaces.add(func.namespace)
        return func(*args, **(kwargs or {}))


def attention_error(kernel: ModuleType) -> float:
    """Returns the error against a softmax over concatenated keys, in float64."""
    q = torch.randn(2, 40, 3, 64)
    sources = [(torch.randn(2, length, 3, 64), torch.randn(2, length, 3, 64)) for length in (24, 17)]
    keys, values = (torch.cat(x, dim=1).double() for x in zip(*sources, strict=True))
    weights = torch.einsum("bqhd,bkhd->bhqk", q.double(), keys).mul(64**-0.5).softmax(dim=-1)
    expected = torch.einsum("bhqk,bkhd->bqhd", weights, values)
    assert kernel.explain(kernel.segment_attention, q, sources, backend=BACKEND).backend == BACKEND
    return (kernel.segment_attention(q, sources, backend=BACKEND) - expected).abs().max().item()


def norm_error(kernel: ModuleType) -> float:
    """Returns the error in float64 of a modulated LayerNorm whose three blocks of tokens have two modulation rows."""
    x, (shift, scale) = torch.randn(2, 12, 96), torch.randn(2, 2, 2, 96)
    rows = torch.tensor([0, 1, 1])
    wide = x.double()
    wide = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    tokens = rows.repeat_interleave(4)
    expected = wide * (1 + scale[:, tokens]) + shift[:, tokens]
    found = kernel.norm_modulate(x, shift, scale, block_map=rows.int(), backend=BACKEND)
    return (found - expected).abs().max().item()


def namespaces() -> set[str]:
    """Returns the namespaces of all copies that have registered their operators."""
    names = (name.split("::") for name in torch._C._dispatch_get_all_op_names())
    return {name[0] for name in names if name[1].split(".")[0] == "segment_attention"}


def load(loader: Callable[[], ModuleType]) -> tuple[ModuleType, list[str]]:
    """Loads a copy and returns it with the namespaces that came with it."""
    before = namespaces()
    kernel = loader()
    return kernel, sorted(namespaces() - before)


def main() -> None:
    """Loads all copies before it uses any of them."""
    for name in filter(None, BLOCKED.split(",")):
        assert importlib.util.find_spec(name) is None, f"{name} can be imported"
    import kernels

    copies = [load(lambda folder=folder: kernels.get_local_kernel(Path(folder))) for folder in FOLDERS]
    if CHECKOUT != "-":
        sys.path.insert(0, CHECKOUT)
        copies.append(load(lambda: importlib.import_module("swifti2v_kernels")))
    assert ("swifti2v_kernels" in sys.modules) == (CHECKOUT != "-")
    for kernel, registered in copies:
        torch.manual_seed(0)
        with Called() as called:
            errors = [attention_error(kernel), norm_error(kernel)]
        tables = importlib.import_module(f"{kernel.__name__}.common.tables")
        facts = {"name": kernel.__name__, "file": kernel.__file__, "version": kernel.__version__, "errors": errors}
        facts |= {"registered": registered, "called": sorted(called.namespaces - {"aten"})}
        print(json.dumps({**facts, "measurements": len(tables.load_table("attention"))}))


if __name__ == "__main__":
    main()
