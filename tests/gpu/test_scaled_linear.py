"""The 8-bit linear layer on hardware: every compiled case, all layers of real DiTs, torch's own products, graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.operators.check import check_case
from swifti2v_kernels import QuantizedRows, explain, quantize_rows, scaled_linear
from tests.support.operator_cases import cases_of
from tests.support.tolerances import KERNEL, relative_error

pytestmark = pytest.mark.gpu
KINDS = [torch.float8_e4m3fn, torch.int8]
#: Channels and columns of the layers of Wan 1.3B, 5B and 14B.
LAYERS = [
    *((1536, 1536), (1536, 8960), (8960, 1536)),
    *((3072, 3072), (3072, 14336), (14336, 3072)),
    *((5120, 5120), (5120, 13824), (13824, 5120)),
]
#: float32 results. Tensor cores that keep 14 bits of a sum of float8 are off by 1.2e-4 when it is moved to float32
#: every 128 channels, and by 1e-3 (1,536 channels) to 1.1e-2 (13,824) if it never is. int8 is exact up to the scales.
SUMS = {torch.float8_e4m3fn: 3e-4, torch.int8: KERNEL["float32"]}


@pytest.fixture(autouse=True)
def _needs_float8(request: pytest.FixtureRequest) -> None:
    """Skips float8 on older GPUs, which take the reference; the other files test that."""
    kind = request.node.callspec.params.get("kind") if hasattr(request.node, "callspec") else None
    if kind == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")


def rows(count: int, channels: int, kind: torch.dtype, gap: int = 0) -> QuantizedRows:
    """Returns rows of different sizes, a part of a buffer whose other bytes are NaN, or -1."""
    made = quantize_rows(torch.randn(count, channels, device="cuda") * torch.rand(count, 1, device="cuda"), kind)
    buffer = torch.full((count, channels + gap), -1, dtype=torch.int8, device="cuda").view(kind)
    buffer[:, :channels].copy_(made.values)
    return made._replace(values=buffer[:, :channels])


def exact(x: QuantizedRows, weight: QuantizedRows, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """Returns the result in float64, with the scales in the operands."""
    wide = [r.values.double() * r.scales.double().unsqueeze(-1) for r in (x, weight)]
    y = F.linear(*wide, None if bias is None else bias.double())
    return y if activation is None else F.gelu(y, approximate="tanh")


def sample(x: QuantizedRows) -> tuple[QuantizedRows, Tensor]:
    """Returns at most 64 rows, the first and the last among them, and which they are."""
    chosen = torch.linspace(0, len(x.scales) - 1, min(64, len(x.scales)), device="cuda").long()
    return QuantizedRows(*(part.view(torch.int8)[chosen].view(part.dtype) if part.itemsize == 1 else part[chosen]
                           for part in x)), chosen  # fmt: skip


@pytest.mark.parametrize("case", cases_of(scaled_linear), ids=lambda case: case.name)
def test_every_case_of_the_compile_report_runs(case: Any) -> None:
    major, minor = torch.cuda.get_device_capability()
    if case.least_capability > 10 * major + minor:
        pytest.skip(f"needs compute capability {case.least_capability / 10}")
    row = check_case(case, torch.device("cuda"))
    assert row["status"] == "ok", row


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("channels", "columns"), LAYERS)
def test_layers_of_real_models(channels: int, columns: int, kind: torch.dtype) -> None:
    """Any number of tokens gives full tiles and ragged ones; what float8 loses in its sums shows in float32."""
    weight, bias = rows(columns, channels, kind), torch.randn(columns, device="cuda")
    for tokens in (1, 77, 2816, 2900):
        x = rows(tokens, channels, kind, gap=32)
        assert explain(scaled_linear, x, weight, bias).implementation == "fused matmul"
        out = torch.full((tokens, columns), float("nan"), device="cuda")
        scaled_linear(x, weight, bias, dtype=torch.float32, out=out)
        assert torch.isfinite(out).all()
        part, chosen = sample(x)
        assert relative_error(out[chosen], exact(part, weight, bias)) < SUMS[kind]
        for dtype in (torch.bfloat16, torch.float16):
            y = scaled_linear(x, weight, bias.to(dtype), activation="gelu_tanh", dtype=dtype)
            expected = exact(part, weight, bias.to(dtype), "gelu_tanh")
            assert relative_error(y[chosen], expected) < KERNEL[str(dtype).removeprefix("torch.")]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("tokens", "channels", "columns"), [(3, 16, 16), (130, 80, 272), (65, 1552, 48)])
def test_sizes_that_fill_no_tile(tokens: int, channels: int, columns: int, kind: torch.dtype) -> None:
    """Nothing is written beside the result where sizes fill no tile."""
    x, weight, bias = rows(tokens, channels, kind, gap=16), rows(columns, channels, kind), None
    buffer = torch.full((tokens + 2, columns), float("nan"), device="cuda", dtype=torch.bfloat16)
    scaled_linear(x, weight, bias, out=buffer[1:-1])
    assert relative_error(buffer[1:-1], exact(x, weight)) < KERNEL["bfloat16"]
    assert buffer[[0, -1]].isnan().all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
def test_against_torchs_own_products(kind: torch.dtype, activation: str | None) -> None:
    """torch's matmuls agree where the card has them, in their layout, into ``out`` and with either kind of bias."""
    x, weight = rows(2816, 1536, kind), rows(8960, 1536, kind)
    for dtype in (torch.bfloat16, torch.float32):
        bias = torch.randn(8960, device="cuda", dtype=dtype)
        options: dict[str, Any] = {"activation": activation, "out": torch.empty(2816, 8960, device="cuda").bfloat16()}
        choice = explain(scaled_linear, x, weight, bias, backend="torch", **options)
        own = "torch._int_mm" if kind == torch.int8 else "torch._scaled_mm"
        if kind == torch.int8 or torch.cuda.get_device_capability() == (9, 0):
            assert choice.implementation == own
        theirs = scaled_linear(x, weight, bias, backend="torch", **options)
        assert theirs is options["out"]
        ours = scaled_linear(x, weight, bias, activation=activation)
        # Torch's rounds before a bias of another dtype, and again before GELU.
        part, chosen = sample(x)
        expected = exact(part, weight, bias, activation)
        assert relative_error(theirs[chosen], expected) < 2 * KERNEL["bfloat16"]
        assert relative_error(ours, theirs) < 3 * KERNEL["bfloat16"]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_one_graph_takes_the_numbers_of_the_moment(kind: torch.dtype) -> None:
    """Nothing is allocated beside ``out``, and nothing waits for the device."""
    x, weight, bias = rows(300, 1536, kind), rows(1536, 1536, kind), torch.randn(1536, device="cuda")
    out = torch.empty(300, 1536, device="cuda", dtype=torch.bfloat16)

    def run() -> None:
        scaled_linear(x, weight, bias, activation="gelu_tanh", out=out)

    run()  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    run()
    torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() == before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(2):
        for part, new in zip(x, rows(300, 1536, kind), strict=True):
            part.copy_(new)
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert relative_error(out, exact(x, weight, bias, "gelu_tanh")) < KERNEL["bfloat16"]


def test_offsets_beyond_two_to_the_31_elements() -> None:
    """The last tokens of a feed-forward's hidden ones, and of its results, may lie beyond 2**31 elements."""
    tokens, channels, columns = 160_000, 13_824, 16
    values = torch.zeros(tokens, channels, device="cuda", dtype=torch.int8)  # 2.2e9 bytes
    x = QuantizedRows(values, torch.rand(tokens, device="cuda"))
    weight = rows(columns, channels, torch.int8)
    values[-70:].random_(-127, 128)
    y = scaled_linear(x, weight, dtype=torch.float32)
    last = QuantizedRows(*(part[-70:] for part in x))
    assert relative_error(y[-70:], exact(last, weight)) < KERNEL["float32"]
    assert not y[:-70].any()
    del x, values, y
    x, weight = rows(160_000, 16, torch.int8), rows(13_824, 16, torch.int8)
    y = scaled_linear(x, weight)  # 2.2e9 elements
    last = QuantizedRows(*(part[-70:] for part in x))
    assert relative_error(y[-70:], exact(last, weight)) < KERNEL["bfloat16"]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_compiled_functions_equal_eager_ones(kind: torch.dtype) -> None:
    weight, bias = rows(1536, 1536, kind), torch.randn(1536, device="cuda")

    def foreign(x: Tensor) -> Tensor:
        return scaled_linear(quantize_rows(2 * x, kind), weight, bias, activation="gelu_tanh") + 1

    x = torch.randn(2, 100, 1536, device="cuda").bfloat16()
    assert relative_error(torch.compile(foreign, fullgraph=True)(x), foreign(x)) < KERNEL["bfloat16"]
