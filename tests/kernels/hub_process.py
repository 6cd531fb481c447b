"""A process that loads gathered kernels: ``python -I hub_process.py BACKEND BLOCKED CHECKOUT FOLDER ...``.

BACKEND computes the operators; BLOCKED are packages, with commas between them, that this process does not have; with
CHECKOUT, where it is not ``-``, the library itself is loaded too, from there. Prints a line of JSON for each copy.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

BACKEND, BLOCKED, CHECKOUT, *FOLDERS = sys.argv[1:]
# Python then finds no such package.
sys.modules.update(dict.fromkeys(filter(None, BLOCKED.split(","))))

import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402
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
    """Returns the error against torch's attention over concatenated keys, in float64."""
    q = torch.randn(2, 40, 3, 64)
    sources = [(torch.randn(2, length, 3, 64), torch.randn(2, length, 3, 64)) for length in (24, 17)]
    q_wide, *wide = (x.double().transpose(1, 2) for x in (q, *map(torch.cat, zip(*sources, strict=True), (1, 1))))
    assert kernel.explain(kernel.segment_attention, q, sources, backend=BACKEND).backend == BACKEND
    # With ``out``, so that the operator that finds its kernel by the copy's name is called too.
    found = kernel.segment_attention(q, sources, out=torch.empty_like(q), backend=BACKEND)
    return (found - F.scaled_dot_product_attention(q_wide, *wide).transpose(1, 2)).abs().max().item()


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
    import kernels

    copies = [load(lambda folder=folder: kernels.get_local_kernel(Path(folder))) for folder in FOLDERS]
    if CHECKOUT != "-":
        sys.path.insert(0, CHECKOUT)
        copies.append(load(lambda: importlib.import_module("swifti2v_kernels")))
    for kernel, registered in copies:
        torch.manual_seed(0)
        with Called() as called:
            error = attention_error(kernel)
        configs = importlib.import_module(f"{kernel.__name__}.common.configs")
        facts = {"name": kernel.__name__, "file": kernel.__file__, "version": kernel.__version__, "error": error}
        facts |= {"registered": registered, "called": sorted(called.namespaces - {"aten"})}
        print(json.dumps({**facts, "measurements": len(configs.load_table("attention"))}))


if __name__ == "__main__":
    main()
