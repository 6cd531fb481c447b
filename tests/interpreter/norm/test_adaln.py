"""The kernel of adaptive norms and gated residuals, and their reference, against plain formulas in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from swifti2v_kernels import explain, gated_residual, gated_residual_norm_modulate, norm_modulate
from swifti2v_kernels.norm.adaln import AdalnCall
from swifti2v_kernels.norm.adaln_kernel import launch
from tests.support.tolerances import EXACT, OPERATOR, relative_error

#: float64 has no kernel.
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
LIMITS = OPERATOR | {"float64": EXACT}
#: (batch, blocks, tokens a block, channels): one token, a block that no program divides, real widths and odd ones.
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 96), (1, 2, 9, 10), (1, 1, 3, 1536), (1, 2, 1, 3072), (1, 1, 2, 5120)]


def inside(values: Tensor) -> Tensor:
    """Returns the same values as a view of a larger buffer of NaN, strided in batch and tokens."""
    batch, length, channels = values.shape
    buffer = torch.full((batch + 1, length + 2, channels + 8), float("nan"), dtype=values.dtype)
    view = buffer[:batch, 1 : length + 1, 8:]
    view.copy_(values)
    return view


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Returns x, update, gate, shift and scale, and the map of blocks to their two rows."""
    batch, blocks, block_len, channels = shape
    x, update = (inside((3 * torch.randn(batch, blocks * block_len, channels) + 1).to(dtype)) for _ in range(2))
    wide = torch.promote_types(dtype, torch.float32)
    rows = torch.randn(batch, 2, 6, channels, dtype=wide).unbind(2)[:3]
    return (x, update, *rows), {"block_map": torch.randint(0, 2, (blocks,), dtype=torch.int32)}


def test_a_row_that_is_not_there_is_nan_and_reads_nothing() -> None:
    """A bad map gives NaN, as on a GPU; on the CPU the public functions refuse it."""
    x, y = torch.randn(1, 8, 96), torch.empty(1, 8, 96)
    shift, scale = torch.randn(1, 2, 2, 96).unbind(2)
    block_map = torch.tensor([1, 2, 2**30, -1], dtype=torch.int32)
    launch(AdalnCall(x, None, None, shift, scale, None, None, block_map, "rms", 1e-6, None, y))
    assert y[:, 2:].isnan().all()
    assert torch.equal(y[:, :2], norm_modulate(x[:, :2], shift[:, 1:], scale[:, 1:], norm="rms"))
    with pytest.raises(ValueError, match=r"block_map: expected values in 0..1, got \[1, 2, 1073741824, -1\]"):
        norm_modulate(x, shift, scale, block_map=block_map)


def per_token(rows: Tensor, block_map: Tensor, length: int) -> Tensor:
    """Returns the row of every token in float64, [B, L, C]."""
    return rows.double()[:, block_map.long().repeat_interleave(length // len(block_map))]


def normed(x: Tensor, norm: str, eps: float = 1e-6, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    y = x.double() - (x.double().mean(-1, keepdim=True) if norm == "layer" else 0)
    y = y / (y.square().mean(-1, keepdim=True) + eps).sqrt()
    return y if weight is None else y * weight.double() + bias.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norm_modulate(shape: tuple[int, ...], norm: str, dtype: torch.dtype) -> None:
    """Modulated, affine and both are the formula, by kernel and reference; in place and into an output are the same."""
    (x, _, _, *modulation), rows = inputs(shape, dtype)
    affine = dict(zip(("weight", "bias"), torch.randn(2, shape[-1]), strict=True))
    shift, scale = (per_token(row, rows["block_map"], x.shape[1]) for row in modulation)
    for modulated, factors in ((True, {}), (False, affine), (True, affine)):
        expected = normed(x, norm, 1e-5, **factors)
        expected = expected * (1 + scale) + shift if modulated else expected
        options: dict[str, Any] = {**factors, **(rows if modulated else {}), "norm": norm, "eps": 1e-5}
        arguments = modulation if modulated else ()
        actual = norm_modulate(x, *arguments, **options)
        for found in (actual, norm_modulate(x, *arguments, **options, backend="torch")):
            assert found.dtype == dtype
            if shape[-1] > 1:
                assert relative_error(found, expected) < LIMITS[str(dtype).removeprefix("torch.")]
            else:  # the norm of a single channel is 0, 1 or -1, whatever it is, and may cancel
                assert (found.double() - expected).abs().max() < 1e-2
        copy, out = inside(x), torch.empty_like(x)
        assert norm_modulate(copy, *arguments, **options, out=copy) is copy
        assert norm_modulate(x, *arguments, **options, out=out) is out
        assert torch.equal(copy, actual)
        assert torch.equal(out, actual)
    by_kernel = explain(norm_modulate, x, *modulation, **rows).implementation == "fused kernel"
    assert by_kernel == (dtype != torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gate", "no gate"])
def test_residual_and_norm_in_one(shape: tuple[int, ...], gated: bool, dtype: torch.dtype) -> None:
    """The fused form is the two steps, with x' rounded between them; in place equals not in place."""
    (x, update, gate, *modulation), rows = inputs(shape, dtype)
    limit = LIMITS[str(dtype).removeprefix("torch.")]
    gates, shift, scale = (per_token(row, rows["block_map"], x.shape[1]) for row in (gate, *modulation))
    gate = gate if gated else None
    for backend in ("torch", "auto"):
        x_new, y = gated_residual_norm_modulate(x, update, gate, *modulation, **rows, backend=backend)
        assert relative_error(x_new, x.double() + update.double() * (gates if gated else 1)) < limit
        assert relative_error(y, normed(x_new, "layer") * (1 + scale) + shift) < limit
    copy = inside(x)
    assert gated_residual(copy, update, gate, **(rows if gated else {}), inplace=True) is copy
    assert torch.equal(copy, x_new)
    around = x._base.clone()
    # The update's own memory may take y.
    results = gated_residual_norm_modulate(x, update, gate, *modulation, **rows, out=update, inplace=True)
    assert results[0] is x
    assert results[1] is update
    assert torch.equal(x, x_new)
    assert torch.equal(update, y)
    x.fill_(float("nan"))
    around[: x.shape[0], 1:-1, 8:] = float("nan")
    assert torch.equal(x._base.isnan(), around.isnan())  # nothing beside the view was written


def test_what_has_no_kernel_takes_the_reference() -> None:
    x = torch.randn(1, 4, 96)
    assert "gradients" in explain(norm_modulate, x, out=torch.zeros(1, 4, 96, requires_grad=True) * 1).reason
    assert "float8" in explain(norm_modulate, x.to(torch.float8_e4m3fn)).reason
    assert "float64" in explain(gated_residual, x.double(), x.double()).reason
    wide = torch.empty(1, 1, 9000)
    assert explain(gated_residual_norm_modulate, wide, wide).reason == "kernels exist for up to 8192 channels, got 9000"
    with pytest.raises(ValueError, match="backend: 'triton' cannot take this call"):
        norm_modulate(wide, backend="triton")
    assert norm_modulate(x[:, :0]).shape == (1, 0, 96)
