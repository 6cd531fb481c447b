"""The window operators against float64, by kernel and by torch, over awkward shapes, layouts and indices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.operators.check import poisoned
from swifti2v_kernels import embed_window, explain, project_step
from swifti2v_kernels.window.embed_window import EmbedCall, _embed_window_op
from swifti2v_kernels.window.project_step import ProjectCall, _project_step_op
from tests.support.tolerances import EXACT, KERNEL, OPERATOR, relative_error
from tests.support.window_oracle import convolved, int32, stepped, store

both = pytest.mark.parametrize("backend", ["triton", "torch"])
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
steps = pytest.mark.parametrize("step", [None, 0.9, torch.tensor([-1.1])], ids=["velocity", "number", "tensor"])


def limit(backend: str, dtype: torch.dtype) -> float:
    limits = (KERNEL if backend == "triton" else OPERATOR) | {"float64": EXACT}
    return limits[str(dtype).removeprefix("torch.")]


def check_tokens(backend: str, latents: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    """Checks the tokens of a call against float64 and returns them; what it leaves unwritten would show as NaN."""
    with poisoned():
        actual = embed_window(latents, weight, bias, backend=backend, **options)
    assert actual.dtype == weight.dtype
    options.pop("out", None)
    assert relative_error(actual, convolved(latents, weight, bias, **options)) < limit(backend, weight.dtype)
    return actual


def check_step(backend: str, x: Tensor, *arguments: Tensor | None, **options: Any) -> None:
    """Checks that a call leaves the float64 result in ``out``; blocks that were NaN stay so, and nothing else is."""
    out = arguments[4]
    expected = stepped(x, *arguments, **options)
    assert project_step(x, *arguments, backend=backend, **options) is out
    assert torch.equal(out.isnan(), expected.isnan())
    written = ~expected.isnan()
    coarse = max((x.dtype, out.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    assert relative_error(out[written], expected[written]) < limit(backend, coarse)


def embedding(width: int, channels: int, patch: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns a weight and a bias."""
    weight = torch.randn(width, channels, 1, *patch) / (channels * patch[0] * patch[1]) ** 0.5
    return weight.to(dtype), torch.randn(width).to(dtype)


def head(
    width: int, z: int, tokens: int, rows: int, dtype: torch.dtype = torch.float32, batch: int = 2,
    patch: tuple[int, int] = (2, 2),
) -> list[Tensor]:  # fmt: skip
    """Returns tokens far from mean 0 amid NaN, parameters, and slices of one modulation table."""
    features = z * patch[0] * patch[1]
    buffer = torch.full((batch, tokens + 2, width + 3), float("nan"), dtype=dtype)
    x = buffer[:, 1:-1, 1:-2].copy_(3 * torch.randn(batch, tokens, width) + 5)
    weight, bias = (torch.randn(features, width) / width**0.5).to(dtype), torch.randn(features).to(dtype)
    return [x, weight, bias, *torch.randn(batch, rows, 2, width).unbind(2)]


@both
@dtypes
@pytest.mark.parametrize(
    ("width", "z", "mask_channels", "z_ref", "size", "patch"),
    [
        (96, 16, 4, 16, (4, 6), (2, 2)),  # K = 144
        (72, 48, 4, 48, (2, 4), (2, 2)),  # K = 400
        (130, 48, 0, 0, (4, 2), (2, 2)),  # K = 192
        (5, 1, 2, 3, (3, 8), (3, 4)),
        (8, 2, 0, 2, (4, 6), (2, 2)),
        (3, 1, 0, 0, (1, 1), (1, 1)),
    ],
)
def test_embedding_against_float64(
    width: int, z: int, mask_channels: int, z_ref: int, size: tuple[int, int], patch: tuple[int, int],
    dtype: torch.dtype, backend: str,
) -> None:  # fmt: skip
    """Strided stores of other dtypes give the float64 result.

    Indices are unsorted and repeated, and every block that is not named is NaN.
    """
    latents, weight_bias = store(z, 6, size, torch.float32), embedding(width, z + mask_channels + z_ref, patch, dtype)
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
    check_tokens("auto" if wide else backend, latents, *weight_bias, **options)


@both
@pytest.mark.parametrize("conditioned", [False, True])
def test_given_blocks_come_from_the_reference(conditioned: bool, backend: str) -> None:
    """Given blocks are read from the reference alone.

    Their place in the store of latents does not exist, and that of noisy ones in the reference may be NaN.
    """
    latents, reference = store(16, 2, (4, 4), torch.float32), store(16, 5, (4, 4), torch.bfloat16)
    weight, bias = embedding(96, 36 if conditioned else 16, (2, 2), torch.bfloat16)
    options: dict[str, Any] = {"latent_index": int32(-1, 1, -1, -1), "reference_index": int32(4, 3, 0, 4)}
    latents[:, :, 0] = float("nan")
    reference[:, :, [1, 2]] = float("nan")
    if conditioned:
        options["mask"] = torch.tensor([1.0, 0.0, 1.0, 1.0])
    else:
        reference[:, :, 3] = float("nan")
    check_tokens(backend, latents, weight, bias, reference=reference, **options)


@both
def test_one_reference_may_serve_all_and_what_surrounds_the_tokens_stays(backend: str) -> None:
    """Every block of the store is embedded in order by default; one image may serve the whole batch."""
    latents, reference = store(4, 3, (4, 4), torch.float32), store(4, 1, (4, 4), torch.float32, 1)
    reference = reference.expand(2, -1, 4, -1, -1)
    weight, _ = embedding(40, 9, (2, 2), torch.bfloat16)
    buffer = torch.full((2, 20, 50), float("nan"), dtype=torch.bfloat16)
    out = buffer[:, 3:15, 4:44]
    assert check_tokens(backend, latents, weight, None, out=out, reference=reference, mask=torch.zeros(3)) is out
    out.zero_()
    assert (~buffer.isnan()).sum() == out.numel()


@both
@steps
@dtypes
@pytest.mark.parametrize(
    ("width", "z", "size", "patch"),
    [
        (96, 16, (4, 10), (2, 2)),
        (72, 48, (4, 4), (2, 2)),  # 192 features, in 256 columns
        (33, 1, (1, 1), (1, 1)),
        (40, 3, (3, 8), (3, 2)),
    ],
)
def test_head_against_float64(
    width: int, z: int, size: tuple[int, int], patch: tuple[int, int], dtype: torch.dtype,
    step: float | Tensor | None, backend: str,
) -> None:  # fmt: skip
    """Targets in any order give the float64 result.

    Some blocks are no targets and have tokens of NaN, rows are repeated, and every other block of the store is NaN.
    """
    block_len = size[0] * size[1] // patch[0] // patch[1]
    x, *parameters = head(width, z, 4 * block_len, 3, dtype, patch=patch)
    x[:, block_len : 2 * block_len] = float("nan")
    out = store(z, 6, size, torch.float32 if dtype == torch.bfloat16 else dtype)
    out[:, :, [1, 2, 4]] = float("nan")
    options: dict[str, Any] = {"latent_index": int32(5, -1, 0, 3), "block_map": int32(2, 0, 1, 1), "step": step}
    options["patch_size"] = (1, *patch)
    wide = dtype == torch.float64  # of which there is no kernel
    assert (explain(project_step, x, *parameters, out, **options).implementation == "reference") == wide
    around = out._base.isnan()
    check_step("auto" if wide else backend, x, *parameters, out, **options)
    assert torch.equal(out._base.isnan(), around)


@both
def test_the_velocity_is_not_rounded_before_the_update(backend: str) -> None:
    """The velocity stays float32 up to the update of a 16-bit store."""
    x, *parameters = head(8, 2, 18, 1, torch.float16, 1)
    out = torch.randn(1, 2, 3, 4, 6, dtype=torch.float16)
    expected = stepped(x, *parameters, out, step=-0.3).half()
    assert (project_step(x, *parameters, out, step=-0.3, backend=backend) != expected).float().mean() < 0.02


@both
@pytest.mark.parametrize(("blocks", "rows"), [(1, 1), (3, 1), (3, 3)])
def test_every_block_is_a_target_by_default(blocks: int, rows: int, backend: str) -> None:
    """Each has its row of modulation, or all have one; inputs may be expanded, and there is no bias."""
    x, weight, _, shift, scale = head(24, 2, blocks * 6, rows, batch=1)
    x, shift, scale = (y.expand(2, -1, -1) for y in (x, shift.half(), scale.bfloat16()))
    check_step(backend, x, weight, None, shift, scale, torch.full((2, 2, blocks, 4, 6), float("nan")))


def test_statistics_survive_a_large_mean() -> None:
    """A spread of 1e-2 around 1e3 survives in float32, where squares minus the square of the sum would lose it."""
    x, *parameters = head(200, 4, 4, 1)
    x.copy_(1e3 + 1e-2 * torch.randn(x.shape))
    out = torch.zeros(2, 4, 1, 4, 4)
    expected = stepped(x, *parameters, out)
    # The mean itself carries a rounding of 1e3 * 2**-24, which is 0.6 % of the spread.
    assert relative_error(project_step(x, *parameters, out), expected) < 2e-2


def test_offsets_beyond_32_bits() -> None:
    """Blocks and tokens may lie 2**31 elements apart, in memory of which only their pages exist."""

    def far(*shape: int, stride: tuple[int, ...]) -> Tensor:
        return torch.empty(2**31 + 64).as_strided(shape, stride).copy_(torch.randn(shape))

    latents = far(1, 2, 2, 2, 4, stride=(0, 8, 2**31, 4, 1))
    check_tokens("triton", latents, *embedding(8, 2, (2, 2), torch.float32), latent_index=int32(1, 0))
    x, *parameters = head(8, 2, 4, 2, batch=1)
    x = far(1, 4, 8, stride=(0, 2**31 // 3, 1)).copy_(x)
    check_step("triton", x, *parameters, latents, latent_index=int32(1, 0), step=0.5)


@pytest.mark.parametrize("compute", [_embed_window_op, lambda *call: EmbedCall(*call).by_torch()])
@pytest.mark.parametrize(
    ("latent_index", "reference_index", "wrong"),
    [((2, 3, 0), (4, 3, 0), 1), ((-2, 1, 0), (4, 3, 0), 0), ((2, -1, 0), (4, 5, 0), 1), ((2, 1, 0), (4, 3, -1), 2)],
    ids=str,
)
def test_an_index_that_names_no_block_gives_nan_there_alone(
    latent_index: tuple[int, ...], reference_index: tuple[int, ...], wrong: int, compute: Callable[..., Any]
) -> None:
    """A GPU's indices are not read before it computes: a wrong one makes its own block NaN, and no other."""
    latents, reference = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 4, 5, 4, 4)
    weight_bias, out = embedding(8, 10, (2, 2), torch.float32), torch.zeros(2, 12, 8)
    indices = int32(*latent_index), int32(*reference_index)
    compute(latents, *weight_bias, reference, *indices, torch.zeros(3), out)
    for block in range(3):
        assert out[:, 4 * block : 4 * block + 4].isnan().all() == (block == wrong)
        assert out[:, 4 * block : 4 * block + 4].isnan().any() == (block == wrong)


@pytest.mark.parametrize("compute", [_project_step_op, lambda *call: ProjectCall(*call).by_torch()])
@pytest.mark.parametrize(("latent_index", "block_map"), [((5, 2), (0, 1)), ((4, 2), (2, 1)), ((4, 2), (-1, 1))])
def test_targets_that_name_no_block_write_nothing_and_rows_nan(
    latent_index: tuple[int, int], block_map: tuple[int, int], compute: Callable[..., Any]
) -> None:
    x, *parameters = head(24, 2, 8, 2)
    out = torch.zeros(2, 2, 5, 4, 4)
    compute(x, *parameters, out, int32(*latent_index), int32(*block_map), None, None, (1, 2, 2), 1e-6)
    assert not out[:, :, [0, 1, 3]].any()
    assert out[:, :, 2].all()
    assert not out[:, :, 2].isnan().any()
    assert out[:, :, 4].isnan().all() if latent_index[0] == 4 else not out[:, :, 4].any()


def test_an_overlap_is_named_by_the_kernel_path_too() -> None:
    latents, (weight, bias) = torch.randn(1, 4, 2, 8), embedding(8, 4, (1, 2), torch.float32)
    narrow = latents[:, :, :1].unsqueeze(3).expand(1, 4, 1, 1, 8)
    with pytest.raises(ValueError, match=r"out: expected memory of its own, but it overlaps latents"):
        embed_window(narrow, weight, bias, out=latents.view(1, 8, 8)[:, :4], backend="triton")


def test_what_has_no_kernel_takes_the_reference() -> None:
    latents, weight_bias = torch.randn(1, 4, 3, 4, 4), embedding(8, 4, (2, 2), torch.float32)
    assert "gradients" in explain(embed_window, latents.requires_grad_(), *weight_bias).reason
    assert embed_window(torch.empty(0, 4, 3, 4, 4), *weight_bias).shape == (0, 12, 8)
    x, *parameters = head(24, 65, 8, 2)
    reason = explain(project_step, x, *parameters, torch.zeros(2, 65, 2, 4, 4)).reason
    assert reason == "kernels exist for at most 256 features, got 260"
