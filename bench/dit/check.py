"""A check of our kernels on shrunken shapes, interpreted, against float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bench.dit.layer import LAYER_PROVIDERS, TIMESTEPS, exact_rows, layer_inputs
from bench.dit.ops import Op, relative_error
from bench.dit.providers import providers
from bench.dit.shapes import Shape
from bench.records.write import Table
from model.errors import require


def check_reduced(shapes: Sequence[Shape], ops: Sequence[Op], layer: bool, table: Table) -> list[str]:
    """Adds a row for each operator, shape and dtype; returns which are wrong."""
    wrong, cpu = [], torch.device("cpu")
    kinds = [
        (dtype, limit, shape) for dtype, limit in ((torch.float32, 1e-5), (torch.float16, 2e-3)) for shape in shapes
    ]
    for dtype, limit, shape in require("tqdm", "bench").tqdm(kinds, leave=False, dynamic_ncols=True, disable=None):
        small, errors = shape.reduced(), {}
        for op in ops:
            tokens = op.rows(small, cpu)
            expected = op.exact(op.make(small, cpu, dtype), tokens)
            for provider in (p for p in providers(op) if p.ours):
                inputs = op.make(small, cpu, dtype)
                found = op.sample(inputs, provider.prepare(inputs)(), tokens)
                name = op.name + provider.name.removeprefix("swifti2v")
                errors[name] = relative_error(found, expected)
        if layer:
            errors["layer"] = _layer_error(small, dtype)
        for name, error in errors.items():
            row = {"op": name, "shape": shape.name, "dtype": str(dtype).removeprefix("torch."), "error": error}
            row["limit"] = limit
            if not error < limit:
                row |= {"status": "wrong", "reason": f"more than {limit:.0e}"}
                wrong.append(f"{name} ({shape.name}, {row['dtype']})")
            table.add(row)
    return wrong


def _layer_error(shape: Shape, dtype: torch.dtype) -> float:
    """Returns the error of our layer; that it is small in float32 checks the exact layer too."""
    with torch.no_grad():
        inputs = layer_inputs(shape, torch.device("cpu"), dtype, TIMESTEPS[1])
        expected = exact_rows(inputs, torch.arange(shape.tokens))
        runner = next(p for p in LAYER_PROVIDERS if p.ours).prepare(inputs)
        runner.load()
        x, n = runner.step()
        before = inputs.x.double()
        return relative_error((x.double() - before, n.double()), (expected[0] - before, expected[1]))
