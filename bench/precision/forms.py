"""The forms in which a linear layer is compared, and the distance of a result from the exact one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.errors import InputError
from model.streaming.placement import Placement
from swifti2v_kernels import dequantize_rows, quantize_rows, scaled_linear

#: The dtype of activations and of plain matrix multiplications.
COMPUTE = torch.bfloat16


@dataclass(frozen=True)
class Form:
    """A form in which matrices are written and multiplied; ``placement`` makes a whole DiT of it."""

    name: str
    placement: Placement

    @property
    def eight_bits(self) -> torch.dtype | None:
        """The 8-bit dtype of the weights; None where they are bfloat16."""
        return {"float8": torch.float8_e4m3fn, "int8": torch.int8}.get(self.placement.quantize)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Returns ``x @ weight^T + bias`` as a DiT of this form computes it.

        Args:
            x: ``[tokens, K]`` bfloat16.
            weight: ``[N, K]`` float32, not rounded yet.
            bias: ``[N]`` float32.

        Returns:
            ``[tokens, N]`` bfloat16.
        """
        bias = bias.to(COMPUTE)
        if self.eight_bits is None:
            return F.linear(x, weight.to(COMPUTE), bias)
        rows = quantize_rows(weight, self.eight_bits)
        if self.placement.matmul == "plain":
            return F.linear(x, dequantize_rows(*rows, dtype=COMPUTE), bias)
        return scaled_linear(quantize_rows(x, self.eight_bits), rows, bias, dtype=COMPUTE)


BASELINE = Form("bfloat16", Placement())
FORMS = (
    BASELINE,
    Form("int8", Placement(quantize="int8")),
    Form("float8", Placement(quantize="float8")),
    Form("int8-matmul", Placement(quantize="int8", matmul="8bit")),
    Form("float8-matmul", Placement(quantize="float8", matmul="8bit")),
)


def chosen_forms(text: str | None) -> tuple[Form, ...]:
    """Returns the forms that a text names, in the order of :data:`FORMS`, or all forms if there is no text.

    The baseline is always among them.

    Raises:
        InputError: no form has one of the names.
    """
    known = [form.name for form in FORMS]
    names = known if text is None else [name.strip() for name in text.split(",")]
    wrong = [name for name in names if name not in known]
    if wrong:
        raise InputError(f"forms: expected some of {', '.join(known)}, got {', '.join(map(repr, wrong))}")
    return tuple(form for form in FORMS if form is BASELINE or form.name in names)


def errors_of(found: Tensor, expected: Tensor) -> dict[str, Any]:
    """Returns ``error``, the relative L2, and ``largest_error`` over the root mean square of ``expected``."""
    difference, expected = found.double() - expected.double(), expected.double()
    error = (difference.norm() / expected.norm()).item()
    if not math.isfinite(error):
        return {"status": "wrong", "reason": "the result is not finite"}
    return {"error": error, "largest_error": (difference.abs().max() / expected.square().mean().sqrt()).item()}


def add_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Gives each row its error over that of the baseline's row, which is among them."""
    base = next(row for row in rows if row["form"] == BASELINE.name).get("error")
    for row in rows:
        if base and "error" in row:
            row["error_ratio"] = row["error"] / base
