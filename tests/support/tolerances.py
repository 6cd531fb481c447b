"""Every tolerance of the test suite, with its reason. Relative errors are L2 norms: ``|a - b| / |b|``."""

from __future__ import annotations

from torch import Tensor

#: float32 against an independent float32 implementation with another order of sums: 1e-7 to 1e-6 is usual for these
#: depths, and the project promises 1e-5.
PARITY = 1e-5
#: float64 against float64: what is left is rounding, so any mistake in the algorithm shows.
EXACT = 1e-12
#: An operator against the same formula in float64; the error is the rounding of the result.
OPERATOR = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}
#: A kernel in its dtype against float64, relative L2. float32: order of sums and a base-2 exponential. 16 bits: p is
#: rounded once and the output once, each with a relative error of at most 2**-11 (float16) or 2**-8 (bfloat16).
KERNEL = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 6e-3}
#: Its log-sum-exp, absolute: that is float32 throughout, from products of exact 16-bit inputs.
LSE = {"float32": 2e-5, "float16": 2e-5, "bfloat16": 2e-5}
#: The same on hardware, whose base-2 exponential is approximate and whose sums run in another order.
HARDWARE_LSE = 1e-3
#: The DiT on the kernels against diffusers in float32: as PARITY, with base-2 exponentials and sums in other orders.
KERNEL_PARITY = 1e-4
#: A whole bfloat16 model against its float32 weights: about 8e-3 a layer, random weights, two layers.
BFLOAT16_MODEL = 3e-2
#: float32 on CPU and CUDA: only the order of sums differs, over two steps of a two-layer model.
ACROSS_DEVICES = 1e-4
#: A lossy H.264 file against the frames written (mean absolute difference of smooth 8-bit pixels at crf 16).
VIDEO_PIXELS = 3.0


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Returns ``|actual - expected| / |expected|`` in float64."""
    assert actual.shape == expected.shape, (tuple(actual.shape), tuple(expected.shape))
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm()).item()
