"""The contract of the window operators: errors and least costs; their numbers are in ``tests/interpreter/window``."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from swifti2v_kernels import embed_window, project_step
from swifti2v_kernels.window.cases import CASES
from tests.support.window_oracle import int32


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


def head(**changes: Any) -> dict[str, Any]:
    """Returns a call of ``project_step`` that is allowed: three blocks, two of them targets, two rows."""
    return {
        "x": torch.randn(1, 18, 8),
        "weight": torch.randn(8, 8),
        "bias": torch.randn(8),
        "shift": torch.randn(1, 2, 8),
        "scale": torch.randn(1, 2, 8),
        "out": torch.randn(1, 2, 4, 4, 6),
        "latent_index": int32(3, -1, 0),
        "block_map": int32(1, 0, 1),
        "step": -0.3,
        **changes,
    }


FIVE, STORE = torch.randn(1, 2, 4, 4, 6), "expected [B, z, S, h, w] float32, float16 or bfloat16, got"


EMBEDDING: list[tuple[dict[str, Any], str]] = [
    ({"latents": FIVE[:, :, :0]}, f"latents: {STORE} [1, 2, 0, 4, 6] torch.float32"),
    ({"latents": FIVE.mT.contiguous().mT}, "latents: expected w to be contiguous (stride 1), got stride 4"),
    ({"latents": FIVE[..., :5]}, "latents: 4 x 5 is not a multiple of weight's patch 2 x 2"),
    ({"weight": torch.ones(8, 5, 2, 2, 2)}, "weight: expected contiguous [C, C_in, 1, p, q]"),
    ({"weight": torch.ones(8, 5, 1, 2, 4)[..., ::2]}, "torch.float32 on cpu, not contiguous"),
    ({"weight": torch.ones(8, 3, 1, 2, 2)}, "weight: expected 2 channels, those of latents, or at least 2 + 2 with"),
    ({"reference": None, "latent_index": None}, "reference_index: expected None, since there is no reference"),
    (
        {"reference": None, "latent_index": None, "reference_index": None},
        "weight: expected 2 channels, those of latents; more need a reference, got 5",
    ),
    ({"reference": FIVE[..., :4]}, "reference: expected [1, z, S, 4, 6] float32, float16 or"),
    ({"reference": FIVE[:, :, :2], "reference_index": None}, "reference: expected at least 3 blocks without"),
    ({"reference": FIVE[:, :1]}, "latent_index: expected values in 0..3, got [3, -1, 0]"),
    ({"latent_index": int32(4, 0, 0)}, "latent_index: expected values in -1..3, got [4, 0, 0]"),
    ({"reference_index": int32(5, 0, 0)}, "reference_index: expected values in 0..4, got [5, 0, 0]"),
    ({"mask": None}, "mask: expected float32 [3] for weight's 1 mask channels, got None"),
    ({"weight": torch.ones(8, 2, 1, 2, 2)}, "mask: expected None for weight's 0 mask channels, got a tensor"),
    ({"out": torch.ones(1, 8, 18).mT}, "out: expected its last axis to be contiguous (stride 1), got stride 18"),
    ({"out": torch.ones(1, 1, 8).expand(1, 18, 8)}, "out: expected distinct elements"),
]
HEAD: list[tuple[dict[str, Any], str]] = [
    ({"step": [0.1]}, "step: expected None, a number or a tensor, got list"),
    ({"out": FIVE[:, :, :1].expand(1, 2, 4, 4, 6)}, "out: expected distinct elements"),
    ({"patch_size": (2, 2, 2)}, "patch_size: expected (1, p, q), got (2, 2, 2)"),
    ({"patch_size": (1, 3, 2)}, "out: 4 x 6 is not a multiple of patch_size 3 x 2"),
    ({"x": torch.ones(1, 17, 8)}, "x: expected a multiple of 6 tokens, those of a block of out, got 17"),
    ({"x": torch.ones(1, 8, 18).mT}, "x: expected its last axis to be contiguous (stride 1), got stride 18"),
    ({"scale": torch.ones(1, 3, 8)}, "scale: expected [1, 2, 8]"),
    ({"block_map": int32(0, 2, 0)}, "block_map: expected values in 0..1, got [0, 2, 0]"),
    ({"block_map": None}, "shift, scale: expected 1 or 3 rows without block_map, got 2"),
    ({"latent_index": int32(3, 3, -1)}, "latent_index: expected distinct targets, got [3, 3, -1]"),
    ({"latent_index": int32(-2, 3, -1)}, "latent_index: expected values in -1..3, got [-2, 3, -1]"),
    ({"latent_index": None}, "x: expected 4 blocks as out without latent_index, got 3"),
    ({"step": torch.ones(2)}, "step: expected a number or one float32 element on cpu, got [2] torch.float32"),
]


@pytest.mark.parametrize(
    ("call", "changes", "message"),
    [*((embedding, *bad) for bad in EMBEDDING), *((head, *bad) for bad in HEAD)],
)
def test_the_argument_that_does_not_fit_is_named(call: Any, changes: dict[str, Any], message: str) -> None:
    operator = embed_window if call is embedding else project_step
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        operator(**call(**changes))


def test_outputs_that_overlap_an_input_are_refused() -> None:
    buffer = torch.randn(1, 2, 4, 8, 6)
    with pytest.raises(ValueError, match="out: expected memory of its own, but it overlaps latents"):
        embed_window(**embedding(latents=buffer[:, :, :, :4], out=buffer.view(1, -1, 8)[:, 6:24]))
    with pytest.raises(ValueError, match="out: expected memory of its own, but it overlaps x"):
        project_step(**head(out=buffer[:, :, :, :4], x=buffer.view(1, -1, 8)[:, :18]))
    with pytest.raises(ValueError, match="out: expected memory of its own, but it overlaps step"):
        project_step(**head(out=buffer[:, :, :, :4], step=buffer[0, 0, 0, 0, 0]))


def test_the_least_costs_of_cases_are_those_counted_by_hand() -> None:
    """Latents are float32 and all else is in 16 bits; what the mask's channels hold is not read."""
    costs = {case.name: case.real.cost for case in CASES if case.real is not None}
    block = 88 * 160  # tokens
    window = costs["embed_window c1536 z16+4+16"]
    assert window.flops == 2 * (5 * block) * 144 * 1536
    assert window.bytes_read == 5 * block * 128 * 4 + 1536 * 145 * 2
    assert window.bytes_written == 5 * block * 1536 * 2
    head = costs["project_step c1536 z16"]
    assert head.flops == 2 * (3 * block) * 1536 * 64
    assert head.bytes_read == 3 * block * 1536 * 2 + 64 * 1537 * 2 + 3 * block * 64 * 4
    assert head.bytes_written == 3 * block * 64 * 4


def test_a_graph_of_any_number_of_features_is_traced_once() -> None:
    traced = []

    def backend(graph: Any, inputs: Any) -> Any:
        traced.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(project_step, fullgraph=True, dynamic=True, backend=backend)
    for z in (5, 7, 11):
        x, rows, out = torch.ones(1, 12, 40), torch.zeros(1, 3, 40), torch.zeros(1, z, 3, 4, 4)
        compiled(x, torch.ones(4 * z, 40), None, rows, rows, out)
    assert len(traced) == 1
