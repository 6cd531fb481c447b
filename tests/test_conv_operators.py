"""The contract of a video autoencoder's operators, on their torch path: numbers, gradients, graphs, choices, errors.

Within ``pretend_gpu`` the CPU takes the path that cuDNN takes on a GPU, so that its slices and paddings are compared
too; there only the products are another library's.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from swifti2v_kernels import (
    causal_conv3d,
    explain,
    fold_upsample_weight,
    frames_out,
    pretend_gpu,
    rms_norm_silu,
    upsample_conv2d,
)
from swifti2v_kernels.causal_conv3d import cost as conv_cost
from swifti2v_kernels.common import conv_torch, tables, target
from swifti2v_kernels.common.conv_checks import MAX_OWNED_CHANNELS
from swifti2v_kernels.common.conv_loop import ConvConfig
from swifti2v_kernels.common.conv_torch import cudnn_conv3d_fault
from swifti2v_kernels.frames_out import cost as frames_cost
from swifti2v_kernels.rms_norm_silu import cost as norm_cost
from swifti2v_kernels.upsample_conv2d import cost as upsample_cost
from tests.conv_oracle import convolved, normed, scattered, upsampled, weights
from tests.tolerances import EXACT, OPERATOR, relative_error

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
#: Who computes: the sums of 2D convolutions that stand for the CPU, and what a GPU would be given.
PATHS = ["cpu", "cudnn", "cudnn without 3D"]


def tolerance(dtype: torch.dtype) -> float:
    return EXACT if dtype == torch.float64 else OPERATOR[str(dtype).removeprefix("torch.")]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On tensors this small, threads that share a busy machine wait for each other a hundred times longer than work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Options of a call that takes the path named."""
    if request.param == "cudnn without 3D":
        monkeypatch.setattr(conv_torch, "_conv3d_works", lambda dtype: False)
    within: AbstractContextManager[object] = nullcontext() if request.param == "cpu" else pretend_gpu(90)
    with within:
        yield {"backend": "torch"}


def untouched(views: Sequence[Tensor]) -> Callable[[], bool]:
    """Whether what surrounds the views of ``scattered`` is still NaN, and nothing else is."""
    before = [view._base.isnan() for view in views]
    return lambda: all(torch.equal(view._base.isnan(), b) for view, b in zip(views, before, strict=True))


@pytest.mark.parametrize("path", PATHS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("channels", "columns", "kernel", "stride", "past", "padding"),
    [
        (12, 20, (3, 3, 3), (1, 1, 1), 2, (1, 1, 1, 1)),
        (8, 8, (3, 3, 3), (1, 1, 1), 1, (0, 1, 1, 0)),  # a tile in a corner, one frame of history
        (8, 16, (3, 3, 3), (1, 1, 1), 0, (1, -1, -2, 0)),  # pixels left out
        (8, 4, (3, 3, 3), (1, 1, 1), 2, (-2, 3, 0, 2)),  # more zeros than the kernel reaches
        (3, 16, (1, 3, 3), (1, 2, 2), 0, (0, 1, 0, 1)),  # half frames
        (3, 16, (1, 3, 3), (1, 2, 1), 0, (1, 1, 0, 1)),
        (8, 8, (3, 1, 1), (2, 1, 1), 1, (0, 0, 0, 0)),  # half rate; of five frames the last is no result's
        (8, 8, (3, 3, 1), (3, 2, 3), 2, (-1, 0, 2, -1)),
        (8, 8, (2, 3, 2), (3, 1, 1), 1, (1, 1, 1, 0)),  # frames that no tap sees
        (8, 8, (4, 1, 1), (1, 1, 1), 3, (0, 0, 0, 0)),  # more taps in time than a kernel has
        (4, 200, (1, 1, 1), (1, 1, 1), 0, (0, 0, 0, 0)),
    ],
)
def test_convolution_against_float64(
    channels: int,
    columns: int,
    kernel: tuple[int, int, int],
    stride: tuple[int, int, int],
    past: int,
    padding: tuple[int, int, int, int],
    dtype: torch.dtype,
    path: dict[str, Any],
) -> None:
    x = scattered((2, 5, 7, 9, channels), dtype)
    history = scattered((2, past, 7, 9, channels), dtype) if past else None
    weight, bias = weights(columns, channels, kernel, dtype)
    options: dict[str, Any] = {"past": history, "stride": stride, "padding": padding}
    expected = convolved(x, weight, bias, **options)
    y = causal_conv3d(x, weight, bias, **options, **path)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert relative_error(y, expected) < tolerance(dtype)
    residual, gamma = scattered(expected.shape, dtype), torch.rand(columns).to(dtype) + 0.5
    expected = convolved(x, weight, None, residual=residual, **options)
    options |= {"residual": residual, "norm_weight": gamma, **path}
    alone = causal_conv3d(x, weight, keep_sum=False, **options)
    given = scattered(expected.shape, dtype)
    intact = untouched((x, residual, given))
    results = causal_conv3d(x, weight, out=residual, normed=given, **options)
    assert results[0] is residual
    assert results[1] is given
    assert intact()
    assert relative_error(residual, expected) < tolerance(dtype)
    # The norm reads the rounded sum.
    assert relative_error(given, normed(residual, gamma)) < tolerance(dtype)
    assert torch.equal(alone, given)


def test_defaults_keep_the_size() -> None:
    x, (weight, _) = torch.randn(1, 2, 4, 5, 8), weights(8, 8, (3, 3, 5), torch.float32)
    assert relative_error(causal_conv3d(x, weight), convolved(x, weight, None)) < OPERATOR["float32"]
    frames = torch.zeros(1, 2, 4, 5, 3)
    assert frames_out(x, weights(3, 8, (1, 5, 3), torch.float32)[0], None, frames).any()


@pytest.mark.parametrize(("stride", "pieces"), [(1, (1, 1, 1, 3)), (1, (1, 5)), (2, (2, 4)), (2, (4, 2))], ids=str)
def test_a_clip_in_pieces_is_the_clip(stride: int, pieces: tuple[int, ...]) -> None:
    clip, (weight, bias) = torch.randn(1, 6, 4, 5, 8), weights(8, 8, (3, 3, 3), torch.float32)
    whole, start, parts = causal_conv3d(clip, weight, bias, stride=(stride, 1, 1)), 0, []
    for n in pieces:
        past = clip[:, max(start - 2, 0) : start] if start else None
        parts.append(causal_conv3d(clip[:, start : start + n], weight, bias, past=past, stride=(stride, 1, 1)))
        start += n
    assert relative_error(torch.cat(parts, 1), whole) < OPERATOR["float32"]


@pytest.mark.parametrize("path", PATHS[:2], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("channels", "columns", "padding"),
    [
        (12, 20, (1, 1, 1, 1)),
        (8, 16, (0, 1, 1, 0)),
        (8, 16, (-1, -2, 0, -3)),
        (8, 8, (-2, 1, -3, 1)),
        (4, 200, (1, 0, -4, 1)),
    ],
)
def test_upsampling_against_float64(
    channels: int, columns: int, padding: tuple[int, int, int, int], dtype: torch.dtype, path: dict[str, Any]
) -> None:
    x = scattered((2, 2, 4, 5, channels), dtype)
    weight, bias = weights(columns, channels, (1, 3, 3), dtype)
    # Multiples of 2**-5, of which sums are exact in 16 bits: the operator alone is compared, not the folding.
    weight = ((weight[:, :, 0].double() * 32).round().clamp(-8, 8) / 32).to(dtype)
    phases, gamma = fold_upsample_weight(weight), torch.rand(columns).to(dtype) + 0.5
    y = upsample_conv2d(x, phases, bias, padding=padding, **path)
    assert y.dtype == dtype
    assert relative_error(y, upsampled(x, weight, bias, padding)) < tolerance(dtype)
    residual, given = (scattered(y.shape, dtype) for _ in range(2))
    expected = upsampled(x, weight, None, padding) + residual.double()
    intact = untouched((x, residual, given))
    options: dict[str, Any] = {"padding": padding, "residual": residual, "norm_weight": gamma, **path}
    results = upsample_conv2d(x, phases, out=residual, normed=given, **options)
    assert results[0] is residual
    assert results[1] is given
    assert intact()
    assert relative_error(residual, expected) < tolerance(dtype)
    assert relative_error(given, normed(residual, gamma)) < tolerance(dtype)


def test_phases_share_out_the_nine_taps() -> None:
    weight = torch.randn(8, 6, 3, 3, dtype=torch.float64)
    phases = fold_upsample_weight(weight)
    assert phases.shape == (4, 8, 2, 2, 6)
    assert relative_error(phases.sum((2, 3)), weight.sum((2, 3)).expand(4, 8, 6)) < EXACT
    # Even rows: one row of taps above, two on the pixel's own; odd rows: two and one below. Columns likewise.
    assert torch.equal(phases[0, :, 0, 0], weight[:, :, 0, 0])
    assert torch.equal(phases[1, :, 0, 1], weight[:, :, 0, 2])
    assert torch.equal(phases[0, :, 1, 0], weight[:, :, 1, 0] + weight[:, :, 2, 0])
    assert torch.equal(phases[2, :, 1, 0], weight[:, :, 2, 0])
    assert torch.equal(phases[2, :, 0, 0], weight[:, :, 0, 0] + weight[:, :, 1, 0])
    assert relative_error(phases[3, :, 0, 0], weight[:, :, :2, :2].sum((2, 3))) < EXACT


@pytest.mark.parametrize(("dtype", "claimed"), [(torch.bfloat16, 1.7e-3), (torch.float32, 4e-8)], ids=str)
def test_folding_costs_what_its_file_says(dtype: torch.dtype, claimed: float) -> None:
    """Sums of weights rounded once, everything else in float64."""
    weight, x = torch.randn(192, 192, 3, 3).to(dtype), torch.randn(1, 1, 16, 16, 192).double()
    expected = upsampled(x, weight, None)
    moved = relative_error(upsample_conv2d(x, fold_upsample_weight(weight).double()), expected)
    assert claimed / 2 < moved < claimed
    assert moved < 1.5 * relative_error(expected.to(dtype), expected)  # as much as the result's own rounding


@pytest.mark.parametrize("path", PATHS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("patch", [1, 2])
def test_frames_against_float64(patch: int, dtype: torch.dtype, path: dict[str, Any]) -> None:
    """As bytes, as clamped numbers and blended, into a part of larger frames; the rest stays."""
    x, past = scattered((2, 2, 5, 7, 12), dtype, 2.0), scattered((2, 1, 5, 7, 12), dtype, 2.0)
    weight, bias = weights(3 * patch * patch, 12, (3, 3, 3), dtype)
    options: dict[str, Any] = {"past": past, "padding": (1, 0, -1, 1)}
    v = convolved(x, weight, bias, **options)
    # Features are (colour, column, row).
    v = v.unflatten(4, (3, patch, patch)).permute(0, 1, 2, 6, 3, 5, 4).flatten(2, 3).flatten(3, 4)
    assert (v.abs() > 1).any()
    options |= {"patch_size": patch, **path}

    def target(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        frames = torch.full((2, 4, v.shape[2] + 3, v.shape[3] + 2, 3), 7, dtype=dtype)
        return frames, frames[:, 1:-1, 1:-2, 2:]

    frames, out = target(torch.uint8)
    assert frames_out(x, weight, bias, out, **options) is out
    expected = (v * 127.5 + 128).floor().clamp(0, 255)
    # A byte differs where rounding in front of it moves it over a boundary; 2D convolutions round each tap's sum.
    assert ((out.double() - expected).abs() <= (2 if dtype == torch.bfloat16 else 1)).all()
    assert (out.double() != expected).float().mean() < {2: 0.25, 4: 2e-3, 8: 2e-3}[dtype.itemsize]
    assert (frames == 7).sum() >= frames.numel() - out.numel()
    window = torch.rand(v.shape[2:4])
    for kind in (torch.float32, torch.bfloat16):
        limit = max(tolerance(dtype), tolerance(kind))
        frames, out = target(kind)
        frames_out(x, weight, bias, out, **options)
        assert relative_error(out, v.clamp(-1, 1)) < limit
        frames, out = target(kind)
        assert frames_out(x, weight, bias, out, window=window, **options) is out
        assert relative_error(out, 7 + window.unsqueeze(-1).double() * v) < limit


def test_blending_rounds_once() -> None:
    """The share of a tile is not rounded before it is added to 16-bit frames."""
    x, (weight, bias) = torch.randn(1, 1, 16, 16, 8), weights(3, 8, (1, 3, 3), torch.float32)
    out, window = torch.randn(1, 1, 16, 16, 3).bfloat16(), torch.rand(16, 16)
    expected = (out.double() + window.unsqueeze(-1).double() * convolved(x, weight, bias)).bfloat16()
    assert (frames_out(x, weight, bias, out, window=window) != expected).float().mean() < 0.02


def test_numbers_become_the_bytes_of_their_pixels() -> None:
    """-1 is 0, 1 is 255, and what is beyond or between goes to the nearest end or the byte below."""
    values = torch.tensor([-9.0, -1.0, -0.5, 0.0, 0.5, 1.0, 9.0])
    x, out = values.view(1, 1, 1, 7, 1), torch.empty(1, 1, 1, 7, 3, dtype=torch.uint8)
    weight = torch.ones(3, 1, 1, 1, 1).to(memory_format=torch.channels_last_3d)
    frames_out(x, weight, None, out)
    assert out[0, 0, 0, :, 2].tolist() == [0, 0, 64, 128, 191, 255, 255]
    wide = torch.empty(1, 1, 1, 7, 3)
    x[..., 0, 0] = float("nan")
    assert frames_out(x, weight, None, wide)[..., 0, :].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 12, 384])
def test_norm_against_float64(channels: int, dtype: torch.dtype) -> None:
    x, gamma = scattered((2, 2, 3, 5, channels), dtype), torch.rand(channels).to(dtype) + 0.5
    x[:, :, 1, 2] = 0
    expected = normed(x, gamma)
    y, given = rms_norm_silu(x, gamma), scattered(x.shape, dtype)
    assert relative_error(y, expected) < tolerance(dtype)
    intact = untouched((x, given))
    assert rms_norm_silu(x, gamma, out=given) is given
    assert rms_norm_silu(x, gamma, out=x) is x
    assert intact()
    assert torch.equal(given, y)
    assert torch.equal(x, y)


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_gradients_are_those_of_the_formula(path: dict[str, Any]) -> None:
    x, past, residual = double(1, 4, 5, 4, 3), double(1, 2, 5, 4, 3), double(1, 2, 3, 4, 5)
    weight, bias = weights(5, 3, (3, 3, 3), torch.float64)
    options: dict[str, Any] = {"stride": (2, 2, 1), "padding": (1, 1, 2, 0)}
    gamma = double(5)
    inputs = (x, past, residual, weight.requires_grad_(), bias.requires_grad_(), gamma)
    y, z = causal_conv3d(x, weight, bias, past=past, residual=residual, norm_weight=gamma, **options, **path)
    a, b = torch.randn_like(y), torch.randn_like(z)
    total = convolved(x, weight, bias, past, residual=residual, **options)
    expected = torch.autograd.grad((total, normed(total, gamma)), inputs, (a, b))
    for actual, wanted in zip(torch.autograd.grad((y, z), inputs, (a, b)), expected, strict=True):
        assert relative_error(actual, wanted) < EXACT
    assert "gradients" in explain(causal_conv3d, x, weight).reason


@pytest.mark.parametrize("path", PATHS[:2], indirect=True)
def test_gradients_of_upsampling_are_those_of_the_formula(path: dict[str, Any]) -> None:
    """Through the folding too, up to the weight that a model holds."""
    x, weight, bias, gamma = double(1, 2, 3, 2, 3), double(5, 3, 3, 3), double(5), double(5)
    inputs, padding = (x, weight, bias, gamma), (1, 0, -1, 1)
    y, z = upsample_conv2d(x, fold_upsample_weight(weight), bias, padding=padding, norm_weight=gamma, **path)
    a, b = torch.randn_like(y), torch.randn_like(z)
    total = upsampled(x, weight, bias, padding)
    expected = torch.autograd.grad((total, normed(total, gamma)), inputs, (a, b))
    for actual, wanted in zip(torch.autograd.grad((y, z), inputs, (a, b)), expected, strict=True):
        assert relative_error(actual, wanted) < EXACT
    assert "gradients" in explain(upsample_conv2d, x, fold_upsample_weight(weight)).reason


def test_gradients_against_differences() -> None:
    x, past, gamma = double(1, 2, 2, 3, 2), double(1, 1, 2, 3, 2), double(3)
    weight, bias = (t.requires_grad_() for t in weights(3, 2, (3, 1, 3), torch.float64))

    def conv(x: Tensor, past: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor) -> Any:
        return causal_conv3d(x, weight, bias, past=past, padding=(0, 0, 1, -1), norm_weight=gamma)

    assert torch.autograd.gradcheck(conv, (x, past, weight, bias, gamma))
    phases, bias = double(4, 3, 2, 2, 2), double(3)
    assert torch.autograd.gradcheck(
        lambda x, phases, bias, gamma: upsample_conv2d(x, phases, bias, padding=(1, 0, 1, 1), norm_weight=gamma),
        (x, phases, bias, gamma),
    )
    assert torch.autograd.gradcheck(rms_norm_silu, (x, double(2)))


def test_gradients_of_a_pixel_of_zeros_are_not_nan() -> None:
    x, gamma = torch.randn(1, 1, 2, 3, 4, dtype=torch.float64), double(4)
    x[:, :, 0, 0] = 0
    x.requires_grad_()
    actual, expected = (torch.autograd.grad(f(x, gamma).sum(), x)[0] for f in (rms_norm_silu, normed))
    assert relative_error(actual[:, :, 0, :1], expected[:, :, 0, :1]) < EXACT
    assert relative_error(actual[:, :, :, 1:], expected[:, :, :, 1:]) < EXACT


def modules(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Callable[[Tensor, Tensor], list[Tensor]]:
    """A model of someone else's that calls every operator, with history, halo, residual and norms."""
    (weight, bias), gamma = weights(16, 16, (3, 3, 3), dtype), torch.rand(16).to(dtype)
    phases = fold_upsample_weight(weight[:, :, 0]).to(device)
    head = weight[:3].contiguous(memory_format=torch.channels_last_3d).to(device)
    weight, bias, gamma = weight.to(device), bias.to(device), gamma.to(device)

    def foreign(x: Tensor, frames: Tensor) -> list[Tensor]:
        y, z = causal_conv3d(x + 1, weight, bias, residual=x, norm_weight=gamma, past=x[:, :1])
        z = causal_conv3d(z[:, :, 1:], weight, padding=(0, 1, 1, 1), norm_weight=gamma, keep_sum=False)
        big = upsample_conv2d(z, phases, bias)
        rms_norm_silu(big, gamma, out=big)
        frames_out(big, head, None, frames)
        return [y, big, frames + 1]

    return foreign


def test_they_compile_as_one_graph_within_a_foreign_module() -> None:
    x, foreign = torch.randn(1, 2, 4, 5, 16), modules()
    frames, expected_frames = torch.zeros(1, 2, 4, 10, 3), torch.zeros(1, 2, 4, 10, 3)
    expected = foreign(x, expected_frames)
    actual = torch.compile(foreign, fullgraph=True, backend="aot_eager")(x, frames)
    for a, e in zip((*actual, frames), (*expected, expected_frames), strict=True):
        assert relative_error(a, e) < OPERATOR["float32"]


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache.")
def test_the_choice_of_a_gpu_is_made_while_tracing() -> None:
    """Of tensors without contents: the table is read, and the kernels' operators stand in the one graph."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    def compiled(dtype: torch.dtype) -> list[str]:
        x, frames = torch.empty(1, 2, 4, 5, 16, dtype=dtype, device="meta"), torch.empty(1, 2, 4, 10, 3, device="meta")
        results = torch.compile(modules(dtype, "meta"), fullgraph=True, backend=backend)(x, frames)
        assert [tuple(y.shape[2:]) for y in results] == [(4, 5, 16), (4, 10, 16), (4, 10, 3)]
        return graphs[-1]

    torch._dynamo.reset()
    with pretend_gpu(90):
        kernels = [name.split(".")[1] for name in compiled(torch.bfloat16) if name.startswith("swifti2v.")]
        assert kernels == ["causal_conv3d", "causal_conv3d", "upsample_conv2d", "rms_norm_silu", "frames_out"]
        kernels = [name.split(".")[1] for name in compiled(torch.float32) if name.startswith("swifti2v.")]
        # cuDNN's sums, and the norms behind two of them by their own kernel.
        assert kernels == ["rms_norm_silu"] * 3
    assert len(graphs) == 2


def call_of(operator: Callable[..., Any], dtype: torch.dtype, columns: int = 96) -> tuple[Any, ...]:
    """Arguments for ``explain`` on a device that holds nothing: 96 channels of 2 * 20 * 30 pixels."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    def weight(columns: int) -> Tensor:
        return empty(columns, 3, 3, 3, 96).permute(0, 4, 1, 2, 3)

    x = empty(1, 2, 20, 30, 96)
    if operator is causal_conv3d:
        return x, weight(columns), empty(columns)
    if operator is upsample_conv2d:
        return x, empty(4, columns, 2, 2, 96), empty(columns)
    if operator is frames_out:
        return x, weight(3), None, empty(1, 2, 20, 30, 3, dtype=torch.uint8)
    return x, empty(96)


CONVOLUTIONS = {causal_conv3d: [3, 3, 3], upsample_conv2d: "upsample", frames_out: "frames"}


@pytest.mark.parametrize("operator", [*CONVOLUTIONS, rms_norm_silu])
def test_the_choice_on_a_cpu(operator: Callable[..., Any]) -> None:
    x = torch.zeros(1, 1, 4, 4, 8)
    arguments = {
        causal_conv3d: (x, weights(8, 8, (1, 1, 1), torch.float32)[0]),
        upsample_conv2d: (x, torch.zeros(4, 8, 2, 2, 8)),
        frames_out: (x, weights(3, 8, (1, 1, 1), torch.float32)[0], None, torch.zeros(1, 1, 4, 4, 3)),
        rms_norm_silu: (x, torch.zeros(8)),
    }[operator]
    choice = explain(operator, *arguments)
    assert str(choice) == "torch: reference (kernels need an NVIDIA GPU or TRITON_INTERPRET=1, got cpu)"
    message = "backend: 'triton' cannot take this call: kernels need an NVIDIA GPU or TRITON_INTERPRET=1, got cpu"
    with pytest.raises(ValueError, match=re.escape(message)):
        operator(*arguments, backend="triton")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """A card of capability 9.0 for tensors that say that they are on it; the measurements are the list given."""
    entries: list[dict[str, Any]] = []
    for module in (conv_torch, target):
        monkeypatch.setattr(module, "capability_of", lambda device: 90)
    monkeypatch.setattr(tables, "load_table", lambda name: entries if name == "conv3d" else [])
    with FakeTensorMode():
        yield entries


@pytest.mark.parametrize("operator", CONVOLUTIONS)
def test_the_choice_on_a_gpu(operator: Callable[..., Any], card: list[dict[str, Any]]) -> None:
    """Decided from the tensors' metadata."""
    for dtype in (torch.bfloat16, torch.float16):
        choice = explain(operator, *call_of(operator, dtype))
        assert str(choice) == "triton: implicit product (the kernels cover this call)"
    choice = explain(operator, *call_of(operator, torch.float32))
    assert str(choice) == "torch: cudnn (cuDNN has tensor cores for float32, the kernel has not)"
    choice = explain(operator, *call_of(operator, torch.float32), backend="triton")
    assert str(choice) == "triton: implicit product (backend is 'triton')"
    choice = explain(operator, *call_of(operator, torch.float64))
    assert str(choice) == "torch: cudnn (kernels exist for float16, bfloat16 and float32, got torch.float64)"
    choice = explain(operator, *call_of(operator, torch.bfloat16), backend="torch")
    assert str(choice) == "torch: cudnn (backend is 'torch')"


@pytest.mark.parametrize("operator", CONVOLUTIONS)
def test_the_nearest_measurement_decides(operator: Callable[..., Any], card: list[dict[str, Any]]) -> None:
    def entry(pixels: int, ours: float, **changes: Any) -> dict[str, Any]:
        columns = 3 if operator is frames_out else 96
        return {
            "capability": 90, "card": "card", "dtype": "bfloat16", "kernel": CONVOLUTIONS[operator],
            "channels": [96, columns], "pixels": pixels, "seconds": {"swifti2v": ours, "cudnn": 1.0}, **changes,
        }  # fmt: skip

    card += [entry(1200, 2.0, dtype="float16"), entry(1200, 2.0, kernel="other"), entry(1200, 2.0, channels=[96, 384])]
    card += [entry(1200, 2.0, capability=89)]
    assert explain(operator, *call_of(operator, torch.bfloat16)).backend == "triton"
    card += [entry(1000, 2.0), entry(100_000, 0.5)]
    choice = explain(operator, *call_of(operator, torch.bfloat16))
    assert str(choice) == "torch: cudnn (fastest as measured on card at 1000 pixels)"
    choice = explain(operator, *call_of(operator, torch.bfloat16), backend="triton")
    assert choice.backend == "triton"
    card[-2]["seconds"]["swifti2v"] = 0.9
    assert explain(operator, *call_of(operator, torch.bfloat16)).backend == "triton"


def test_the_environment_replaces_auto(monkeypatch: pytest.MonkeyPatch, card: list[dict[str, Any]]) -> None:
    arguments = call_of(causal_conv3d, torch.float32)
    monkeypatch.setenv("SWIFTI2V_BACKEND", "triton")
    assert str(explain(causal_conv3d, *arguments)) == "triton: implicit product (SWIFTI2V_BACKEND is 'triton')"
    monkeypatch.setenv("SWIFTI2V_BACKEND", "torch")
    assert str(explain(causal_conv3d, *arguments)) == "torch: cudnn (SWIFTI2V_BACKEND is 'torch')"
    monkeypatch.setenv("SWIFTI2V_BACKEND", "cuda")
    with pytest.raises(ValueError, match="SWIFTI2V_BACKEND: expected one of auto, torch, triton, got 'cuda'"):
        explain(causal_conv3d, *arguments)


def test_what_one_program_does_not_own_is_normed_afterwards(card: list[dict[str, Any]]) -> None:
    for columns, name in ((192, "implicit product"), (193, "implicit product, then rms_norm_silu")):
        for operator in (causal_conv3d, upsample_conv2d):
            *arguments, gamma = call_of(operator, torch.bfloat16, columns)
            assert explain(operator, *arguments, norm_weight=gamma).implementation == name
    assert explain(rms_norm_silu, *call_of(rms_norm_silu, torch.float32)).implementation == "fused kernel"


@pytest.mark.parametrize(
    ("versions", "dtype", "fault"),
    [
        (("2.8.0+cu128", 91002), torch.bfloat16, "wrong results"),
        (("2.8.0+cu128", 90800), torch.float16, "wrong results"),
        (("2.8.0", 90701), torch.bfloat16, None),
        (("2.8.0", 91300), torch.bfloat16, None),
        (("2.9.0+cu130", 90701), torch.bfloat16, "without cuDNN"),
        (("2.9.0", 91002), torch.bfloat16, "without cuDNN"),
        (("2.9.0", 91600), torch.float16, "without cuDNN"),
        (("2.9.1+cu128", 91300), torch.bfloat16, "without cuDNN"),
        (("2.9.1", 91501), torch.bfloat16, None),
        (("2.9.1", 90701), torch.bfloat16, None),
        (("2.10", 91002), torch.bfloat16, "without cuDNN"),
        (("2.13.0a0+git1234", 91499), torch.float16, "without cuDNN"),
        (("2.13.0", 91500), torch.float16, None),
        (("2.9.0", 91002), torch.float32, None),
        (("2.8.0", 91002), torch.float64, None),
        (("2.9.0", None), torch.bfloat16, None),
    ],
    ids=str,
)
def test_what_is_known_of_3d_convolutions(
    versions: tuple[str, int | None], dtype: torch.dtype, fault: str | None
) -> None:
    said = cudnn_conv3d_fault(*versions, dtype)
    assert said is None if fault is None else fault in said and said.startswith(f"torch {versions[0]} with cuDNN 9.")


@pytest.fixture
def _faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch 2.8.0 with cuDNN 9.10.2. What is known of the real ones is kept for the process, so it is forgotten."""
    monkeypatch.setattr(torch, "__version__", "2.8.0+cu128")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    conv_torch._conv3d_works.cache_clear()
    with pretend_gpu(90):
        yield
    conv_torch._conv3d_works.cache_clear()


@pytest.mark.usefixtures("_faulty")
def test_2d_convolutions_stand_in_with_a_warning_for_broken_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    x, past = torch.randn(2, 1, 2, 4, 5, 8).bfloat16().unbind()
    weight, bias = weights(16, 8, (3, 3, 3), torch.bfloat16)
    expected, stock, seen = convolved(x, weight, bias, past), F.conv3d, []

    def conv3d(x: Tensor, *args: Any) -> Tensor:
        seen.append(x.dtype)
        return stock(x, *args)

    monkeypatch.setattr(F, "conv3d", conv3d)
    message = (
        "torch 2.8.0+cu128 with cuDNN 9.10 gives wrong results for 3D convolutions in 16 bits on some GPUs; "
        "2D convolutions stand in for them. cuDNN 9.15 cures it."
    )
    with pytest.warns(RuntimeWarning, match=re.escape(message)):
        y = causal_conv3d(x, weight, bias, past=past, backend="torch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once for a dtype is enough
        assert torch.equal(causal_conv3d(x, weight, bias, past=past, backend="torch"), y)
        assert relative_error(y, expected) < OPERATOR["bfloat16"]
        assert not seen
        wide = (t.float() for t in (x, weight, bias, past))
        x, weight, bias, past = wide
        assert relative_error(causal_conv3d(x, weight, bias, past=past), expected) < OPERATOR["float32"]
    assert seen == [torch.float32]


@pytest.mark.usefixtures("_faulty")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache.")
def test_the_warning_does_not_break_a_graph() -> None:
    x, (weight, bias) = torch.randn(1, 2, 4, 5, 8).half(), weights(16, 8, (3, 1, 1), torch.float16)
    call = torch.compile(lambda x: causal_conv3d(x, weight, bias, backend="torch"), fullgraph=True, backend="eager")
    with pytest.warns(RuntimeWarning, match="2D convolutions stand in"):
        y = call(x)
    assert relative_error(y, convolved(x, weight, bias)) < OPERATOR["float16"]


X, W = torch.zeros(1, 2, 4, 5, 8), torch.zeros(8, 3, 3, 3, 8).permute(0, 4, 1, 2, 3)
PHASES, GAMMA = torch.zeros(4, 8, 2, 2, 8), torch.zeros(8)
ONE = torch.zeros(8, 1, 3, 3, 8).permute(0, 4, 1, 2, 3)
BIG, HEAD, BYTES = torch.zeros(1, 2, 8, 10, 8), W[:3], torch.zeros(1, 2, 4, 5, 3, dtype=torch.uint8)
COLOURS, WINDOW = torch.zeros(1, 2, 4, 5, 3), torch.zeros(4, 5)
ALL = "float16 or bfloat16 or float32 or float64"
CONV: dict[str, tuple[Callable[[], Any], str]] = {
    "x: a list": (lambda: causal_conv3d([0.0], W), "x: expected a tensor, got list"),
    "x: four axes": (
        lambda: causal_conv3d(X[0], W), f"x: expected [B, T, h, w, C] {ALL}, got [2, 4, 5, 8] torch.float32 on cpu"
    ),
    "x: empty": (
        lambda: causal_conv3d(X[:, :0], W), f"x: expected [B, T, h, w, C] {ALL}, got [1, 0, 4, 5, 8] torch.float32 on"
    ),
    "x: integers": (
        lambda: causal_conv3d(X.int(), W),
        f"x: expected [B, T, h, w, C] {ALL}, got [1, 2, 4, 5, 8] torch.int32 on cpu",
    ),
    "x: channels first": (
        lambda: causal_conv3d(torch.zeros(1, 8, 2, 4, 5).permute(0, 2, 3, 4, 1), W),
        "x: expected the channels to be contiguous (stride 1), got stride 40",
    ),
    "weight: None": (lambda: causal_conv3d(X, None), "weight: expected a tensor, got NoneType"),
    "weight: four axes": (
        lambda: causal_conv3d(X, W[:, :, 0]),
        "weight: expected [C', 8, kt, kh, kw] torch.float32 on cpu, got [8, 8, 3, 3] torch.float32 on cpu",
    ),
    "weight: channels": (
        lambda: causal_conv3d(X, torch.zeros(8, 4, 1, 1, 1)),
        "weight: expected [C', 8, kt, kh, kw] torch.float32 on cpu, got [8, 4, 1, 1, 1] torch.float32 on cpu",
    ),
    "weight: dtype": (
        lambda: causal_conv3d(X, W.half()),
        "weight: expected [C', 8, kt, kh, kw] torch.float32 on cpu, got [8, 8, 3, 3, 3] torch.float16 on cpu",
    ),
    "weight: device": (
        lambda: causal_conv3d(X, W.to("meta")),
        "weight: expected [C', 8, kt, kh, kw] torch.float32 on cpu, got [8, 8, 3, 3, 3] torch.float32 on meta",
    ),
    "weight: channels first": (
        lambda: causal_conv3d(X, W.contiguous()),
        "weight: expected channels last in memory: weight.to(memory_format=torch.channels_last_3d); got strides"
        " (216, 27, 9, 3, 1)",
    ),
    "bias: length": (
        lambda: causal_conv3d(X, W, GAMMA[:7]),
        "bias: expected contiguous [8] torch.float32 on cpu, got [7] torch.float32 on cpu",
    ),
    "bias: dtype": (
        lambda: causal_conv3d(X, W, GAMMA.half()),
        "bias: expected contiguous [8] torch.float32 on cpu, got [8] torch.float16 on cpu",
    ),
    "bias: a list": (lambda: causal_conv3d(X, W, [0.0]), "bias: expected a tensor or None, got list"),
    "past: too long": (
        lambda: causal_conv3d(X, W, past=torch.zeros(1, 3, 4, 5, 8)),
        "past: expected at most 2 frames (taps in time - 1), got 3",
    ),
    "past: of one tap": (
        lambda: causal_conv3d(X, ONE, past=X), "past: expected at most 0 frames (taps in time - 1), got 2"
    ),
    "past: size": (
        lambda: causal_conv3d(X, W, past=X[:, :, :3]),
        "past: expected [1, P, 4, 5, 8] float32 on cpu, got [1, 2, 3, 5, 8] torch.float32 on cpu",
    ),
    "past: no frame": (
        lambda: causal_conv3d(X, W, past=X[:, :0]),
        "past: expected [1, P, 4, 5, 8] float32 on cpu, got [1, 0, 4, 5, 8] torch.float32 on cpu",
    ),
    "past: dtype": (lambda: causal_conv3d(X, W, past=X.half()), "past: expected [1, P, 4, 5, 8] float32 on cpu, got"),
    "stride: two": (
        lambda: causal_conv3d(X, W, stride=(1, 1)),
        "stride: expected three positive numbers (time, rows, columns), got (1, 1)",
    ),
    "stride: zero": (
        lambda: causal_conv3d(X, W, stride=(1, 0, 1)),
        "stride: expected three positive numbers (time, rows, columns), got (1, 0, 1)",
    ),
    "padding: two": (
        lambda: causal_conv3d(X, W, padding=(1, 1)), "padding: expected (top, bottom, left, right), got (1, 1)"
    ),
    "padding: a fraction": (
        lambda: causal_conv3d(X, W, padding=(1, 1, 0.5, 1)),
        "padding: expected (top, bottom, left, right), got (1, 1, 0.5, 1)",
    ),
    "no frame left": (
        lambda: causal_conv3d(X, W, stride=(3, 1, 1)),
        "x: (2, 4, 5) frames, rows and columns leave nothing at kernel (3, 3, 3), stride (3, 1, 1),"
        " padding (1, 1, 1, 1)",
    ),
    "no row left": (
        lambda: causal_conv3d(X, W, padding=(-1, -1, 0, 0)),
        "x: (2, 4, 5) frames, rows and columns leave nothing at kernel (3, 3, 3), stride (1, 1, 1),"
        " padding (-1, -1, 0, 0)",
    ),
    "residual: shape": (
        lambda: causal_conv3d(X, W, residual=X[:, :, :3]),
        "residual: expected [1, 2, 4, 5, 8] float32 on cpu, got [1, 2, 3, 5, 8] torch.float32 on cpu",
    ),
    "norm_weight: length": (
        lambda: causal_conv3d(X, W, norm_weight=GAMMA[:4]), "norm_weight: expected contiguous [8] torch.float32 on cpu"
    ),
    "norm_weight: missing for normed": (
        lambda: causal_conv3d(X, W, normed=X.clone()),
        "norm_weight: expected a tensor, since the normed sum is asked for",
    ),
    "norm_weight: missing without the sum": (
        lambda: causal_conv3d(X, W, keep_sum=False), "norm_weight: expected a tensor, since the normed sum is asked for"
    ),
    "out: of a sum that is not kept": (
        lambda: causal_conv3d(X, W, norm_weight=GAMMA, keep_sum=False, out=X.clone()),
        "out: expected None without keep_sum, since the sum is not stored",
    ),
    "out: shape": (
        lambda: causal_conv3d(X, W, out=BIG),
        "out: expected [1, 2, 4, 5, 8] float32 on cpu, got [1, 2, 8, 10, 8] torch.float32 on cpu",
    ),
    "out: dtype": (lambda: causal_conv3d(X, W, out=X.half()), "out: expected [1, 2, 4, 5, 8] float32 on cpu, got"),
    "out: is x": (lambda: causal_conv3d(X, W, out=X), "out: expected memory of its own, but it overlaps x"),
    "out: overlaps past": (
        lambda: causal_conv3d(X.clone(), W, past=X, out=X), "out: expected memory of its own, but it overlaps past"
    ),
    "out: overlaps residual": (
        lambda: causal_conv3d(X, W, residual=BIG[:, :, :4, :5], out=BIG[:, :, 1:5, :5]),
        "out: expected residual itself or memory of its own, but it overlaps residual",
    ),
    "out: expanded": (
        lambda: causal_conv3d(X, W, out=torch.zeros(1, 1, 4, 5, 8).expand(1, 2, 4, 5, 8)),
        "out: expected distinct elements to write to, got shape (1, 2, 4, 5, 8), strides (160, 0, 40, 8, 1)",
    ),
    "normed: is out": (
        lambda: causal_conv3d(X, W, norm_weight=GAMMA, out=(y := X.clone()), normed=y),
        "normed: expected memory of its own, but it overlaps out",
    ),
    "normed: is residual": (
        lambda: causal_conv3d(X, W, residual=(y := X.clone()), norm_weight=GAMMA, normed=y),
        "normed: expected memory of its own, but it overlaps residual",
    ),
    "backend": (
        lambda: causal_conv3d(X, W, backend="cudnn"), "backend: expected one of auto, torch, triton, got 'cudnn'"
    ),
}  # fmt: skip
OTHERS: dict[str, tuple[Callable[[], Any], str]] = {
    "upsample, x: four axes": (
        lambda: upsample_conv2d(X[0], PHASES),
        f"x: expected [B, T, h, w, C] {ALL}, got [2, 4, 5, 8] torch.float32 on cpu",
    ),
    "upsample, phases: not folded": (
        lambda: upsample_conv2d(X, W[:, :, 0]),
        "phases: expected contiguous [4, C', 2, 2, 8] torch.float32 on cpu, got [8, 8, 3, 3] torch.float32 on cpu",
    ),
    "upsample, phases: layout": (
        lambda: upsample_conv2d(X, PHASES.mT), "phases: expected contiguous [4, C', 2, 2, 8] torch.float32 on cpu, got"
    ),
    "upsample, bias": (
        lambda: upsample_conv2d(X, PHASES, GAMMA[:4]),
        "bias: expected contiguous [8] torch.float32 on cpu, got [4] torch.float32 on cpu",
    ),
    "upsample, padding: two": (
        lambda: upsample_conv2d(X, PHASES, padding=(1, 1)),
        "padding: expected (top, bottom, left, right), got (1, 1)",
    ),
    "upsample, padding: above 1": (
        lambda: upsample_conv2d(X, PHASES, padding=(1, 2, 1, 1)),
        "padding: expected at most 1 on each side, got (1, 2, 1, 1)",
    ),
    "upsample, nothing left": (
        lambda: upsample_conv2d(X, PHASES, padding=(-7, 1, 1, 1)),
        "padding: (-7, 1, 1, 1) leaves nothing of 8 x 10 pixels",
    ),
    "upsample, residual": (
        lambda: upsample_conv2d(X, PHASES, residual=X),
        "residual: expected [1, 2, 8, 10, 8] float32 on cpu, got [1, 2, 4, 5, 8] torch.float32 on cpu",
    ),
    "upsample, normed without norm_weight": (
        lambda: upsample_conv2d(X, PHASES, normed=BIG),
        "norm_weight: expected a tensor, since the normed sum is asked for",
    ),
    "upsample, out: overlaps x": (
        lambda: upsample_conv2d(BIG[:, :, :4, :5], PHASES, out=BIG),
        "out: expected memory of its own, but it overlaps x",
    ),
    "upsample, normed: is out": (
        lambda: upsample_conv2d(X, PHASES, norm_weight=GAMMA, out=BIG, normed=BIG),
        "normed: expected memory of its own, but it overlaps out",
    ),
    "fold: kernel": (lambda: fold_upsample_weight(W), "weight: expected [C', C, 3, 3], got [8, 8, 3, 3, 3]"),
    "frames, patch_size: 0": (
        lambda: frames_out(X, HEAD, None, BYTES, patch_size=0), "patch_size: expected a positive integer, got 0"
    ),
    "frames, patch_size: a fraction": (
        lambda: frames_out(X, HEAD, None, BYTES, patch_size=2.0), "patch_size: expected a positive integer, got 2.0"
    ),
    "frames, weight: features": (
        lambda: frames_out(X, HEAD, None, BYTES, patch_size=2),
        "weight: expected [12, 8, kt, kh, kw] torch.float32 on cpu, got [3, 8, 3, 3, 3] torch.float32 on cpu",
    ),
    "frames, bias": (
        lambda: frames_out(X, HEAD, GAMMA, BYTES),
        "bias: expected contiguous [3] torch.float32 on cpu, got [8] torch.float32 on cpu",
    ),
    "frames, past": (lambda: frames_out(X, ONE[:3], None, BYTES, past=X), "past: expected at most 0 frames"),
    "frames, out: a list": (lambda: frames_out(X, HEAD, None, []), "out: expected a tensor, got list"),
    "frames, out: shape": (
        lambda: frames_out(X, HEAD, None, BYTES[:, :, 1:]),
        f"out: expected [1, 2, 4, 5, 3] uint8 or {ALL} on cpu, got [1, 2, 3, 5, 3] torch.uint8 on cpu",
    ),
    "frames, out: colours first": (
        lambda: frames_out(X, HEAD, None, torch.zeros(1, 2, 3, 4, 5).permute(0, 1, 3, 4, 2)),
        "out: expected the channels to be contiguous (stride 1), got stride 20",
    ),
    "frames, out: dtype": (
        lambda: frames_out(X, HEAD, None, BYTES.int()), f"out: expected [1, 2, 4, 5, 3] uint8 or {ALL} on cpu, got"
    ),
    "frames, out: overlaps x": (
        lambda: frames_out(X, HEAD, None, X[..., :3]), "out: expected memory of its own, but it overlaps x"
    ),
    "frames, out: bytes with a window": (
        lambda: frames_out(X, HEAD, None, BYTES, window=WINDOW),
        f"out: expected [1, 2, 4, 5, 3] {ALL} on cpu, got [1, 2, 4, 5, 3] torch.uint8 on cpu",
    ),
    "frames, window: a number": (
        lambda: frames_out(X, HEAD, None, COLOURS, window=0.5), "window: expected a tensor or None, got float"
    ),
    "frames, window: dtype": (
        lambda: frames_out(X, HEAD, None, COLOURS, window=WINDOW.double()),
        "window: expected [4, 5] float32 on cpu, columns contiguous, got [4, 5] torch.float64 on cpu, strides (5, 1)",
    ),
    "frames, window: shape": (
        lambda: frames_out(X, HEAD, None, COLOURS, window=WINDOW[:3]),
        "window: expected [4, 5] float32 on cpu, columns contiguous, got [3, 5] torch.float32 on cpu, strides (5, 1)",
    ),
    "frames, window: layout": (
        lambda: frames_out(X, HEAD, None, COLOURS, window=torch.zeros(5, 4).mT),
        "window: expected [4, 5] float32 on cpu, columns contiguous, got [4, 5] torch.float32 on cpu, strides (1, 4)",
    ),
    "norm, x: four axes": (
        lambda: rms_norm_silu(X[0], GAMMA),
        f"x: expected [B, T, h, w, C] {ALL}, got [2, 4, 5, 8] torch.float32 on cpu",
    ),
    "norm, weight: None": (lambda: rms_norm_silu(X, None), "weight: expected a tensor, got None"),
    "norm, weight: dtype": (
        lambda: rms_norm_silu(X, GAMMA.bfloat16()),
        "weight: expected contiguous [8] torch.float32 on cpu, got [8] torch.bfloat16 on cpu",
    ),
    "norm, weight: strided": (
        lambda: rms_norm_silu(X, torch.zeros(16)[::2]), "weight: expected contiguous [8] torch.float32 on cpu, got [8]"
    ),
    "norm, out: shape": (
        lambda: rms_norm_silu(X, GAMMA, out=BIG),
        "out: expected [1, 2, 4, 5, 8] float32 on cpu, got [1, 2, 8, 10, 8] torch.float32 on cpu",
    ),
    "norm, out: shifted": (
        lambda: rms_norm_silu(BIG[:, :, :4], GAMMA, out=BIG[:, :, 1:5]),
        "out: expected x itself or memory of its own, but it overlaps x",
    ),
}  # fmt: skip
BAD = CONV | OTHERS


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises((ValueError, TypeError), match="^" + re.escape(message)):
        call()


def test_explain_checks_as_the_call_does() -> None:
    with pytest.raises(ValueError, match="past: expected at most 2 frames"):
        explain(causal_conv3d, X, W, past=torch.zeros(1, 3, 4, 5, 8))
    with pytest.raises(ValueError, match="padding: expected at most 1 on each side"):
        explain(upsample_conv2d, X, PHASES, padding=(2, 1, 1, 1))
    with pytest.raises(TypeError, match="weight: expected a tensor, got None"):
        explain(rms_norm_silu, X, None)


def test_costs_count_what_must_move() -> None:
    plain, full = conv_cost(1000, 96, 192, 27), conv_cost(1000, 96, 192, 27, residual=True, results=2)
    assert plain.flops == full.flops == 2 * 1000 * 96 * 192 * 27
    assert plain.bytes_read == (1000 * 96 + 96 * 192 * 27) * 2
    assert plain.bytes_written == 1000 * 192 * 2
    assert full.bytes_read == plain.bytes_read + plain.bytes_written
    assert full.bytes_written == 2 * plain.bytes_written
    big = upsample_cost(4000, 192, 96, results=2, itemsize=4)
    assert big.flops == 2 * 4000 * 192 * 96 * 4
    assert big.bytes_read == (1000 * 192 + 4 * 96 * 4 * 192) * 4
    assert big.bytes_written == 2 * 4000 * 96 * 4
    assert upsample_cost(4000, 192, 96, residual=True).bytes_read == (1000 * 192 + 4000 * 96 + 16 * 96 * 192) * 2
    head = frames_cost(1000, 256, 27, 2)
    assert head.flops == 2 * 1000 * 256 * 12 * 27
    assert head.bytes_read == (1000 * 256 + 12 * 256 * 27) * 2
    assert head.bytes_written == 4000 * 3
    norm = norm_cost(1000, 384)
    assert norm.flops == 8 * 384_000
    assert norm.bytes_read == norm.bytes_written == 768_000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_torch_counts_their_operations(dtype: torch.dtype) -> None:
    """Of tensors without contents on a GPU that is not there: by the kernels in 16 bits, by cuDNN in 32."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def counted(call: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    x, weight = empty(2, 4, 10, 12, 96), empty(160, 3, 3, 3, 96).permute(0, 4, 1, 2, 3)
    gamma, wide, gammas = empty(160), empty(384, 1, 3, 3, 96).permute(0, 4, 1, 2, 3), empty(384)
    products = 96 * 160 * 27
    with pretend_gpu(90):
        assert counted(lambda: causal_conv3d(x, weight, past=x[:, :2])) == 2 * (2 * 4 * 120) * products
        options: dict[str, Any] = {"stride": (2, 1, 1), "padding": (0, 0, 1, 1), "norm_weight": gamma}
        assert counted(lambda: causal_conv3d(x, weight, keep_sum=False, **options)) == 2 * (2 * 2 * 8 * 12) * products
        # The norm of so many channels is an operator of its own, without products.
        assert counted(lambda: causal_conv3d(x, wide, norm_weight=gammas)) == 2 * (2 * 4 * 120) * 96 * 384 * 9
        y, z = causal_conv3d(x, wide, norm_weight=gammas, keep_sum=True)
        assert y.shape == z.shape == (2, 4, 10, 12, 384)
        out = empty(2, 4, 10, 12, 3, dtype=torch.uint8)
        head = weight[:3]
        assert counted(lambda: frames_out(x, head, None, out)) == 2 * (2 * 4 * 120) * 96 * 3 * 27
        if dtype == torch.bfloat16:  # cuDNN's paddings are more pixels of each phase
            phases = empty(4, 160, 2, 2, 96)
            expected = 2 * (2 * 4 * 19 * 24) * 96 * 160 * 4
            assert counted(lambda: upsample_conv2d(x, phases, padding=(0, 1, 1, 1), norm_weight=gamma)) == expected


@pytest.mark.parametrize("capability", [None, 80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("owned", [False, True])
def test_every_shape_has_a_configuration(owned: bool, capability: int | None) -> None:
    """Tiles that products can have, and all columns of a pixel in one program where a norm needs them."""
    for columns in (3, 16, 48, 96, 100, 160, 192, 256, 320, 384, 1024):
        if owned and columns > MAX_OWNED_CHANNELS:
            continue
        for channels, itemsize in ((3, 2), (16, 2), (96, 2), (96, 4), (512, 2)):
            config = ConvConfig.heuristic(capability, channels, columns, itemsize, owned)
            for size in (config.block_m, config.block_n, config.block_k, config.tail_n or 16):
                assert size >= 16
                assert size & (size - 1) == 0
            assert config.tail_n < config.block_n
            assert not owned or config.columns >= columns


def test_configurations_leave_few_columns_idle() -> None:
    for columns, tiles in ((96, (64, 32)), (160, (128, 32)), (192, (128, 64)), (320, (128, 32)), (384, (128, 0))):
        config = ConvConfig.heuristic(90, 512, columns, 2, columns <= MAX_OWNED_CHANNELS)
        assert (config.block_n, config.tail_n) == tiles
    assert ConvConfig.heuristic(90, 96, 96, 2, True) == ConvConfig(128, 64, 32, 32, 8, 4, 128)
    assert ConvConfig.heuristic(80, 192, 192, 2, True) == ConvConfig(128, 128, 64, 32, 8, 3)
