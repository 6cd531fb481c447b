"""``python -m bench attention``: what it does without a GPU, and its measuring parts, on the CPU with small shapes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.attention.measure import by_rows, copied_bytes, table_entries
from bench.attention.providers import QUICK_SHAPES, SHAPES, call_of, providers
from bench.harness.timing import Ceilings
from bench.operators.check import randomised
from bench.operators.compare import compare_case
from bench.operators.peers import Peer
from swifti2v_kernels import segment_attention
from swifti2v_kernels.common.shapes import Model
from tests.support.bench_session import CPU, timer

SMALL = call_of("small", Model(2, 64, head_dim=16), 9, 9, 5)


def test_attention_is_held_against_float64_by_rows_and_others_concatenate() -> None:
    """Implementations that run on a CPU agree; one that leaves a source out is wrong; the others are not installed."""

    def first_source(q: Tensor, sources: Any) -> Tensor:
        return segment_attention(q, sources[:1])

    names = ("swifti2v, public function", "sdpa-flash", "flash-attn", "sageattention")
    found = [*(p for p in providers(quick=False) if p.name in names), Peer("wrong", first_source)]
    rows = {row["provider"]: row for row in compare_case(SMALL, found, CPU, timer, Ceilings(1e9, 2.0, ""), by_rows)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "swifti2v, public function": "ok", "sdpa-flash": "ok", "wrong": "wrong",
        "flash-attn": "not available", "sageattention": "not available",
    }  # fmt: skip
    assert rows["sdpa-flash"]["flops"] == 4 * 2 * 16 * 9 * 14
    assert not rows["sageattention"]["exact"]
    inputs = randomised(SMALL, CPU, real=True)
    ((q, sources), _), ((expected,), *_) = inputs, by_rows(SMALL, inputs)
    k, v = (torch.cat(side, dim=1).transpose(1, 2).double() for side in zip(*sources, strict=True))
    exact = F.scaled_dot_product_attention(q.transpose(1, 2).double(), k, v).transpose(1, 2)
    assert torch.allclose(expected, exact, rtol=1e-12, atol=1e-12)


def test_shapes_are_those_of_real_models() -> None:
    """The calls keep the lengths under which results are committed; one source is not concatenated."""
    calls = {shape.name: shape.real.inputs for shape in (*SHAPES, *QUICK_SHAPES) if shape.real}
    assert len(calls) == 11
    assert calls["CSG window 2560x1408, 3 sources"].key_lens == (14_080, 14_080, 42_240)
    assert calls["CSG causal 2560x1408, noisy queries"][:4] == (128, torch.bfloat16, (42_240,), (28_160, 42_240))
    lengths = {name: (call.heads, call.head_dim, *call.query_lens) for name, call in calls.items()}
    assert lengths["CSG window 1920x1088, 1.3B"] == (12, 128, 40_800)
    assert lengths["CSG window 2560x1408, 5B"] == (24, 128, 17_600)
    assert lengths["Stage I 640x352, 81 frames, 14B"] == (40, 128, 18_480)
    assert lengths["HunyuanVideo 1280x720, 61 frames, joint"] == (24, 128, 57_600)
    assert lengths["LTX-Video 1216x704, 121 frames"] == (32, 64, 13_376)
    assert [copied_bytes(shape) for shape in (SHAPES[0], SMALL)] == [0, 2 * 2 * 2 * 16 * 14]


def test_the_table_takes_dense_measurements_of_exact_implementations() -> None:
    shapes = [call_of("dense", Model(2, 64), 100, 100), call_of("many", Model(2, 64), 100, 50, 50)]
    rows = [
        {"shape": shape.name, "provider": name, "status": status, "exact": True, "seconds": seconds}
        for shape in shapes
        for name, status, seconds in (
            ("swifti2v", "ok", 2.0),
            ("sdpa-cudnn", "ok", 1.0),
            ("sdpa-flash", "failed", None),
        )
    ]
    key = {"capability": 90, "dtype": "bfloat16", "head_dim": 128, "tokens": 100}
    assert table_entries({"device": "new", "gpu": {"capability": [9, 0]}}, rows, shapes) == [
        {**key, "card": "new", "seconds": {"swifti2v": 2.0, "sdpa-cudnn": 1.0}}
    ]
