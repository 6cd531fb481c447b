"""The head against float64, by kernel and by torch, over awkward shapes, layouts and indices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from swifti2v_kernels import explain, project_step
from swifti2v_kernels.window.project_step import _project_step_op
from tests.support.tolerances import EXACT, KERNEL, OPERATOR, relative_error
from tests.support.window_oracle import int32, stepped, store

both = pytest.mark.parametrize("backend", ["triton", "torch"])


def head(
    width: int, z: int, patch: tuple[int, int], tokens: int, rows: int, dtype: torch.dtype, batch: int = 2
) -> list[Tensor]:
    """Returns tokens far from mean 0 amid NaN, and slices of one modulation table."""
    features = z * patch[0] * patch[1]
    buffer = torch.full((batch, tokens + 2, width + 3), float("nan"), dtype=dtype)
    x = buffer[:, 1:-1, 1:-2].copy_(3 * torch.randn(batch, tokens, width) + 5)
    weight, bias = (torch.randn(features, width) / width**0.5).to(dtype), torch.randn(features).to(dtype)
    return [x, weight, bias, *torch.randn(batch, rows, 2, width).unbind(2)]


def check(backend: str, x: Tensor, *arguments: Tensor | None, **options: Any) -> None:
    """Checks that a call leaves the float64 result in ``out``; blocks that were NaN stay so, and nothing else is."""
    out = arguments[4]
    expected = stepped(x, *arguments, **options)
    assert project_step(x, *arguments, backend=backend, **options) is out
    assert torch.equal(out.isnan(), expected.isnan())
    written = ~expected.isnan()
    coarse = max((x.dtype, out.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    limits = (KERNEL if backend == "triton" else OPERATOR) | {"float64": EXACT}
    assert relative_error(out[written], expected[written]) < limits[str(coarse).removeprefix("torch.")]


@both
@pytest.mark.parametrize("step", [None, 0.9, torch.tensor([-1.1])], ids=["velocity", "number", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("width", "z", "size", "patch"),
    [
        (96, 16, (4, 10), (2, 2)),
        (72, 48, (4, 4), (2, 2)),  # 192 features, in 256 columns
        (33, 1, (1, 1), (1, 1)),
        (40, 3, (3, 8), (3, 2)),
        (64, 33, (2, 2), (2, 2)),  # 132 features
    ],
)
def test_against_float64(
    width: int,
    z: int,
    size: tuple[int, int],
    patch: tuple[int, int],
    dtype: torch.dtype,
    step: float | Tensor | None,
    backend: str,
) -> None:
    """Targets in any order give the float64 result.

    Some blocks are no targets and have tokens of NaN, rows are repeated, and every other block of the store is NaN.
    """
    block_len = size[0] * size[1] // patch[0] // patch[1]
    x, *parameters = head(width, z, patch, 4 * block_len, 3, dtype)
    x[:, block_len : 2 * block_len] = float("nan")
    out = store(z, 6, size, torch.float32 if dtype == torch.bfloat16 else dtype)
    out[:, :, [1, 2, 4]] = float("nan")
    options: dict[str, Any] = {"latent_index": int32(5, -1, 0, 3), "block_map": int32(2, 0, 1, 1), "step": step}
    options["patch_size"] = (1, *patch)
    wide = dtype == torch.float64  # of which there is no kernel
    assert (explain(project_step, x, *parameters, out, **options).implementation == "reference") == wide
    check("auto" if wide else backend, x, *parameters, out, **options)


def test_the_velocity_is_not_rounded_before_the_update() -> None:
    """The velocity stays float32 up to the update of a 16-bit store."""
    x, *parameters = head(8, 2, (2, 2), 18, 1, torch.float16, 1)
    for backend in ("triton", "torch"):
        out = torch.randn(1, 2, 3, 4, 6, dtype=torch.float16)
        expected = stepped(x, *parameters, out, step=-0.3).half()
        assert (project_step(x, *parameters, out, step=-0.3, backend=backend) != expected).float().mean() < 0.02


@both
@pytest.mark.parametrize(("blocks", "rows"), [(1, 1), (3, 1), (3, 3)])
def test_defaults(blocks: int, rows: int, backend: str) -> None:
    """Every block of the store is a target by default, with a row for each or one for all, no bias and one entry."""
    x, weight, _, shift, scale = head(24, 2, (2, 2), blocks * 6, rows, torch.float32, 1)
    check(backend, x, weight, None, shift, scale, torch.full((1, 2, blocks, 4, 6), float("nan")))


@both
def test_surroundings_stay_untouched_and_inputs_may_be_expanded(backend: str) -> None:
    out = store(4, 3, (4, 4), torch.bfloat16)
    buffer = out.as_strided((out.untyped_storage().nbytes() // 2,), (1,), 0)
    x, weight, bias, shift, scale = head(48, 4, (2, 2), 3 * 4, 2, torch.bfloat16, 1)
    x, shift, scale = (y.expand(2, -1, -1) for y in (x, shift.half(), scale.bfloat16()))
    before = buffer.isnan()
    check(backend, x, weight, bias, shift, scale, out, block_map=int32(1, 1, 0), step=-0.7)
    assert torch.equal(buffer.isnan(), before)


def test_statistics_survive_a_large_mean() -> None:
    """A spread of 1e-2 around 1e3 survives in float32, where squares minus the square of the sum would lose it."""
    x, *parameters = head(200, 4, (2, 2), 4, 1, torch.float32)
    x.copy_(1e3 + 1e-2 * torch.randn(x.shape))
    out = torch.zeros(2, 4, 1, 4, 4)
    expected = stepped(x, *parameters, out)
    # The mean itself carries a rounding of 1e3 * 2**-24, which is 0.6 % of the spread.
    assert relative_error(project_step(x, *parameters, out), expected) < 2e-2


def test_schema_and_fake_hold() -> None:
    x, weight, bias, shift, scale = head(24, 2, (2, 2), 12, 2, torch.float16)
    out, step = torch.randn(2, 2, 5, 4, 4), torch.tensor(-0.1)
    rest = (out, int32(4, -1, 0), int32(0, 1, 1))
    torch.library.opcheck(_project_step_op, (x, weight, bias, shift, scale, *rest, step, None, (1, 2, 2), 1e-6))
    torch.library.opcheck(_project_step_op, (x, weight, None, shift, scale, *rest, None, 0.5, (1, 2, 2), 1e-6))
    torch.library.opcheck(_project_step_op, (x, weight, None, shift, scale, *rest, None, None, (1, 2, 2), 1e-6))


@both
@pytest.mark.parametrize("step", [None, -0.25, torch.tensor(-0.25)], ids=["velocity", "number", "tensor"])
def test_compiles_as_one_graph_within_a_foreign_function(step: float | Tensor | None, backend: str) -> None:
    x, *parameters = head(24, 2, (2, 2), 12, 3, torch.float32)

    def foreign(x: Tensor, out: Tensor, index: Tensor, step: float | Tensor | None) -> Tensor:
        project_step(x + 1, *parameters, out, latent_index=index, step=step, backend=backend)
        return out + 1

    out, expected_out, index = torch.zeros(2, 2, 5, 4, 4), torch.zeros(2, 2, 5, 4, 4), int32(4, -1, 0)
    torch.compiler.reset()
    compiled = torch.compile(foreign, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        actual = compiled(x, out, index, step)
        assert torch.equal(actual, foreign(x, expected_out, index, step))
        assert torch.equal(out, expected_out)
        assert out.any()
        step = None if step is None else step * 2


def test_values_that_do_not_fit_are_named_by_the_kernel_path_too() -> None:
    x, *parameters = head(24, 2, (2, 2), 8, 2, torch.float32)
    out = torch.zeros(2, 2, 5, 4, 4)
    with pytest.raises(ValueError, match=r"latent_index: expected distinct targets, got \[3, 3\]"):
        project_step(x, *parameters, out, latent_index=int32(3, 3), backend="triton")
    with pytest.raises(ValueError, match=r"block_map: expected values in 0..1, got \[0, 2\]"):
        project_step(x, *parameters, out, latent_index=int32(3, 2), block_map=int32(0, 2), backend="triton")


def test_indices_that_name_no_block_write_nothing_or_nan() -> None:
    """A GPU's indices are not read before the kernel runs: no target leaves all as it is, no row makes NaN."""
    x, *parameters = head(24, 2, (2, 2), 8, 2, torch.float32)
    for latent_index, block_map in (
        (int32(5, 2), int32(0, 1)),
        (int32(4, 2), int32(2, 1)),
        (int32(4, 2), int32(-1, 1)),
    ):
        out = torch.zeros(2, 2, 5, 4, 4)
        _project_step_op(x, *parameters, out, latent_index, block_map, None, None, (1, 2, 2), 1e-6)
        assert not out[:, :, [0, 1, 3]].any()
        assert out[:, :, 2].all()
        assert not out[:, :, 2].isnan().any()
        assert out[:, :, 4].isnan().all() if latent_index[0] == 4 else not out[:, :, 4].any()


def test_what_has_no_kernel_takes_the_reference() -> None:
    x, *parameters = head(24, 2, (2, 2), 8, 2, torch.float32)
    out = torch.zeros(2, 2, 2, 4, 4)
    assert "gradients" in explain(project_step, x.clone().requires_grad_(), *parameters, out).reason
    reason = explain(project_step, x, *parameters, out.double()).reason
    assert reason == "kernels exist for float16, bfloat16 and float32, got torch.float64"
    x, *parameters = head(24, 65, (2, 2), 8, 2, torch.float32)
    reason = explain(project_step, x, *parameters, torch.zeros(2, 65, 2, 4, 4)).reason
    assert reason == "kernels exist for at most 256 features, got 260"
