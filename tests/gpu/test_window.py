"""The window operators on hardware: every compiled case, captured graphs, indices out of range, and long offsets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from swifti2v_kernels import embed_window, explain, project_step
from tests.support.operator_cases import cases_of
from tests.support.tolerances import KERNEL, relative_error
from tests.support.window_oracle import convolved, int32, stepped, store

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes memory that a kernel leaves unwritten show as NaN."""
    stock = torch.empty

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        x = stock(*args, **kwargs)
        # Inductor makes leaves that require gradients.
        return x.fill_(float("nan")) if x.is_floating_point() and not x.requires_grad else x

    monkeypatch.setattr(torch, "empty", empty)


def check(actual: Tensor, expected: Tensor, *dtypes: torch.dtype) -> None:
    """Checks a result, which is NaN where the reference has it and nowhere else."""
    assert torch.equal(actual.isnan(), expected.isnan())
    written = ~expected.isnan()
    coarse = max((actual.dtype, *dtypes), key=lambda x: torch.finfo(x).eps)
    assert relative_error(actual[written], expected[written]) < KERNEL[str(coarse).removeprefix("torch.")]


def window(dtype: torch.dtype = torch.bfloat16, width: int = 1536) -> tuple[list[Tensor], dict[str, Any]]:
    """Returns Wan I2V's channels, unsorted blocks of which one is given, and NaN in those not named."""
    latents, reference = (store(16, n, (16, 24), torch.float32, device="cuda") for n in (7, 9))
    latents[:, :, [1, 2]], reference[:, :, [1, 2]] = float("nan"), float("nan")
    weight = (torch.randn(width, 36, 1, 2, 2, device="cuda") / 12).to(dtype)
    mask = torch.tensor([0.0, 1.0, 0.0, 0.0], device="cuda")
    options = {"reference": reference, "mask": mask, "latent_index": int32(6, -1, 0, 3, device="cuda")}
    options["reference_index"] = int32(8, 0, 3, 3, device="cuda")
    return [latents, weight, torch.randn(width, device="cuda").to(dtype)], options


def head(dtype: torch.dtype = torch.bfloat16, z: int = 16, width: int = 1536) -> tuple[list[Tensor], dict[str, Any]]:
    """Returns three targets of four blocks; the tokens of the other are NaN, and so are blocks that are no targets."""
    out = store(z, 7, (16, 24), torch.float32, device="cuda")
    out[:, :, [1, 2]] = float("nan")
    x = (2 * torch.randn(2, 4 * 96, width, device="cuda") + 1).to(dtype)
    x[:, 96:192] = float("nan")
    weight = (torch.randn(4 * z, width, device="cuda") / width**0.5).to(dtype)
    table = torch.randn(2, 3, 2, width, device="cuda").unbind(2)
    options = {"latent_index": int32(6, -1, 0, 3, device="cuda"), "block_map": int32(0, 1, 2, 2, device="cuda")}
    return [x, weight, torch.randn(4 * z, device="cuda").to(dtype), *table, out], options


def randomised(case: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    arguments, options = case.inputs(torch.device("cuda"))
    for x in (*arguments, options.get("reference"), options.get("mask")):
        if isinstance(x, Tensor):
            x.normal_(0.1, 0.8)
    arguments[1].mul_(arguments[1][0].numel() ** -0.5)
    return arguments, options


@pytest.mark.parametrize("case", cases_of(embed_window), ids=lambda case: case.name)
def test_every_embedding_of_the_compile_report_runs(case: Any) -> None:
    arguments, options = randomised(case)
    tokens = embed_window(*arguments, **options)
    check(tokens, convolved(*arguments, **{k: x for k, x in options.items() if k != "backend"}))


@pytest.mark.parametrize("case", cases_of(project_step), ids=lambda case: case.name)
def test_every_head_of_the_compile_report_runs(case: Any) -> None:
    arguments, options = randomised(case)
    expected = stepped(*arguments, **{k: x for k, x in options.items() if k != "backend"})
    check(project_step(*arguments, **options), expected, arguments[0].dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_poisoned_surroundings(dtype: torch.dtype) -> None:
    arguments, options = window(dtype)
    assert explain(embed_window, *arguments, **options).implementation == "fused kernel"
    buffer = torch.full((2, 386, 1544), float("nan"), device="cuda", dtype=dtype)
    out = buffer[:, 1:-1, 8:]
    check(embed_window(*arguments, out=out, **options), convolved(*arguments, **options))
    assert (~buffer.isnan()).sum() == out.numel()
    for z in (16, 48):
        arguments, options = head(dtype, z)
        for step in (None, -0.6, torch.full((1,), 0.7, device="cuda")):
            expected = stepped(*arguments, step=step, **options)
            whole = arguments[-1].as_strided((arguments[-1].untyped_storage().nbytes() // 4,), (1,), 0)
            before = whole.isnan()
            check(project_step(*arguments, step=step, **options), expected, dtype)
            assert torch.equal(whole.isnan(), before)


def test_indices_out_of_range_touch_nothing_else() -> None:
    """Indices out of range give NaN tokens, NaN velocity, or nothing written, as on the torch path."""
    arguments, options = window()
    good = embed_window(*arguments, **options).unflatten(1, (4, -1))
    wrong = options | {"latent_index": int32(6, -2, 7, 3, device="cuda")}
    wrong["reference_index"] = int32(8, 0, 3, 9, device="cuda")
    for backend in ("triton", "torch"):
        tokens = embed_window(*arguments, **wrong, backend=backend).unflatten(1, (4, -1))
        assert tokens[:, 1:].isnan().all()
        assert relative_error(tokens[:, 0], good[:, 0]) < KERNEL["bfloat16"]
    for backend in ("triton", "torch"):
        arguments, options = head()
        out = arguments[-1]
        before = out.clone()
        options |= {"latent_index": int32(7, -2, 0, 3, device="cuda"), "block_map": int32(0, 1, 3, -1, device="cuda")}
        project_step(*arguments, **options, backend=backend)
        assert out[:, :, [0, 3]].isnan().all()
        others = [1, 2, 4, 5, 6]
        assert torch.equal(out[:, :, others].nan_to_num(), before[:, :, others].nan_to_num())


def test_one_graph_steps_with_the_indices_and_sigmas_of_the_moment() -> None:
    arguments, options = window()
    head_arguments, head_options = head()
    step = torch.zeros((), device="cuda")
    out = torch.zeros(2, 384, 1536, device="cuda", dtype=torch.bfloat16)

    def run() -> None:
        embed_window(*arguments, out=out, **options)
        project_step(*head_arguments, step=step, **head_options)

    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    # Blocks of the window, and slots of the targets.
    for value, blocks, targets in ((-0.5, (3, 6, -1, 0), (0, -1, 5, 3)), (0.7, (5, -1, 3, 0), (-1, -1, 5, 4))):
        step.fill_(value)
        options["latent_index"].copy_(int32(*blocks, device="cuda"))
        head_options["latent_index"].copy_(int32(*targets, device="cuda"))
        expected = stepped(*head_arguments, step=step, **head_options)
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        check(out, convolved(*arguments, **options))
        check(head_arguments[-1], expected, torch.bfloat16)


def test_offsets_beyond_two_to_the_31_elements() -> None:
    """The last blocks of the second entry of stores, and the last tokens, may lie beyond 2**31 elements."""
    latents = torch.empty(2, 16, 72_000, 32, 32, device="cuda", dtype=torch.bfloat16)  # 2.4e9 elements, 4.4 GiB
    last = latents.shape[2] - 1
    latents[:, :, [0, last]] = torch.randn(2, 16, 2, 32, 32, device="cuda").bfloat16()
    weight = (torch.randn(96, 16, 1, 2, 2, device="cuda") / 8).bfloat16()
    index = int32(last, 0, device="cuda")
    check(embed_window(latents, weight, latent_index=index), convolved(latents, weight, latent_index=index))
    x, shift, scale = torch.randn(2, 512, 96, device="cuda").bfloat16(), *torch.randn(2, 2, 1, 96, device="cuda")
    far = torch.empty(2, 2**31 + 2**20, device="cuda", dtype=torch.bfloat16)[:, -512 * 96 :].view(2, 512, 96).copy_(x)
    weight = (torch.randn(64, 96, device="cuda") / 10).bfloat16()
    before = latents[:, :, [last, 0]].clone()
    expected = stepped(x, weight, None, shift, scale, before, step=0.5)
    project_step(far, weight, None, shift, scale, latents, latent_index=index, step=0.5)
    check(latents[:, :, [last, 0]], expected, torch.bfloat16)
    assert latents[:, :, 1].isnan().all()


def test_compiled_functions_equal_eager_ones() -> None:
    arguments, options = window()
    head_arguments, head_options = head()
    out = head_arguments.pop()

    def foreign(latents: Tensor, out: Tensor) -> Tensor:
        tokens = embed_window(2 * latents, *arguments[1:], **options)
        project_step(head_arguments[0], *head_arguments[1:], out, step=-0.5, **head_options)
        return tokens + 1

    eager_out, compiled_out = out.clone(), out.clone()
    eager = foreign(arguments[0], eager_out)
    compiled = torch.compile(foreign, fullgraph=True)(arguments[0], compiled_out)
    assert relative_error(compiled, eager) < KERNEL["bfloat16"]
    assert torch.equal(compiled_out.nan_to_num(), eager_out.nan_to_num())
