"""One linear layer in every form, compared with float64 of its weights before they are rounded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.precision.forms import COMPUTE, Form, add_ratios, errors_of
from bench.precision.weights import COLUMN_SPREAD, MODULATION, Drawing, Weights
from bench.records.outcome import FAILURES, failure

IDENTITY = ("model", "weights", "layer", "form")
METRICS = ("error", "largest_error", "error_ratio")
#: A linear layer of each shape; the four projections of attention have one shape, as those of text have.
LAYERS = {"attention": "attn1.to_q", "feed-forward up": "ffn.net.0.proj", "feed-forward down": "ffn.net.2"}
NOTE = (
    "Each form is compared with float64 of the weights before rounding, on the same bfloat16 activations, with bias and"
    " results in bfloat16. Error: relative L2; largest error: over the result's root mean square; x bf16: over"
    " bfloat16's error."
)


def layer_rows(weights: Weights, model: str, forms: Sequence[Form], tokens: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yields the rows of the table ``layers``, one for every linear layer in every form, the baseline included.

    The input of the feed-forward's second layer is the output of its first one, through its GELU.
    """
    linears = dict(zip(LAYERS, weights.linears(list(LAYERS.values())), strict=True))
    up, _ = linears["feed-forward up"]
    x = activations(weights.kind, tokens, up.shape[1], seed).to(up.device, COMPUTE)
    hidden = F.gelu(F.linear(x.float(), *linears["feed-forward up"]), approximate="tanh").to(COMPUTE)
    for layer, (weight, bias) in linears.items():
        given = hidden if layer == "feed-forward down" else x
        expected = F.linear(*(t.double() for t in (given, weight, bias)))
        rows = []
        for form in forms:
            row: dict[str, Any] = {"model": model, "weights": weights.kind, "form": form.name, "tokens": tokens}
            row["layer"] = f"{layer} {weight.shape[0]}x{weight.shape[1]}"
            try:
                rows.append(row | errors_of(form.linear(given, weight, bias), expected))
            except FAILURES as error:
                rows.append(row | failure(error))
        add_ratios(rows)
        yield from rows


def activations(kind: str, tokens: int, channels: int, seed: int) -> Tensor:
    """Returns activations as a norm with modulation gives them, ``[tokens, channels]`` float32 on the CPU.

    For random weights they are standard normal. Else channels differ in scale and mean, and one in 200 is an outlier.
    """
    draw = Drawing(f"{seed} activations", torch.device("cpu"))
    x = draw.normal(tokens, channels)
    if kind == "random":
        return x
    factors = draw.spread(COLUMN_SPREAD, channels) * draw.outliers(channels)
    return x.mul_(factors).add_(MODULATION * draw.normal(channels))
