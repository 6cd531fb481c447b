"""The contract of the window operators, on their PyTorch path: numbers, errors, autograd, compilation."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from swifti2v_kernels import embed_window, project_step
from swifti2v_kernels.window.embed_window import cost as embed_cost
from swifti2v_kernels.window.embed_window import embed_window_reference
from swifti2v_kernels.window.embed_window_kernel import EmbedConfig
from swifti2v_kernels.window.project_step import cost as project_cost
from swifti2v_kernels.window.project_step import project_step_reference
from swifti2v_kernels.window.project_step_kernel import ProjectConfig
from tests.support.tolerances import EXACT, OPERATOR, relative_error
from tests.support.window_oracle import convolved, int32, stepped, store

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def tolerance(dtype: torch.dtype) -> float:
    return EXACT if dtype == torch.float64 else OPERATOR[str(dtype).removeprefix("torch.")]


def embedding(**changes: Any) -> dict[str, Any]:
    """Returns a call of ``embed_window`` that is allowed: 2 + 1 + 2 channels, three blocks, one of them given."""
    return {
        "latents": torch.randn(1, 2, 4, 4, 6),
        "weight": torch.randn(8, 5, 1, 2, 2),
        "bias": torch.randn(8),
        "reference": torch.randn(1, 2, 5, 4, 6),
        "latent_index": int32(3, -1, 0),
        "reference_index": int32(4, 0, 0),
        "mask": torch.tensor([0.0, 1.0, 0.0]),
        **changes,
    }


def head(dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Any]:
    """Returns a call of ``project_step`` that is allowed: three blocks, two of them targets, two rows."""
    return {
        "x": torch.randn(1, 18, 8).to(dtype),
        "weight": torch.randn(8, 8).to(dtype),
        "bias": torch.randn(8).to(dtype),
        "shift": torch.randn(1, 2, 8),
        "scale": torch.randn(1, 2, 8),
        "out": torch.randn(1, 2, 4, 4, 6),
        "latent_index": int32(3, -1, 0),
        "block_map": int32(1, 0, 1),
        "step": -0.3,
        **changes,
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [2, 5, 4], ids=["latents alone", "mask", "no mask"])
def test_embedding_is_cat_and_convolution(channels: int, dtype: torch.dtype) -> None:
    """The tokens are those of concatenation and convolution of strided float32 stores; blocks not named are NaN."""
    latents, reference = store(2, 4, (4, 6), torch.float32), store(2, 5, (4, 6), torch.float32)
    latents[:, :, [0, 2]], reference[:, :, [1, 2]] = float("nan"), float("nan")
    weight, bias = torch.randn(8, channels, 1, 2, 2).to(dtype), torch.randn(8).to(dtype)
    options: dict[str, Any] = {"reference": reference}
    options |= {"latent_index": int32(3, -1, 1, -1, 3), "reference_index": int32(4, 0, 0, 0, 3)}
    if channels == 5:
        options["mask"] = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.7])
    tokens = embed_window(latents, weight, bias, **options)
    assert tokens.dtype == dtype
    expected = convolved(latents, weight, bias, **options)
    assert relative_error(tokens, expected) < tolerance(dtype)
    buffer = torch.full((2, 32, 8), float("nan"), dtype=dtype)
    out = buffer[:, 1:31]
    assert embed_window(latents, weight, bias, out=out, **options) is out
    assert torch.equal(out, tokens)
    assert buffer[:, [0, -1]].isnan().all()


def test_embedding_defaults_are_the_whole_store() -> None:
    latents, weight = torch.randn(2, 3, 4, 2, 6), torch.randn(5, 3, 1, 2, 3)
    assert relative_error(embed_window(latents, weight), convolved(latents, weight)) < tolerance(torch.float32)


@pytest.mark.parametrize("step", [None, -0.3, torch.tensor(-0.3), torch.tensor([0.5])], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_is_norm_linear_unpatchify_and_euler(dtype: torch.dtype, step: float | Tensor | None) -> None:
    """The step equals the four operations; tokens of a block that is no target are NaN, and so is the store besides."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out = store(2, 4, (4, 6), wide, 1)
    out[:, :, [1, 2]] = float("nan")
    call = head(dtype, out=out, step=step)
    call["x"][:, 6:12] = float("nan")
    expected = stepped(**call)
    assert project_step(**call) is out
    assert torch.equal(out.isnan(), expected.isnan())
    written = ~expected.isnan()
    assert relative_error(out[written], expected[written]) < tolerance(dtype)


def test_head_rounds_once() -> None:
    """The velocity stays float32 up to the update of a 16-bit store."""
    call = head(torch.float16, out=torch.randn(1, 2, 4, 4, 6, dtype=torch.float16))
    expected = stepped(**call).half()
    assert (project_step(**call) != expected).float().mean() < 0.02


@pytest.mark.parametrize(("rows", "block_map"), [(1, None), (3, None)])
def test_head_defaults(rows: int, block_map: None) -> None:
    call = head(shift=torch.randn(1, rows, 8), scale=torch.randn(1, rows, 8), out=torch.randn(1, 2, 3, 4, 6))
    call |= {"block_map": block_map, "latent_index": None, "bias": None}
    expected = stepped(**call)
    assert relative_error(project_step(**call), expected) < tolerance(torch.float32)


def test_indices_out_of_range_reach_nothing_else() -> None:
    """Indices out of range reach nothing else where values are not checked, as on a GPU; the references prove it."""
    call = embedding(latent_index=int32(3, 4, -2), mask=torch.zeros(3))
    tokens = embed_window_reference(*call.values()).unflatten(1, (3, -1))
    assert torch.equal(tokens.isnan().all(3).all(2)[0], torch.tensor([False, True, True]))
    assert not tokens[:, 0].isnan().any()
    call = embedding(latent_index=int32(3, -1, 0), reference_index=int32(5, 0, -1))
    tokens = embed_window_reference(*call.values()).unflatten(1, (3, -1))
    assert torch.equal(tokens.isnan().any(3).any(2)[0], torch.tensor([True, False, True]))
    call = head(latent_index=int32(4, 3, -2), block_map=int32(0, 2, 1))
    before = call["out"].clone()
    out = project_step_reference(*call.values(), (1, 2, 2), 1e-6)
    assert out[:, :, 3].isnan().all()
    assert torch.equal(out[:, :, :3], before[:, :, :3])


def test_both_compile_as_one_graph() -> None:
    window, call = embedding(), head()

    def foreign(latents: Tensor, out: Tensor) -> Tensor:
        tokens = embed_window(**{**window, "latents": 2 * latents})
        return project_step(**{**call, "x": tokens, "out": out}) + 1

    out, expected_out = call["out"].clone(), call["out"].clone()
    actual = torch.compile(foreign, fullgraph=True, backend="aot_eager")(window["latents"], out)
    assert torch.allclose(actual, foreign(window["latents"], expected_out), atol=1e-5)
    assert torch.allclose(out, expected_out, atol=1e-5)


FIVE = torch.randn(1, 2, 4, 4, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": FIVE[0]}, "latents: expected [B, z, S, h, w], no axis but B empty, got (2, 4, 4, 6)"),
        ({"latents": FIVE[:, :, :0]}, "latents: expected [B, z, S, h, w], no axis but B empty, got (1, 2, 0, 4, 6)"),
        ({"latents": FIVE.int()}, "latents: expected float32, float16 or bfloat16 (float64: torch), got torch.int32"),
        ({"latents": FIVE.mT.contiguous().mT}, "latents: expected w to be contiguous (stride 1), got stride 4"),
        (
            {"latents": FIVE[..., :5], "reference": FIVE[..., :5]},
            "latents: 4 x 5 is not a multiple of weight's patch 2 x 2",
        ),
        ({"weight": torch.ones(8, 5, 2, 2, 2)}, "weight: expected contiguous [C, C_in, 1, p, q]"),
        ({"weight": torch.ones(8, 5, 1, 2, 4)[..., ::2]}, "torch.float32 on cpu, not contiguous"),
        ({"weight": torch.ones(8, 3, 1, 2, 2)}, "weight: expected 2 channels (latents), or at least 2 + 2"),
        ({"bias": torch.ones(7)}, "bias: expected contiguous [8] torch.float32 on cpu, got [7]"),
        ({"bias": torch.ones(8).half()}, "got [8] torch.float16 on cpu"),
        ({"reference": None, "latent_index": None}, "reference_index: expected None, since there is no reference"),
        ({"reference": None, "latent_index": None, "reference_index": None}, "weight: expected 2 channels, those of"),
        ({"reference": FIVE[..., :4]}, "reference: expected [1, z, S, 4, 6] on cpu, got [1, 2, 4, 4, 4]"),
        ({"reference": FIVE.mT.contiguous().mT}, "reference: expected w to be contiguous (stride 1), got stride 4"),
        ({"reference": FIVE[:, :, :2], "reference_index": None}, "reference: expected at least 3 blocks without"),
        ({"reference": FIVE[:, :1]}, "latent_index: expected values in 0..3, got [3, -1, 0]"),
        ({"latent_index": int32(4, 0, 0)}, "latent_index: expected values in -1..3, got [4, 0, 0]"),
        ({"latent_index": int32(0, 0, 0).long()}, "latent_index: expected [T] int32 on cpu, got [3] torch.int64"),
        ({"latent_index": int32()}, "latent_index: expected [T] int32 on cpu, got [0]"),
        ({"reference_index": int32(5, 0, 0)}, "reference_index: expected values in 0..4, got [5, 0, 0]"),
        ({"reference_index": int32(0, 0)}, "reference_index: expected [3] int32 on cpu, got [2]"),
        ({"mask": None}, "mask: expected float32 [3] for weight's 1 mask channels, got None"),
        ({"mask": torch.zeros(2)}, "mask: expected contiguous [3] torch.float32 on cpu, got [2]"),
        ({"weight": torch.ones(8, 2, 1, 2, 2)}, "mask: expected None, since weight (2 channels) has no mask channels"),
        ({"out": torch.ones(1, 18, 7)}, "out: expected [1, 18, 8] torch.float32 on cpu, got [1, 18, 7]"),
        ({"out": torch.ones(1, 8, 18).mT}, "out: expected its last axis to be contiguous (stride 1), got stride 18"),
        ({"out": torch.ones(1, 1, 8).expand(1, 18, 8)}, "out: expected distinct elements"),
    ],
)
def test_embedding_names_the_argument_that_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        embed_window(**embedding(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": FIVE[0]}, "out: expected [B, z, S, h, w], no axis but B empty, got (2, 4, 4, 6)"),
        ({"out": FIVE.mT.contiguous().mT}, "out: expected w to be contiguous (stride 1), got stride 4"),
        ({"out": FIVE[:, :, :1].expand(1, 2, 4, 4, 6)}, "out: expected distinct elements"),
        ({"out": FIVE[:1, :, :2]}, "latent_index: expected values in -1..1, got [3, -1, 0]"),
        ({"patch_size": (2, 2, 2)}, "patch_size: expected (1, p, q), got (2, 2, 2)"),
        ({"patch_size": (1, 3, 2)}, "out: 4 x 6 is not a multiple of patch_size 3 x 2"),
        ({"x": torch.ones(1, 17, 8)}, "x: expected a multiple of 6 tokens, those of a block of out, got 17"),
        ({"x": torch.ones(1, 8, 18).mT}, "x: expected its last axis to be contiguous (stride 1), got stride 18"),
        ({"x": torch.ones(2, 18, 8)}, "x: expected [1, L, C] float32, float16 or bfloat16 on cpu, got [2, 18, 8]"),
        ({"weight": torch.ones(7, 8)}, "weight: expected contiguous [8, 8] torch.float32 on cpu, got [7, 8]"),
        ({"bias": torch.ones(8).half()}, "bias: expected contiguous [8] torch.float32 on cpu, got [8] torch.float16"),
        ({"shift": torch.ones(1, 2, 7)}, "shift: expected [1, R, 8]"),
        ({"scale": torch.ones(1, 3, 8)}, "scale: expected [1, 2, 8]"),
        ({"scale": torch.ones(1, 8, 2).mT}, "scale: expected its last axis to be contiguous (stride 1), got stride 2"),
        ({"block_map": int32(0, 2, 0)}, "block_map: expected values in 0..1, got [0, 2, 0]"),
        ({"block_map": None}, "shift, scale: expected 1 or 3 rows without block_map, got 2"),
        ({"latent_index": int32(3, 3, -1)}, "latent_index: expected distinct targets, got [3, 3, -1]"),
        ({"latent_index": int32(-2, 3, -1)}, "latent_index: expected values in -1..3, got [-2, 3, -1]"),
        ({"latent_index": None}, "x: expected 4 blocks as out without latent_index, got 3"),
        ({"step": torch.ones(2)}, "step: expected a number or one float32 element on cpu, got [2] torch.float32"),
        ({"step": torch.ones((), dtype=torch.int32)}, "got [] torch.int32 on cpu"),
    ],
)
def test_head_names_the_argument_that_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        project_step(**head(**changes))


def test_tensors_are_expected() -> None:
    with pytest.raises(TypeError, match="latents: expected a tensor, got list"):
        embed_window(**embedding(latents=[0.0]))
    with pytest.raises(TypeError, match="reference: expected a tensor, got list"):
        embed_window(**embedding(reference=[0.0]))
    with pytest.raises(TypeError, match="latent_index: expected an int32 tensor, got list"):
        embed_window(**embedding(latent_index=[0]))
    with pytest.raises(TypeError, match="shift: expected a tensor, got float"):
        project_step(**head(shift=0.0))
    with pytest.raises(TypeError, match="step: expected None, a number or a tensor, got list"):
        project_step(**head(step=[0.1]))


def test_outputs_that_overlap_an_input_are_refused() -> None:
    buffer = torch.randn(1, 2, 4, 8, 6)
    with pytest.raises(ValueError, match="out: expected memory of its own, but it overlaps latents"):
        embed_window(**embedding(latents=buffer[:, :, :, :4], out=buffer.view(1, -1, 8)[:, 6:24]))
    with pytest.raises(ValueError, match="out: expected memory of its own, but it overlaps x"):
        project_step(**head(out=buffer[:, :, :, :4], x=buffer.view(1, -1, 8)[:, :18]))
    with pytest.raises(ValueError, match="out: expected memory of its own, but it overlaps step"):
        project_step(**head(out=buffer[:, :, :, :4], step=buffer[0, 0, 0, 0, 0]))


def test_costs_count_what_must_move() -> None:
    window = embed_cost(2, 100, 144, 1536, mask_features=16)
    assert window.flops == 2 * 200 * 144 * 1536
    assert window.bytes_read == 200 * 128 * 4 + 1536 * 145 * 2
    assert window.bytes_written == 200 * 1536 * 2
    head = project_cost(2, 100, 1536, 64)
    assert head.flops == 2 * 200 * 1536 * 64
    assert head.bytes_read == 200 * 1536 * 2 + 64 * 1537 * 2 + 200 * 64 * 4
    assert head.bytes_written == 200 * 64 * 4
    assert project_cost(2, 100, 1536, 64, update=False).bytes_read == head.bytes_read - head.bytes_written


def test_configurations_are_pure_functions_of_the_shape() -> None:
    assert EmbedConfig.heuristic(90, 1536, 2) == EmbedConfig(64, 256, 16, 4, 2)
    assert EmbedConfig.heuristic(100, 1536, 2).block_m == 128
    assert EmbedConfig.heuristic(90, 96, 2) == EmbedConfig.heuristic(89, 1536, 2) == EmbedConfig(128, 128, 16, 8, 2)
    assert ProjectConfig.heuristic(90, 64, 2).num_warps == 4
    assert ProjectConfig.heuristic(100, 64, 2) == ProjectConfig.heuristic(90, 256, 2) == ProjectConfig(64, 32, 8, 2)
