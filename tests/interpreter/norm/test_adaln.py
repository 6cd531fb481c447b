"""The kernel of adaptive norms and gated residuals against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from swifti2v_kernels import explain, gated_residual, gated_residual_norm_modulate, norm_modulate
from swifti2v_kernels.norm.adaln import AdalnCall
from swifti2v_kernels.norm.adaln_kernel import AdalnConfig, launch_adaln
from tests.support.tolerances import OPERATOR, relative_error

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: (batch, blocks, tokens a block, channels): one token, a block that no program divides, real widths and odd ones.
SHAPES = [(1, 1, 1, 1), (1, 1, 1, 96), (2, 3, 5, 96), (1, 2, 9, 10), (1, 1, 3, 1536), (1, 2, 1, 3072), (1, 1, 2, 5120)]


def inside(values: Tensor) -> Tensor:
    """Returns the same values as a view of a larger buffer of NaN, strided in batch and tokens."""
    batch, length, channels = values.shape
    buffer = torch.full((batch + 1, length + 2, channels + 8), float("nan"), dtype=values.dtype)
    view = buffer[:batch, 1 : length + 1, 8:]
    view.copy_(values)
    return view


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    batch, blocks, block_len, channels = shape
    x, update = (inside((3 * torch.randn(batch, blocks * block_len, channels) + 1).to(dtype)) for _ in range(2))
    shift, scale, gate = torch.randn(batch, 2, 6, channels).unbind(2)[:3]
    weight, bias = torch.randn(2, channels)
    block_map = torch.randint(0, 2, (blocks,), dtype=torch.int32)
    return {
        "x": x, "update": update, "gate": gate, "shift": shift, "scale": scale, "weight": weight, "bias": bias,
        "block_map": block_map,
    }  # fmt: skip


def double(given: dict[str, Any], *names: str) -> list[Tensor]:
    return [given[name].double() for name in names]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norm_modulate(shape: tuple[int, ...], norm: str, dtype: torch.dtype) -> None:
    given = inputs(shape, dtype)
    x, shift, scale, weight, bias, block_map = (
        given[name] for name in ("x", "shift", "scale", "weight", "bias", "block_map")
    )
    rest = (None, None)
    for modulation, affine in (((shift, scale), rest), (rest, (weight, bias)), ((shift, scale), (weight, bias))):
        rows = block_map if modulation[0] is not None else None
        keywords = {"weight": affine[0], "bias": affine[1], "block_map": rows, "norm": norm, "eps": 1e-5}
        actual = norm_modulate(x, *modulation, **keywords)
        assert actual.dtype == dtype
        wide = [None if t is None else t.double() for t in (*modulation, *affine)]
        keywords |= {"weight": wide[2], "bias": wide[3], "backend": "torch"}
        expected = norm_modulate(x.double(), *wide[:2], **keywords)
        if shape[-1] > 1 or norm == "rms":
            assert relative_error(actual, expected) < OPERATOR[str(dtype).removeprefix("torch.")]
        else:  # the LayerNorm of a single channel is 0, whatever it is
            assert (actual.double() - expected).abs().max() < 1e-2
    assert explain(norm_modulate, x, shift, scale, block_map=block_map).implementation == "fused kernel"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[2:], ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gate", "no gate"])
def test_residual_and_norm_in_one(shape: tuple[int, ...], gated: bool, dtype: torch.dtype) -> None:
    """The fused form equals float64 of the two steps, with x' rounded between them; in place equals not in place."""
    given = inputs(shape, dtype)
    x, update, shift, scale, block_map = (given[name] for name in ("x", "update", "shift", "scale", "block_map"))
    gate, name = (given["gate"] if gated else None), str(dtype).removeprefix("torch.")
    x_new, y = gated_residual_norm_modulate(x, update, gate, shift, scale, block_map=block_map)
    rows = {"block_map": block_map, "backend": "torch"}
    wide = double(given, "x", "update")
    expected = wide[0] + wide[1] if gate is None else gated_residual(*wide, gate.double(), **rows)
    assert relative_error(x_new, expected) < OPERATOR[name]
    expected = norm_modulate(x_new.double(), shift.double(), scale.double(), **rows)
    assert relative_error(y, expected) < OPERATOR[name]
    rows = block_map if gated else None
    assert torch.equal(gated_residual(x, update, gate, block_map=rows), x_new)
    around = x._base.clone()
    out = update  # the update's own memory may take y
    results = gated_residual_norm_modulate(x, update, gate, shift, scale, block_map=block_map, out=out, inplace=True)
    assert results[0] is x
    assert results[1] is out
    assert torch.equal(x, x_new)
    assert torch.equal(out, y)
    x.fill_(float("nan"))
    around[: x.shape[0], 1:-1, 8:] = float("nan")
    assert torch.equal(x._base.isnan(), around.isnan())  # nothing beside the view was written


def test_in_place_forms_overwrite_x() -> None:
    """Forms in place overwrite x, with rows of batch entries and blocks of their own, chosen by a map."""
    given = inputs((2, 3, 5, 96), torch.float32)
    x, update, gate, shift, scale = (given[name] for name in ("x", "update", "gate", "shift", "scale"))
    rows = {"block_map": given["block_map"]}
    for operator, arguments in ((norm_modulate, (shift, scale)), (gated_residual, (update, gate))):
        copy = inside(x)
        expected = operator(x, *arguments, **rows)
        assert operator(copy, *arguments, **rows, inplace=True) is copy
        assert torch.equal(copy, expected)
    out = torch.empty_like(x)
    assert norm_modulate(x, shift, scale, **rows, out=out) is out
    assert torch.equal(out, norm_modulate(x, shift, scale, **rows))


def test_a_row_that_is_not_there_is_nan_and_reads_nothing() -> None:
    """A bad map gives NaN, as on a GPU; on the CPU the public functions refuse it."""
    x, y = torch.randn(1, 6, 96), torch.empty(1, 6, 96)
    table = torch.randn(1, 2, 2, 96)
    shift, scale = table.unbind(2)
    block_map = torch.tensor([1, 2, -1], dtype=torch.int32)
    launch_adaln(AdalnCall(x, None, None, shift, scale, None, None, block_map, "rms", 1e-6, None, y))
    assert y[:, 2:].isnan().all()
    assert torch.equal(y[:, :2], norm_modulate(x[:, :2], shift[:, 1:], scale[:, 1:], norm="rms"))
    with pytest.raises(ValueError, match=r"block_map: expected values in 0..1, got \[1, 2, -1\]"):
        norm_modulate(x, shift, scale, block_map=block_map)
    with pytest.raises(ValueError, match="block_map: expected None, since there is no gate, shift or scale"):
        norm_modulate(x, block_map=block_map)


def test_offsets_beyond_32_bits() -> None:
    """Two tokens may lie 2**31 elements apart, in memory of which only their pages exist."""
    apart = 2**31 + 16
    x = torch.empty(apart + 96, dtype=torch.float16).as_strided((1, 2, 96), (0, apart, 1))
    x.copy_(torch.randn(1, 2, 96))
    expected = norm_modulate(x.clone())
    assert torch.equal(norm_modulate(x, out=x), expected)


def test_what_has_no_kernel_takes_the_reference() -> None:
    x = torch.randn(1, 4, 96)
    assert "gradients" in explain(norm_modulate, x.requires_grad_()).reason
    x = x.detach()
    assert "gradients" in explain(norm_modulate, x, out=torch.zeros(1, 4, 96, requires_grad=True) * 1).reason
    assert "float8" in explain(norm_modulate, x.to(torch.float8_e4m3fn)).reason
    assert "float64" in explain(gated_residual, x.double(), x.double()).reason
    wide = torch.empty(1, 1, 9000)
    assert explain(gated_residual_norm_modulate, wide, wide).reason == "kernels exist for up to 8192 channels, got 9000"
    with pytest.raises(ValueError, match="backend: 'triton' cannot take this call"):
        norm_modulate(wide, backend="triton")
    assert norm_modulate(x[:, :0]).shape == (1, 0, 96)


def test_heuristic_gives_every_thread_at_most_32_channels() -> None:
    for channels in (96, 1536, 3072, 5120, 8192):
        block_c = 1 << (channels - 1).bit_length()
        config = AdalnConfig.heuristic(block_c)
        assert block_c / (32 * config.num_warps) <= 32
        assert config.num_warps <= 16
