"""Parts, workspace, kinds of windows and CUDA graphs of the denoising step."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.csg.denoiser import Denoiser, StepGraphs
from model.dit.workspace import plan_parts


@given(st.integers(1, 3), st.integers(1, 50), st.sets(st.integers(0, 30)), st.integers(1, 60))
def test_parts_cover_the_wanted_blocks_once_and_hold_whole_shares(batch, block_len, blocks, max_tokens):
    parts = plan_parts(batch, block_len, blocks, max_tokens)
    tokens = [(part.batch, token) for part in parts for token in range(part.start, part.stop)]
    wanted = [(b, i * block_len + j) for b in range(batch) for i in sorted(blocks) for j in range(block_len)]
    assert sorted(tokens) == wanted
    for part in parts:
        assert 0 < part.stop - part.start <= max_tokens
        assert part.first * block_len <= part.start < part.stop <= part.last * block_len
        # Either whole blocks, or a piece of one: the tokens of a part are equal shares of its blocks.
        assert part.last - part.first == 1 or (part.start, part.stop) == (part.first * block_len, part.last * block_len)


def test_parts_at_the_real_sizes():
    """A block of the 2K window has five parts for Wan 1.3B, two for the 5B; at 640x352 a part has three blocks."""
    assert [p.stop - p.start for p in plan_parts(1, 14080, range(5))] == [2816] * 25
    assert [p.stop - p.start for p in plan_parts(1, 3520, range(5))] == [1760] * 10
    assert [p.last - p.first for p in plan_parts(1, 880, range(21))] == [3] * 7
    assert plan_parts(1, 14080, ()) == []


def test_windows_of_one_shape_share_their_tensors(tiny_dit):
    latents, reference = torch.randn(1, 4, 2, 4, 6), torch.randn(1, 4, 7, 4, 6)
    options = {"latents": latents, "reference": reference, "sigmas": [1.0, 0.5, 0.0], "max_blocks": 4}
    denoiser = Denoiser(tiny_dit, torch.randn(1, 7, 16), None, **options)
    addresses = []
    for blocks in ((0, 1, 2, 3), (0, 3, 4, 5), (0, 5, 6)):
        given_blocks = len(blocks) - (2 if len(blocks) == 4 else 1)
        slots = [-1] * given_blocks + list(range(len(blocks) - given_blocks))
        denoiser.open(blocks, slots, [1.0] * given_blocks + [0.0] * (len(blocks) - given_blocks))
        window = denoiser._kinds[denoiser._key].tensors
        assert window.reference_index.tolist() == list(blocks)
        addresses.append((window.reference_index.data_ptr(), window.rope.t.data_ptr()))
        denoiser.step(1)
        assert window.modulation_index.tolist() == [0] * given_blocks + [2] * (len(blocks) - given_blocks)
    assert addresses[0] == addresses[1]
    assert addresses[0] != addresses[2]
    assert denoiser.graphs.reason == "the device is cpu"


class FakeGraph:
    """A graph that replays what was called while it was captured, as a CUDA graph does with launches."""

    def __init__(self):
        self.steps = []

    def pool(self):
        return "pool"

    def replay(self):
        for step in self.steps:
            step()


@pytest.fixture
def fake_cuda(monkeypatch):
    state = SimpleNamespace(capturing=None, pools=[], fail=None)

    @contextmanager
    def graph(target, pool=None):
        state.pools.append(pool)
        state.capturing = target
        if state.fail:
            raise RuntimeError(state.fail)
        yield
        state.capturing = None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return state


def test_the_first_step_runs_the_second_is_captured_and_all_are_computed(fake_cuda):
    graphs, done = StepGraphs(torch.device("cuda")), []

    def step(name):
        def launch():
            if fake_cuda.capturing is not None:
                fake_cuda.capturing.steps.append(lambda: done.append((name, "replayed")))
            else:
                done.append((name, "run"))

        return launch

    for name in ("a", "a", "b", "a", "b", "b"):
        graphs.run(name, step(name))
    assert done == [
        ("a", "run"), ("a", "replayed"), ("b", "run"), ("a", "replayed"), ("b", "replayed"), ("b", "replayed")
    ]  # fmt: skip
    assert fake_cuda.pools == [None, "pool"]
    assert graphs.reason is None


def test_where_capturing_fails_the_steps_run_and_the_reason_is_given(fake_cuda):
    fake_cuda.fail = "operation not permitted when stream is capturing\nmore"
    graphs, done = StepGraphs(torch.device("cuda")), []
    graphs.run("a", lambda: done.append(1))
    with pytest.warns(RuntimeWarning, match="without CUDA graphs: capturing failed: operation not permitted"):
        graphs.run("a", lambda: done.append(2))
    graphs.run("a", lambda: done.append(3))
    assert done == [1, 2, 3]
    assert graphs.reason == "capturing failed: operation not permitted when stream is capturing"
    assert StepGraphs(torch.device("cuda"), wanted=False).reason == "switched off"
