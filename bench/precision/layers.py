"""One linear layer in every form, compared with float64 of its weights before they are rounded."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.precision.forms import COMPUTE, Form, compared
from bench.precision.weights import COLUMN_SPREAD, MODULATION, Drawing, Weights

IDENTITY = ("model", "weights", "layer", "form")
METRICS = ("error", "largest_error", "error_ratio")
#: A linear layer of each shape; the four projections of attention have one shape, as those of text have.
LAYERS = {"attention": "attn1.to_q", "feed-forward up": "ffn.net.0.proj", "feed-forward down": "ffn.net.2"}
NOTE = (
    "Each form is compared with float64 of the weights before rounding, on the same bfloat16 activations, with bias and"
    " results in bfloat16. Error: relative L2; largest error: over the result's root mean square; x bf16: over"
    " bfloat16's error."
)


def layer_rows(weights: Weights, model: str, forms: Sequence[Form], tokens: int) -> Iterator[dict[str, Any]]:
    """Yields the rows of the table ``layers``, one for every linear layer in every form, the baseline included.

    The input of the feed-forward's second layer is the output of its first one, through its GELU.
    """
    linears = dict(zip(LAYERS, weights.linears(list(LAYERS.values())), strict=True))
    up, _ = linears["feed-forward up"]
    x = activations(weights.kind, tokens, up.shape[1]).to(up.device, COMPUTE)
    hidden = F.gelu(F.linear(x.float(), *linears["feed-forward up"]), approximate="tanh").to(COMPUTE)
    for layer, (weight, bias) in linears.items():
        given = hidden if layer == "feed-forward down" else x
        base = {"model": model, "weights": weights.kind, "tokens": tokens}
        base["layer"] = f"{layer} {weight.shape[0]}x{weight.shape[1]}"
        expected = functools.partial(F.linear, *(t.double() for t in (given, weight, bias)))
        made = {form.name: functools.partial(form.linear, given, weight, bias) for form in forms}
        yield from compared(base, "float64", expected, made)


def activations(kind: str, tokens: int, channels: int) -> Tensor:
    """Returns activations as a norm with modulation gives them, ``[tokens, channels]`` float32 on the CPU.

    For random weights they are standard normal. Else channels differ in scale and mean, and one in 200 is an outlier.
    """
    draw = Drawing("0 activations", torch.device("cpu"))
    x = draw.normal(tokens, channels)
    if kind == "random":
        return x
    factors = draw.spread(COLUMN_SPREAD, channels) * draw.outliers(channels)
    return x.mul_(factors).add_(MODULATION * draw.normal(channels))
