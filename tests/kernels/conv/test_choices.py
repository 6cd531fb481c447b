"""The choice of what computes a convolution, by device, dtype, measurement and version, and of its tiles.

It is a kernel, cuDNN or the reference.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from swifti2v_kernels import causal_conv3d, explain, frames_out, pretend_gpu, rms_norm_silu, upsample_conv2d
from swifti2v_kernels.common import tables, target
from swifti2v_kernels.conv import by_torch
from swifti2v_kernels.conv.by_torch import cudnn_conv3d_fault
from swifti2v_kernels.conv.checks import MAX_OWNED_CHANNELS
from swifti2v_kernels.conv.loop import ConvConfig
from tests.support.conv_oracle import convolved, weights
from tests.support.tolerances import OPERATOR, relative_error


def call_of(operator: Callable[..., Any], dtype: torch.dtype, columns: int = 96) -> tuple[Any, ...]:
    """Returns arguments for ``explain`` on a device that holds nothing: 96 channels of 2 * 20 * 30 pixels."""

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
    """A card of capability 9.0 for tensors that say that they are on it, and the list of its measurements."""
    entries: list[dict[str, Any]] = []
    for module in (by_torch, target):
        monkeypatch.setattr(module, "capability_of", lambda device: 90)
    monkeypatch.setattr(tables, "load_table", lambda name: entries if name == "conv3d" else [])
    with FakeTensorMode():
        yield entries


@pytest.mark.parametrize("operator", CONVOLUTIONS)
def test_the_choice_on_a_gpu(operator: Callable[..., Any], card: list[dict[str, Any]]) -> None:
    """The choice is made from the tensors' metadata, which say that they are on a GPU."""
    for dtype in (torch.bfloat16, torch.float16):
        choice = explain(operator, *call_of(operator, dtype))
        assert str(choice) == "triton: implicit GEMM (the kernels cover this call)"
    choice = explain(operator, *call_of(operator, torch.float32))
    assert str(choice) == "torch: cudnn (cuDNN has tensor cores for float32, the kernel has not)"
    choice = explain(operator, *call_of(operator, torch.float32), backend="triton")
    assert str(choice) == "triton: implicit GEMM (backend is 'triton')"
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
    assert str(explain(causal_conv3d, *arguments)) == "triton: implicit GEMM (SWIFTI2V_BACKEND is 'triton')"
    monkeypatch.setenv("SWIFTI2V_BACKEND", "torch")
    assert str(explain(causal_conv3d, *arguments)) == "torch: cudnn (SWIFTI2V_BACKEND is 'torch')"
    monkeypatch.setenv("SWIFTI2V_BACKEND", "cuda")
    with pytest.raises(ValueError, match="SWIFTI2V_BACKEND: expected one of auto, torch, triton, got 'cuda'"):
        explain(causal_conv3d, *arguments)


def test_what_one_program_does_not_own_is_normed_afterwards(card: list[dict[str, Any]]) -> None:
    for columns, name in ((192, "implicit GEMM"), (193, "implicit GEMM, then rms_norm_silu")):
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
    """Pretends torch 2.8.0 with cuDNN 9.10.2.

    What is known of the real ones is kept for the process, so it is forgotten.
    """
    monkeypatch.setattr(torch, "__version__", "2.8.0+cu128")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    by_torch._conv3d_works.cache_clear()
    with pretend_gpu(90):
        yield
    by_torch._conv3d_works.cache_clear()


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


@pytest.mark.parametrize("capability", [None, 80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("owned", [False, True])
def test_every_shape_has_a_configuration(owned: bool, capability: int | None) -> None:
    """Every shape has tiles that a matmul can have, and all columns of a pixel in one program for a norm."""
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
