"""A video autoencoder's operators against float64, over awkward shapes, layouts, histories and cuts.

Each is computed by the kernel, by what torch does on the CPU, and by what it is given on a GPU, so that the slices and
paddings of that path are compared too; only the sums are another library's.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swifti2v_kernels import causal_conv3d, explain, fold_upsample_weight, frames_out, rms_norm_silu, upsample_conv2d
from swifti2v_kernels.conv import by_torch
from tests.support.conv_oracle import check_pieces, check_tiles, convolved, normed, scattered, upsampled, weights
from tests.support.tolerances import EXACT, KERNEL, OPERATOR, relative_error

TORCH = [torch.float64, torch.float32, torch.bfloat16]
KERNELS = [("kernel", dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
both = pytest.mark.parametrize("backend", ["triton", "torch"])


@pytest.fixture
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Takes the path of this name: for ``cudnn``, PyTorch's own computes as if tensors were on a GPU."""
    if request.param.startswith("cudnn"):
        for module in (by_torch, importlib.import_module("swifti2v_kernels.conv.upsample_conv2d")):
            monkeypatch.setattr(module, "for_gpu", lambda device: True)
    if request.param == "cudnn without 3D":
        monkeypatch.setattr(by_torch, "_conv3d_works", lambda dtype: False)
    return request.param


def backend_of(path: str) -> str:
    return "triton" if path == "kernel" else "torch"


def limit(path: str, dtype: torch.dtype) -> float:
    limits = (KERNEL if path == "kernel" else OPERATOR) | {"float64": EXACT}
    return limits[str(dtype).removeprefix("torch.")]


def untouched(*views: Tensor) -> Callable[[], bool]:
    """Returns whether what surrounds the views of ``scattered`` is still NaN, and nothing else is."""
    before = [view._base.isnan() for view in views]
    return lambda: all(torch.equal(view._base.isnan(), b) for view, b in zip(views, before, strict=True))


def check_in_place(
    call: Callable[..., Any], x: Tensor, residual: Tensor, expected: Tensor, gamma: Tensor, path: str
) -> Tensor:
    """Checks that the sum goes into the residual and the norm of what was stored into given memory, which is returned.

    What is around them stays.
    """
    given = scattered(expected.shape, x.dtype)
    intact = untouched(x, residual, given)
    results = call(residual=residual, norm_weight=gamma, out=residual, normed=given)
    assert results[0] is residual
    assert results[1] is given
    assert intact()
    assert relative_error(residual, expected) < limit(path, x.dtype)
    assert relative_error(given, normed(residual, gamma)) < limit(path, x.dtype)
    return given


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("length", [1e-15, 1e-8])
def test_pixels_of_any_length_are_normed_to_one(length: float, backend: str) -> None:
    """The floor of the length is 1e-12, in all three operators: far above it, short pixels are as long as others."""
    x = length * F.normalize(scattered((1, 1, 3, 4, 16), torch.float32), dim=-1)
    gamma = torch.rand(16) + 0.5
    weight = torch.eye(16).view(16, 16, 1, 1, 1).contiguous(memory_format=torch.channels_last_3d)
    phases = torch.zeros(4, 16, 2, 2, 16)
    for i, phase in enumerate(phases):
        phase[:, 1 - i // 2, 1 - i % 2] = torch.eye(16)
    expected = normed(x, gamma)
    assert relative_error(rms_norm_silu(x, gamma, backend=backend), expected) < KERNEL["float32"]
    y = causal_conv3d(x, weight, norm_weight=gamma, keep_sum=False, backend=backend)
    assert relative_error(y, expected) < KERNEL["float32"]
    _, y = upsample_conv2d(x, phases, norm_weight=gamma, backend=backend)
    doubled = expected.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert relative_error(y, doubled) < KERNEL["float32"]


CONVOLUTIONS = {
    "neither channels nor columns fill their tiles": (12, 20, (3, 3, 3), (1, 1, 1), 2, (1, 1, 1, 1)),
    "a tile in a corner, one frame of history": (64, 16, (3, 3, 3), (1, 1, 1), 1, (0, 1, 1, 0)),
    "two accumulators, pixels left out": (96, 96, (3, 3, 3), (1, 1, 1), 0, (1, -1, -2, 0)),
    "half frames": (3, 160, (1, 3, 3), (1, 2, 2), 0, (0, 1, 0, 1)),
    "half rate": (24, 24, (3, 1, 1), (2, 1, 1), 1, (0, 0, 0, 0)),
    "in time": (24, 48, (3, 1, 1), (1, 1, 1), 2, (0, 0, 0, 0)),
    "several programs share a pixel": (40, 200, (1, 1, 1), (1, 1, 1), 0, (0, 0, 0, 0)),
    "even kernel": (16, 8, (2, 3, 2), (1, 1, 1), 1, (1, 1, 1, 0)),
}
BY_TORCH = {
    "more zeros than the kernel reaches": (8, 4, (3, 3, 3), (1, 1, 1), 2, (-2, 3, 0, 2)),
    "half the rows": (3, 16, (1, 3, 3), (1, 2, 1), 0, (1, 1, 0, 1)),
    "three strides": (8, 8, (3, 3, 1), (3, 2, 3), 2, (-1, 0, 2, -1)),
    "frames that no tap sees": (8, 8, (2, 3, 2), (3, 1, 1), 1, (1, 1, 1, 0)),
    "more taps in time than a kernel has": (8, 8, (4, 1, 1), (1, 1, 1), 3, (0, 0, 0, 0)),
}
#: By the kernel all in bfloat16, some in the others too.
CASES = [
    *(("kernel", name, torch.bfloat16) for name in CONVOLUTIONS),
    *(("kernel", name, torch.float32) for name in ("a tile in a corner, one frame of history", "half frames")),
    ("kernel", "half rate", torch.float32),
    *(("kernel", name, torch.float16) for name in ("several programs share a pixel", "even kernel")),
    *((path, name, dtype) for path in ("cpu", "cudnn", "cudnn without 3D") for dtype in TORCH
      for name in CONVOLUTIONS | BY_TORCH),
]  # fmt: skip


@pytest.mark.parametrize(("path", "name", "dtype"), CASES, ids=str, indirect=["path"])
def test_convolution_against_float64(path: str, name: str, dtype: torch.dtype) -> None:
    """Sums, residuals in place and norms are those of float64; a single frame of history has strides of its own."""
    channels, columns, kernel, stride, past, padding = (CONVOLUTIONS | BY_TORCH)[name]
    x = scattered((2, 2 if path == "kernel" else 5, 7, 9, channels), dtype)
    history = scattered((2, past, 7, 9, channels), dtype) if past else None
    history = history.contiguous() if past == 1 else history
    weight, bias = weights(columns, channels, kernel, dtype)
    options: dict[str, Any] = {"past": history, "stride": stride, "padding": padding}
    expected = convolved(x, weight, bias, **options)
    call = functools.partial(causal_conv3d, x, weight, **options, backend=backend_of(path))
    y = call(bias)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert relative_error(y, expected) < limit(path, dtype)
    residual, gamma = scattered(expected.shape, dtype), torch.rand(columns).to(dtype) + 0.5
    total = convolved(x, weight, None, residual=residual, **options)
    alone = call(residual=residual, norm_weight=gamma, keep_sum=False)
    assert torch.equal(alone, check_in_place(call, x, residual, total, gamma, path))


def whole_numbers(*tensors: Tensor) -> list[Tensor]:
    """Returns the same layouts with small whole numbers: their sums are exact in float32, whatever their order.

    The interpreter leaves the order to NumPy; that a cut does not change it is proved on hardware (tests/gpu).
    """
    return [x.copy_(torch.randint(-4, 5, x.shape)) for x in tensors]


@both
@pytest.mark.parametrize(("stride", "pieces"), [(1, (1, 1, 1, 3)), (1, (1, 5)), (2, (2, 4)), (2, (4, 2))], ids=str)
def test_any_cut_in_time_gives_the_same_numbers(stride: int, pieces: tuple[int, ...], backend: str) -> None:
    clip, weight, bias = whole_numbers(torch.empty(1, 6, 4, 5, 16), *weights(16, 16, (3, 3, 3), torch.float32))
    options = {"weight": weight, "bias": bias, "stride": (stride, 1, 1), "backend": backend}
    check_pieces(clip, pieces, functools.partial(causal_conv3d, **options))


def test_any_cut_in_space_gives_the_same_numbers() -> None:
    frame = torch.empty(1, 1, 9, 11, 24)
    check_tiles(*whole_numbers(frame, *weights(16, 24, (1, 3, 3), torch.float32)), (4, 5), (7,))


def test_frames_that_need_64_bits() -> None:
    """A column stride of 2**29 elements puts the fifth column beyond 2**31; untouched pages cost no memory."""

    def far(channels: int, dtype: torch.dtype) -> Tensor:
        buffer = torch.empty(2**31 + 2**29 + 64, dtype=dtype)
        return buffer.as_strided((1, 1, 1, 6, channels), (0, 0, 0, 2**29, 1))

    x, past = (far(8, torch.float16).copy_(torch.randn(1, 1, 1, 6, 8)) for _ in range(2))
    (weight, bias), gamma, out = weights(8, 8, (2, 1, 3), torch.float16), torch.ones(8).half(), far(8, torch.float16)
    _, z = causal_conv3d(x, weight, bias, past=past, out=out, norm_weight=gamma, normed=far(8, torch.float16))
    assert relative_error(out, convolved(x, weight, bias, past)) < KERNEL["float16"]
    assert relative_error(z, normed(out, gamma)) < KERNEL["float16"]
    frames = frames_out(x, weight[:3], None, far(3, torch.uint8), past=past)
    expected = convolved(x, weight[:3], None, past) * 127.5 + 128
    assert ((frames - expected.floor().clamp(0, 255)).abs() <= 1).all()


UPSAMPLINGS = [
    *(("kernel", 12, 20, (1, 1, 1, 1), torch.float32), ("kernel", 32, 96, (0, 1, 1, 0), torch.bfloat16)),
    *(("kernel", 8, 16, (-1, -2, -2, -3), torch.float16), ("kernel", 64, 200, (1, 0, 0, 1), torch.bfloat16)),
    *((path, *shape, dtype) for path in ("cpu", "cudnn") for dtype in TORCH for shape in (
        (12, 20, (1, 1, 1, 1)), (8, 16, (0, 1, 1, 0)), (8, 16, (-1, -2, 0, -3)), (8, 8, (-2, 1, -3, 1)),
        (4, 200, (1, 0, -4, 1)),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("path", "channels", "columns", "padding", "dtype"), UPSAMPLINGS, ids=str, indirect=["path"])
def test_upsampling_against_float64(
    path: str, channels: int, columns: int, padding: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = scattered((2, 2, 4, 5, channels), dtype)
    weight, bias = weights(columns, channels, (1, 3, 3), dtype)
    # Multiples of 2**-5, of which sums are exact in 16 bits: the operator alone is compared, not the folding.
    weight = ((weight[:, :, 0].double() * 32).round().clamp(-8, 8) / 32).to(dtype)
    phases, gamma = fold_upsample_weight(weight), torch.rand(columns).to(dtype) + 0.5
    call = functools.partial(upsample_conv2d, x, phases, padding=padding, backend=backend_of(path))
    y = call(bias)
    assert y.dtype == dtype
    assert relative_error(y, upsampled(x, weight, bias, padding)) < limit(path, dtype)
    residual = scattered(y.shape, dtype)
    total = upsampled(x, weight, None, padding) + residual.double()
    check_in_place(call, x, residual, total, gamma, path)


def test_upsampling_one_pixel_to_one() -> None:
    """Three of the four phases have nothing to do when one pixel becomes one."""
    x, (weight, bias) = torch.randn(1, 1, 1, 1, 8), weights(16, 8, (1, 3, 3), torch.float32)
    y = upsample_conv2d(x, fold_upsample_weight(weight[:, :, 0]), bias, padding=(1, 0, 0, 1))
    assert relative_error(y, upsampled(x, weight[:, :, 0], bias, (1, 0, 0, 1))) < KERNEL["float32"]


FRAMES = [*KERNELS, *((path, dtype) for path in ("cpu", "cudnn", "cudnn without 3D") for dtype in TORCH)]


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize(("path", "dtype"), FRAMES, ids=str, indirect=["path"])
def test_frames_against_float64(path: str, dtype: torch.dtype, patch: int) -> None:
    """Frames are written as bytes and as clamped numbers into a part of larger frames; the rest stays."""
    x, past = scattered((2, 2, 5, 7, 24), dtype, 2.0), scattered((2, 1, 5, 7, 24), dtype, 2.0)
    weight, bias = weights(3 * patch * patch, 24, (3, 3, 3), dtype)
    options: dict[str, Any] = {"past": past, "padding": (1, 0, -1, 1)}
    v = convolved(x, weight, bias, **options)
    # Features are (colour, column, row).
    v = v.unflatten(4, (3, patch, patch)).permute(0, 1, 2, 6, 3, 5, 4).flatten(2, 3).flatten(3, 4)
    assert (v.abs() > 1).any()
    options |= {"patch_size": patch, "backend": backend_of(path)}

    def target(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        frames = torch.full((2, 4, v.shape[2] + 3, v.shape[3] + 2, 3), 7, dtype=dtype)
        return frames, frames[:, 1:-1, 1:-2, 2:]

    frames, out = target(torch.uint8)
    assert frames_out(x, weight, bias, out, **options) is out
    expected = (v * 127.5 + 128).floor().clamp(0, 255)
    # A byte differs where rounding in front of it moves it over a boundary; 2D convolutions round each tap's sum.
    assert ((out.double() - expected).abs() <= (2 if dtype == torch.bfloat16 and path != "kernel" else 1)).all()
    assert (out.double() != expected).float().mean() < {2: 0.25, 4: 2e-3, 8: 2e-3}[dtype.itemsize]
    assert (frames == 7).sum() >= frames.numel() - out.numel()
    for kind in (torch.float32, torch.bfloat16):
        frames, out = target(kind)
        frames_out(x, weight, bias, out, **options)
        assert relative_error(out, v.clamp(-1, 1)) < max(limit(path, dtype), limit(path, kind))


@both
def test_numbers_become_the_bytes_of_their_pixels(backend: str) -> None:
    """-1 becomes 0, 1 becomes 255, and what is beyond or between goes to the nearest end or the byte below."""
    values = torch.tensor([-9.0, -1.0, -0.5, 0.0, 0.5, 1.0, 9.0])
    x, out = values.view(1, 1, 1, 7, 1), torch.empty(1, 1, 1, 7, 3, dtype=torch.uint8)
    weight = torch.ones(3, 1, 1, 1, 1).to(memory_format=torch.channels_last_3d)
    frames_out(x, weight, None, out, backend=backend)
    assert out[0, 0, 0, :, 2].tolist() == [0, 0, 64, 128, 191, 255, 255]
    wide = torch.empty(1, 1, 1, 7, 3)
    x[..., 0, 0] = float("nan")
    assert frames_out(x, weight, None, wide, backend=backend)[..., 0, :].isnan().all()


@pytest.mark.parametrize(("path", "dtype"), [*KERNELS, *(("cpu", dtype) for dtype in TORCH)], ids=str)
@pytest.mark.parametrize("channels", [1, 12, 384])
def test_norm_against_float64(channels: int, path: str, dtype: torch.dtype) -> None:
    x, gamma = scattered((2, 2, 3, 5, channels), dtype), torch.rand(channels).to(dtype) + 0.5
    x[:, :, 1, 2] = 0
    expected, given = normed(x, gamma), scattered(x.shape, dtype)
    call = functools.partial(rms_norm_silu, x, gamma, backend=backend_of(path))
    y = call()
    assert relative_error(y, expected) < limit(path, dtype)
    intact = untouched(x, given)
    assert call(out=given) is given
    assert call(out=x) is x
    assert intact()
    assert torch.equal(given, y)
    assert torch.equal(x, y)


def test_what_has_no_kernel_takes_the_reference() -> None:
    x, (weight, bias) = torch.randn(1, 5, 3, 3, 8), weights(8, 8, (4, 1, 1), torch.float32)
    choice = explain(causal_conv3d, x, weight, bias)
    assert str(choice) == "torch: reference (kernels exist for up to 3 taps in time, got 4)"
    reason = explain(rms_norm_silu, torch.zeros(1, 1, 1, 1, 5000), torch.zeros(5000)).reason
    assert reason == "kernels exist for up to 4096 channels, got 5000"
    frames, kernel = torch.zeros(1, 1, 14, 14, 3), weights(3 * 49, 8, (1, 1, 1), torch.float32)[0]
    reason = explain(frames_out, torch.zeros(1, 1, 2, 2, 8), kernel, None, frames, patch_size=7).reason
    assert reason == "kernels exist for up to 128 features, got 147"
    far = torch.empty(2**30 + 16).as_strided((1, 1, 2, 1, 8), (0, 0, 2**30, 8, 1))
    assert "strides below 2**30 elements" in explain(frames_out, far, kernel[:3], None, frames[:, :, :2, :1]).reason
