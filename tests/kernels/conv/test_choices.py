"""The choice of what computes a convolution, by dtype, measurement and version, and of its tiles.

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

from swifti2v_kernels import causal_conv3d, explain, frames_out, pretend_gpu, upsample_conv2d
from swifti2v_kernels.common import configs, target
from swifti2v_kernels.conv import by_torch, calls
from swifti2v_kernels.conv.calls import MAX_OWNED_CHANNELS
from swifti2v_kernels.conv.loop import ConvConfig
from tests.support.conv_oracle import convolved, weights
from tests.support.tolerances import OPERATOR, relative_error

#: The operators, and what they are called in the table of measurements.
CONVOLUTIONS = {causal_conv3d: [3, 3, 3], upsample_conv2d: "upsample", frames_out: "frames"}
COVERED = "triton: implicit GEMM (the kernels cover this call)"
#: What is chosen on a GPU without a measurement, by dtype and backend.
CHOICES = {
    (torch.bfloat16, "auto"): COVERED,
    (torch.float16, "auto"): COVERED,
    (torch.float32, "auto"): "torch: cudnn (cuDNN has tensor cores for float32, the kernel has not)",
    (torch.float32, "triton"): "triton: implicit GEMM (backend is 'triton')",
    (torch.float64, "auto"): "torch: cudnn (kernels exist for float16, bfloat16 and float32, got torch.float64)",
    (torch.bfloat16, "torch"): "torch: cudnn (backend is 'torch')",
}


def choice(operator: Callable[..., Any], dtype: torch.dtype, **options: Any) -> str:
    """Returns the choice for 96 channels of 2 * 20 * 30 pixels, on a device that holds nothing."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    def weight(columns: int) -> Tensor:
        return empty(columns, 3, 3, 3, 96).permute(0, 4, 1, 2, 3)

    arguments = {
        causal_conv3d: lambda: (weight(96), empty(96)),
        upsample_conv2d: lambda: (empty(4, 96, 2, 2, 96), empty(96)),
        frames_out: lambda: (weight(3), None, empty(1, 2, 20, 30, 3, dtype=torch.uint8)),
    }[operator]()
    return str(explain(operator, empty(1, 2, 20, 30, 96), *arguments, **options))


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """A card of capability 9.0 for tensors that say that they are on it, and the list of its measurements."""
    entries: list[dict[str, Any]] = []
    for module in (calls, target):
        monkeypatch.setattr(module, "capability_of", lambda device: 90)
    monkeypatch.setattr(configs, "load_table", lambda name: entries if name == "conv3d" else [])
    with FakeTensorMode():
        yield entries


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("operator", CONVOLUTIONS)
def test_the_choice_on_a_gpu(operator: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Dtype and backend decide; the environment's backend goes before the preference for cuDNN."""
    for (dtype, backend), expected in CHOICES.items():
        assert choice(operator, dtype, backend=backend) == expected
    monkeypatch.setenv("SWIFTI2V_BACKEND", "triton")
    assert choice(operator, torch.float32) == "triton: implicit GEMM (SWIFTI2V_BACKEND is 'triton')"


@pytest.mark.parametrize("operator", CONVOLUTIONS)
def test_the_nearest_measurement_decides(operator: Callable[..., Any], card: list[dict[str, Any]]) -> None:
    def entry(pixels: int, ours: float, **changes: Any) -> dict[str, Any]:
        columns = 3 if operator is frames_out else 96
        return {
            "capability": 90, "card": "card", "dtype": "bfloat16", "kernel": CONVOLUTIONS[operator],
            "channels": [96, columns], "pixels": pixels, "seconds": {"swifti2v": ours, "cudnn": 1.0}, **changes,
        }  # fmt: skip

    others = {"dtype": "float16", "kernel": "other", "channels": [96, 384], "capability": 89}
    card += [entry(1200, 2.0, **{name: value}) for name, value in others.items()]
    assert choice(operator, torch.bfloat16) == COVERED
    card += [entry(1000, 2.0), entry(100_000, 0.5)]
    assert choice(operator, torch.bfloat16) == "torch: cudnn (fastest as measured on card at 1000 pixels)"
    assert choice(operator, torch.bfloat16, backend="triton").startswith("triton")
    card[-2]["seconds"]["swifti2v"] = 0.9
    assert choice(operator, torch.bfloat16) == COVERED


@pytest.mark.parametrize(
    ("versions", "dtype", "faulty"),
    [
        (("2.8.0+cu128", 90800), torch.float16, True),
        (("2.8.0", 90701), torch.bfloat16, False),
        (("2.9.0+cu130", 90701), torch.bfloat16, True),
        (("2.9.0a0+git1234", 91500), torch.float16, True),
        (("2.13.0a0+git1234", 91499), torch.float16, True),
        (("2.13.0", 91500), torch.float16, False),
        (("2.9.1", 90701), torch.bfloat16, False),
        (("2.9.0", 91002), torch.float32, False),
        (("2.9.0", None), torch.bfloat16, False),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:torch 2.* does 3D convolutions")
def test_what_is_known_of_3d_convolutions(
    versions: tuple[str, int | None], dtype: torch.dtype, faulty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuDNN 9.8 to 9.14 is faulty at 16 bits, and so is torch 2.9.0 with any."""
    monkeypatch.setattr(torch, "__version__", versions[0])
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: versions[1])
    assert by_torch._conv3d_works.__wrapped__(dtype) != faulty


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
    """They do so for 16 bits, with a warning once for a dtype; 3D convolutions of float32 stay."""
    x, past = torch.randn(2, 1, 2, 4, 5, 8).bfloat16().unbind()
    weight, bias = weights(16, 8, (3, 3, 3), torch.bfloat16)
    expected, stock, seen = convolved(x, weight, bias, past), F.conv3d, []

    def conv3d(x: Tensor, *args: Any) -> Tensor:
        seen.append(x.dtype)
        return stock(x, *args)

    monkeypatch.setattr(F, "conv3d", conv3d)
    message = (
        "torch 2.8.0+cu128 with cuDNN 9.10 does 3D convolutions in 16 bits wrongly on some GPUs, or slowly and in three"
        " times the memory; 2D convolutions stand in for them. cuDNN 9.15 cures it."
    )
    with pytest.warns(RuntimeWarning, match=re.escape(message)):
        y = causal_conv3d(x, weight, bias, past=past, backend="torch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(causal_conv3d(x, weight, bias, past=past, backend="torch"), y)
        assert relative_error(y, expected) < OPERATOR["bfloat16"]
        assert not seen
        x, weight, bias, past = (t.float() for t in (x, weight, bias, past))
        assert relative_error(causal_conv3d(x, weight, bias, past=past), expected) < OPERATOR["float32"]
    assert seen == [torch.float32]


@pytest.mark.parametrize("capability", [None, 80, 90, 100])
@pytest.mark.parametrize("owned", [False, True])
def test_every_shape_has_a_configuration(owned: bool, capability: int | None) -> None:
    """Every shape has tiles that a matmul can have, and all columns of a pixel in one program for a norm."""
    for columns in (3, 48, 96, 100, 160, 192, 320, 1024):
        if owned and columns > MAX_OWNED_CHANNELS:
            continue
        for channels, itemsize in ((3, 2), (96, 2), (96, 4), (512, 2)):
            config = ConvConfig.heuristic(capability, channels, columns, itemsize, owned)
            for size in (config.block_m, config.block_n, config.block_k, config.tail_n or 16):
                assert size >= 16
                assert size & (size - 1) == 0
            assert config.tail_n < config.block_n
            assert not owned or config.columns >= columns
            assert itemsize == 4 or config.columns < 2 * max(columns, 16)  # few columns are idle
