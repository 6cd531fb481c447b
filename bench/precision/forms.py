"""The forms in which a linear layer is compared, and the distance of a result from the exact one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.records.outcome import FAILURES, failure
from model.streaming.placement import Placement
from swifti2v_kernels import dequantize_rows, quantize_rows, scaled_linear

#: The dtype of activations and of plain matrix multiplications.
COMPUTE = torch.bfloat16


@dataclass(frozen=True)
class Form:
    """A form in which matrices are written and multiplied; ``placement`` makes a whole DiT of it."""

    name: str
    placement: Placement

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Returns ``x @ weight^T + bias`` as a DiT of this form computes it.

        Args:
            x: ``[tokens, K]`` bfloat16.
            weight: ``[N, K]`` float32, not rounded yet.
            bias: ``[N]`` float32.

        Returns:
            ``[tokens, N]`` bfloat16.
        """
        bias, eight_bits = bias.to(COMPUTE), {"float8": torch.float8_e4m3fn, "int8": torch.int8}
        if self.placement.quantize not in eight_bits:
            return F.linear(x, weight.to(COMPUTE), bias)
        dtype = eight_bits[self.placement.quantize]
        rows = quantize_rows(weight, dtype)
        if self.placement.matmul == "plain":
            return F.linear(x, dequantize_rows(*rows, dtype=COMPUTE), bias)
        return scaled_linear(quantize_rows(x, dtype), rows, bias, dtype=COMPUTE)


BASELINE = "bfloat16"
#: By name; the baseline of ``error_ratio`` first.
FORMS = {
    form.name: form
    for form in (
        Form(BASELINE, Placement()),
        Form("int8", Placement(quantize="int8")),
        Form("float8", Placement(quantize="float8")),
        Form("int8-matmul", Placement(quantize="int8", matmul="8bit")),
        Form("float8-matmul", Placement(quantize="float8", matmul="8bit")),
    )
}


def compared(
    base: Mapping[str, Any], exact: str, expected: Callable[[], Tensor], forms: Mapping[str, Callable[[], Tensor]]
) -> Iterator[dict[str, Any]]:
    """Yields a row for every form: its distance from the expected result, also over that of the baseline.

    What fails is a row; without the expected result, whose form is called ``exact``, all have failed.

    Args:
        base: the fields that all rows have.
        exact: the name of the form of the expected result.
        expected: makes it.
        forms: by name what makes the results, the baseline first.
    """
    try:
        reference = expected()
    except FAILURES as error:
        found = failure(error)
        for name in forms:
            yield {**base, "form": name, **found, "reason": f"{exact}: {found['reason']}"}
        return
    baseline = None
    for name, make in forms.items():
        row = {**base, "form": name}
        try:
            row |= errors_of(make(), reference)
        except ValueError as error:  # a model's own check of its results
            row |= {"status": "wrong", "reason": str(error)}
        except FAILURES as error:
            row |= failure(error)
        if name == BASELINE:
            baseline = row.get("error")
        if baseline and "error" in row:
            row["error_ratio"] = row["error"] / baseline
        yield row


def errors_of(found: Tensor, expected: Tensor) -> dict[str, Any]:
    """Returns ``error``, the relative L2, and ``largest_error`` over the root mean square of ``expected``."""
    difference, expected = found.double() - expected.double(), expected.double()
    error = (difference.norm() / expected.norm()).item()
    if not math.isfinite(error):
        return {"status": "wrong", "reason": "the result is not finite"}
    return {"error": error, "largest_error": (difference.abs().max() / expected.square().mean().sqrt()).item()}
