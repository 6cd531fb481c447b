"""The window's embedding against float64, by kernel and by torch, over awkward shapes, layouts and indices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.operators.check import poisoned
from swifti2v_kernels import embed_window, explain
from swifti2v_kernels.window.embed_window import _embed_window_op
from tests.support.tolerances import EXACT, KERNEL, OPERATOR, relative_error
from tests.support.window_oracle import convolved, int32, store

both = pytest.mark.parametrize("backend", ["triton", "torch"])


def check(backend: str, latents: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    """Checks the tokens of a call against float64 and returns them; what it leaves unwritten would show as NaN."""
    with poisoned():
        actual = embed_window(latents, weight, bias, backend=backend, **options)
    assert actual.dtype == weight.dtype
    options.pop("out", None)
    limits = (KERNEL if backend == "triton" else OPERATOR) | {"float64": EXACT}
    error = relative_error(actual, convolved(latents, weight, bias, **options))
    assert error < limits[str(weight.dtype).removeprefix("torch.")]
    return actual


def parameters(width: int, channels: int, patch: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight = torch.randn(width, channels, 1, *patch) / (channels * patch[0] * patch[1]) ** 0.5
    return weight.to(dtype), torch.randn(width).to(dtype)


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("width", "z", "mask_channels", "z_ref", "size", "patch"),
    [
        (96, 16, 4, 16, (4, 6), (2, 2)),  # K = 144
        (72, 48, 4, 48, (2, 4), (2, 2)),  # K = 400
        (130, 48, 0, 0, (4, 2), (2, 2)),  # K = 192
        (64, 16, 0, 0, (6, 4), (2, 2)),  # K = 64
        (5, 1, 2, 3, (3, 8), (3, 4)),
        (8, 2, 0, 2, (4, 6), (2, 2)),
        (3, 1, 0, 0, (1, 1), (1, 1)),
    ],
)
def test_against_float64(
    width: int,
    z: int,
    mask_channels: int,
    z_ref: int,
    size: tuple[int, int],
    patch: tuple[int, int],
    dtype: torch.dtype,
    backend: str,
) -> None:
    """Strided stores of other dtypes give the float64 result.

    Indices are unsorted and repeated, and every block that is not named is NaN.
    """
    latents, weight_bias = store(z, 6, size, torch.float32), parameters(width, z + mask_channels + z_ref, patch, dtype)
    options: dict[str, Any] = {"latent_index": int32(5, 0, 3, 3)}
    latents[:, :, [1, 2, 4]] = float("nan")
    if z_ref:
        reference = store(z_ref, 7, size, dtype)
        reference[:, :, [0, 3, 5]] = float("nan")
        options |= {"reference": reference, "reference_index": int32(6, 2, 2, 4)}
    if mask_channels:
        options["mask"] = torch.tensor([0.0, 1.0, 0.3, 0.0])
    wide = dtype == torch.float64  # of which there is no kernel
    assert (explain(embed_window, latents, *weight_bias, **options).implementation == "reference") == wide
    check("auto" if wide else backend, latents, *weight_bias, **options)


@both
@pytest.mark.parametrize("conditioned", [False, True])
def test_given_blocks_come_from_the_reference(conditioned: bool, backend: str) -> None:
    """Given blocks are read from the reference alone.

    Their place in the store of latents does not exist, and that of noisy ones in the reference may be NaN.
    """
    latents, reference = store(16, 2, (4, 4), torch.float32), store(16, 5, (4, 4), torch.bfloat16)
    weight, bias = parameters(96, 36 if conditioned else 16, (2, 2), torch.bfloat16)
    options: dict[str, Any] = {"latent_index": int32(-1, 1, -1, -1), "reference_index": int32(4, 3, 0, 4)}
    latents[:, :, 0] = float("nan")
    reference[:, :, [1, 2]] = float("nan")
    if conditioned:
        options["mask"] = torch.tensor([1.0, 0.0, 1.0, 1.0])
    else:
        reference[:, :, 3] = float("nan")
    check(backend, latents, weight, bias, reference=reference, **options)


@both
@pytest.mark.parametrize(("blocks", "batch", "with_bias"), [(1, 1, True), (1, 2, False), (3, 2, True)])
def test_defaults(blocks: int, batch: int, with_bias: bool, backend: str) -> None:
    """Every block of the store is embedded in order by default; one token, no bias and a longer reference work."""
    size = (2, 2) if batch == 1 else (2, 6)
    latents, reference = store(2, blocks, size, torch.float16, batch), store(3, blocks + 1, size, torch.float16, batch)
    weight, bias = parameters(7, 6, (2, 2), torch.float16)
    mask = torch.ones(blocks)
    check(backend, latents, weight, bias if with_bias else None, reference=reference, mask=mask)


@both
def test_expanded_stores_and_an_output_within_a_buffer(backend: str) -> None:
    """One image may serve the whole batch, and what surrounds the output stays untouched."""
    latents, reference = store(4, 3, (4, 4), torch.float32), store(4, 1, (4, 4), torch.float32, 1)
    reference = reference.expand(2, -1, 3, -1, -1)
    weight, bias = parameters(40, 9, (2, 2), torch.bfloat16)
    buffer = torch.full((2, 20, 50), float("nan"), dtype=torch.bfloat16)
    out = buffer[:, 3:15, 4:44]
    assert check(backend, latents, weight, bias, out=out, reference=reference, mask=torch.zeros(3)) is out
    out.zero_()
    assert (~buffer.isnan()).sum() == out.numel()


@pytest.mark.parametrize(
    ("latent_index", "reference_index", "wrong"),
    [((2, 3, 0), (4, 3, 0), 1), ((-2, 1, 0), (4, 3, 0), 0), ((2, -1, 0), (4, 5, 0), 1), ((2, 1, 0), (4, 3, -1), 2)],
    ids=str,
)
def test_an_index_that_names_no_block_gives_nan_there_alone(
    latent_index: tuple[int, ...], reference_index: tuple[int, ...], wrong: int
) -> None:
    """A GPU's indices are not read before the kernel runs: a wrong one makes its own block NaN, and no other."""
    latents, reference = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 4, 5, 4, 4)
    weight, bias = parameters(8, 10, (2, 2), torch.float32)
    out = torch.zeros(2, 12, 8)
    _embed_window_op(
        latents, weight, bias, reference, int32(*latent_index), int32(*reference_index), torch.zeros(3), out
    )
    for block in range(3):
        assert out[:, 4 * block : 4 * block + 4].isnan().all() == (block == wrong)
        assert out[:, 4 * block : 4 * block + 4].isnan().any() == (block == wrong)


def test_schema_and_fake_hold() -> None:
    latents, reference = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 4, 5, 4, 4)
    weight, bias = parameters(8, 10, (2, 2), torch.float16)
    out = torch.zeros(2, 12, 8, dtype=torch.float16)
    rest = (reference, int32(2, -1, 0), int32(4, 3, 0), torch.zeros(3), out)
    torch.library.opcheck(_embed_window_op, (latents, weight, bias, *rest))
    torch.library.opcheck(_embed_window_op, (latents, weight[:, :4].contiguous(), None, None, None, None, None, out))


@both
def test_compiles_as_one_graph_within_a_foreign_function(backend: str) -> None:
    latents, reference = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 4, 5, 4, 4)
    weight, bias = parameters(8, 10, (2, 2), torch.float32)

    def foreign(latents: Tensor, reference: Tensor, index: Tensor, out: Tensor) -> Tensor:
        options = {"reference": 2 * reference, "latent_index": index, "mask": torch.zeros(3), "backend": backend}
        embed_window(latents + 1, weight, bias, out=out, **options)
        return embed_window(latents, weight, bias, **options) + out

    index, out, expected_out = int32(2, -1, 0), torch.zeros(2, 12, 8), torch.zeros(2, 12, 8)
    actual = torch.compile(foreign, fullgraph=True, backend="aot_eager")(latents, reference, index, out)
    assert torch.equal(actual, foreign(latents, reference, index, expected_out))
    assert torch.equal(out, expected_out)


def test_values_that_do_not_fit_are_named_by_the_kernel_path_too() -> None:
    latents = torch.randn(1, 4, 3, 4, 4)
    weight, bias = parameters(8, 4, (2, 2), torch.float32)
    with pytest.raises(ValueError, match=r"latent_index: expected values in 0..2, got \[0, 3\]"):
        embed_window(latents, weight, bias, latent_index=int32(0, 3), backend="triton")
    wrong = torch.randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match=r"out: expected memory of its own, but it overlaps latents"):
        embed_window(wrong[:, :, :1].unsqueeze(3).expand(1, 4, 1, 1, 8), weight[..., :1, :].contiguous(), bias,
                     out=wrong.view(1, 8, 8)[:, :4], backend="triton")  # fmt: skip


def test_what_has_no_kernel_takes_the_reference() -> None:
    latents, (weight, bias) = torch.randn(1, 4, 3, 4, 4), parameters(8, 4, (2, 2), torch.float32)
    assert "gradients" in explain(embed_window, latents.requires_grad_(), weight, bias).reason
    choice = explain(embed_window, latents.detach().double(), weight, bias)
    assert choice.reason == "kernels exist for float16, bfloat16 and float32, got torch.float64"
    empty = embed_window(torch.empty(0, 4, 3, 4, 4), weight, bias)
    assert empty.shape == (0, 12, 8)
