"""Modules that only look like those of the Wan DiT are left and named, and the model computes as before."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from swifti2v_kernels.integrations.probing import DIFFERS
from swifti2v_kernels.integrations.wan import accelerate, restore
from tests.integrations.wan.test_dit import _no_gradients, exact, inputs, make, untouched
from tests.support.products import half
from tests.support.tolerances import PARITY, relative_error
from tests.support.wan_original import imitate
from tests.support.wan_standin import model
from tests.support.wan_standin.attention import flash_attention
from tests.support.wan_standin.model import rope_apply

__all__ = ["_no_gradients", "exact"]

SELF, CROSS, LAYER = "WanSelfAttention", "WanT2VCrossAttention", "WanAttentionBlock"


def attends(turned: str = "qk", gate: bool = False, **options: Any) -> Callable[..., Any]:
    """Returns the forward of a self-attention that computes what its arguments say."""

    def forward(self, x, seq_lens, grid_sizes, freqs):
        q, k, v = self.heads(self.norm_q(self.q(x))), self.heads(self.norm_k(self.k(x))), self.heads(self.v(x))
        q, k = (rope_apply(t, grid_sizes, freqs) if name in turned else t for name, t in (("q", q), ("k", k)))
        y = flash_attention(q, k, v, k_lens=seq_lens, window_size=self.window_size, **options)
        return self.o(y.flatten(2)) * (torch.sigmoid(x) if gate else 1)

    return forward


def needs_a_gpu(self, x, seq_lens, grid_sizes, freqs):
    assert x.shape[1] > 14, "no GPU here"
    return attends()(self, x, seq_lens, grid_sizes, freqs)


def gated_without_padding(self, x, seq_lens, grid_sizes, freqs):
    return attends(gate=int(seq_lens.min()) == x.shape[1])(self, x, seq_lens, grid_sizes, freqs)


def then(change: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a layer's own forward with ``change`` after it."""

    def forward(self, x, e, seq_lens, grid_sizes, freqs, context, context_lens):
        y = model.WanAttentionBlock.forward(self, x, e, seq_lens, grid_sizes, freqs, context, context_lens)
        return change(self, x, y, context, context_lens)

    return forward


def written(norm: Any = None, more: tuple[Any, ...] = ()) -> Any:
    """Returns the forward of a layer that computes what its arguments say."""

    def forward(self, x, e, seq_lens, grid_sizes, freqs, context, context_lens):
        e0, e1, e2, e3, e4, e5 = (self.modulation + e).chunk(6, dim=1)
        y = self.self_attn(self.norm1(x).float() * (1 + e1) + e0, seq_lens, grid_sizes, freqs)
        x = x + y * e2
        x = x + self.cross_attn(self.norm3(x), context, context_lens, *more)
        y = self.norm2(x) if norm is None else norm(x)
        return x + self.ffn(y.float() * (1 + e4) + e3) * e5

    return forward


def test_attributes_that_can_neither_be_hashed_nor_copied_are_no_obstacle():
    host = make()
    host.blocks[0].settings = dataclasses.make_dataclass("Settings", ["names"], frozen=True)([])
    host.blocks[0].lock = threading.Lock()
    assert not accelerate(host).left


def test_a_forward_that_is_compiled_is_not_compiled_for_a_trial(monkeypatch):
    graphs = CompileCounter()
    monkeypatch.setattr(model.WanAttentionBlock, "forward", torch.compile(written(), backend=graphs))
    assert not accelerate(make()).left
    assert graphs.frame_count == 0


def clamp_context(self, x, y, context, context_lens):
    context.clamp_(-0.5, 0.5)
    return y


def scaled(self, x, context, context_lens, scale=1.0):
    return scale * model.WanT2VCrossAttention.forward(self, x, context, context_lens)


LOOKALIKES: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "keys not rotated": (SELF, DIFFERS, attends(turned="q")),
    "causal": (SELF, DIFFERS, attends(causal=True)),
    "needs a GPU": (SELF, "its forward could not be tried: AssertionError: no GPU here", needs_a_gpu),
    "gated without padding": (SELF, DIFFERS, gated_without_padding),
    "one argument more": (LAYER, DIFFERS, written(more=(0.25,))),
    "needs lengths": (LAYER, DIFFERS, then(lambda self, x, y, context, lengths: x if lengths is None else y)),
    "clamps its context": (LAYER, DIFFERS, then(clamp_context)),
    "other norm": (LAYER, DIFFERS, written(norm=lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))),
    "narrow": (LAYER, DIFFERS, then(lambda self, x, y, *_: y.to(x.dtype))),
}


@pytest.mark.parametrize("case", half(LOOKALIKES))
def test_a_lookalike_is_left_with_the_reason_and_computes_as_before(case, exact):
    host, (kind, reason, forward) = make(), LOOKALIKES[case]
    imitate(host, kind, forward)
    if case == "one argument more":
        imitate(host, CROSS, scaled)
    expected = host(*inputs())
    for dry_run in (True, False):
        report = accelerate(host, dry_run=dry_run)
        assert [(line.host, line.count, line.text) for line in report.left] == [(kind, 2, reason)]
        assert {line.host for line in report.replaced} == {SELF, CROSS, LAYER} - {kind}
        assert relative_error(host(*inputs()), expected) < PARITY
    restore(host)
    assert torch.equal(host(*inputs()), expected)


def doubling(forward: Callable[..., Any]) -> Callable[..., Any]:
    return functools.wraps(forward)(lambda *args: 2 * forward(*args))


def decorated(host: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (SELF, CROSS):
        imitate(host, kind, doubling(getattr(model, kind).forward))


def with_another_function(host: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "flash_attention", lambda q, k, v, k_lens=None, window_size=None: q)


def without_function(host: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(model, "flash_attention")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (decorated, "its forward has a decorator"),
        (with_another_function, "its flash_attention has no parameter 'q_lens'"),
        (without_function, "its module has no flash_attention"),
    ],
)
def test_an_attention_in_whose_code_ours_cannot_stand_is_left(change, reason, exact, monkeypatch):
    """Our copy of the host's code would lose what a decorator does, or call a function that is another one."""
    host, given = make(), inputs()
    change(host, monkeypatch)
    report = accelerate(host)
    assert {(line.host, line.text) for line in report.left} == {(SELF, reason), (CROSS, reason)}
    if change is decorated:
        actual = host(*given)
        restore(host)
        assert relative_error(actual, host(*given)) < PARITY


@pytest.mark.parametrize("kind", ["2.1", "2.2"])
def test_a_host_that_takes_one_form_of_modulation_is_replaced(kind, monkeypatch, exact):
    """The repositories' layers take ``e`` as of their version alone; they are proved by that."""
    forward = model.WanAttentionBlock.forward

    def one_form(self, x, e, seq_lens, grid_sizes, freqs, context, context_lens):
        assert e.ndim == (3 if kind == "2.1" else 4)
        return forward(self, x, e, seq_lens, grid_sizes, freqs, context, context_lens)

    monkeypatch.setattr(model.WanAttentionBlock, "forward", one_form)
    assert not accelerate(make()).left


def test_quantised_projections_are_no_other_form_and_not_read():
    host = make(num_layers=3)
    for block in host.blocks:
        for part in (block.ffn[0], block.self_attn.q):
            values = torch.randint(0, 99, part.weight.shape, dtype=torch.int8)
            part.weight = nn.Parameter(values, requires_grad=False)
    host.blocks[2].to("meta")
    report = accelerate(host, dry_run=True)
    assert {line.host: line.count for line in report.replaced} == {SELF: 3, CROSS: 3, LAYER: 3}
    assert untouched(host)
