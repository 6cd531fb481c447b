"""Models of diffusers before and after ``accelerate``, where no kernel runs."""

from __future__ import annotations

from typing import Any

import pytest

from bench.__main__ import main
from bench.hosts.measure import MODELS, MODES
from tests.support.bench_session import rows_of

#: How much more than the host our PyTorch path may need.
ALLOWED = 1.1


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of a run with so many tokens that logits for all pairs of them would be most of the memory."""
    out = tmp_path_factory.mktemp("hosts") / "results"
    options = ["--tokens", "576", "--milliseconds", "1", "--device", "cpu", "--out", str(out)]
    assert main(["hosts", *options]) == 0
    return rows_of(out, "hosts")


def test_every_model_has_the_host_s_row_and_ours_in_both_modes(rows: list[dict[str, Any]]) -> None:
    found = [(row["model"], row["mode"], row["provider"]) for row in rows]
    providers = ("diffusers", "accelerated, attention by PyTorch")
    assert found == [(host.name, mode, provider) for host in MODELS for mode in MODES for provider in providers]
    assert all(row["basis"] == "measured" and row["seconds"] > 0 and row["tokens"] == 576 for row in rows)


def test_memory_where_no_kernel_runs_is_the_host_s(rows: list[dict[str, Any]]) -> None:
    """Inference and gradients, padded text and none: attention by torch, without a matrix of all logits."""
    for host, ours in zip(rows[::2], rows[1::2], strict=True):
        assert host["peak_bytes"] > 2**20
        assert ours["peak_bytes"] < ALLOWED * host["peak_bytes"], (ours["model"], ours["mode"])
        assert ours["memory_ratio"] == pytest.approx(host["peak_bytes"] / ours["peak_bytes"])
