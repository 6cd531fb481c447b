"""Modules that only look like those of the Wan DiT are left and named, and the model computes as before."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from swifti2v_kernels.integrations.wan import accelerate, restore
from tests.integrations.wan.test_dit import _no_gradients, exact, inputs, make, untouched
from tests.support.products import half
from tests.support.tolerances import PARITY, relative_error
from tests.support.wan_original import imitate
from tests.support.wan_standin import attention, model
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


def by_another_name(self, x, seq_lens, grid_sizes, freqs):
    q, k, v = self.heads(self.norm_q(self.q(x))), self.heads(self.norm_k(self.k(x))), self.heads(self.v(x))
    q, k = rope_apply(q, grid_sizes, freqs), rope_apply(k, grid_sizes, freqs)
    return self.o(attention.flash_attention(q, k, v, k_lens=seq_lens, softmax_scale=0.1).flatten(2))


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


def written(gate: bool = True, norm: Any = None, more: tuple[Any, ...] = (), unpacks: bool = False) -> Any:
    """Returns the forward of a layer that computes what its arguments say."""

    def forward(self, x, e, seq_lens, grid_sizes, freqs, context, context_lens):
        e0, e1, e2, e3, e4, e5 = (self.modulation + e).chunk(6, dim=1)
        y = self.self_attn(self.norm1(x).float() * (1 + e1) + e0, seq_lens, grid_sizes, freqs)
        x = x + (y * e2 if gate else y)
        y = self.cross_attn(self.norm3(x), context, context_lens, *more)
        x = x + (y[0] if unpacks else y)
        y = self.norm2(x) if norm is None else norm(x)
        return x + self.ffn(y.float() * (1 + e4) + e3) * e5

    return forward


def clamp_context(self, x, y, context, context_lens):
    context.clamp_(-0.5, 0.5)
    return y


def scaled(self, x, context, context_lens, scale=1.0):
    return scale * model.WanT2VCrossAttention.forward(self, x, context, context_lens)


VALUES = "its forward returns something else: other values"
LOOKALIKES: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "keys not rotated": (SELF, VALUES, attends(turned="q")),
    "causal": (SELF, "it calls flash_attention in another way: True, not False", attends(causal=True)),
    "by another name": (SELF, VALUES, by_another_name),
    "needs a GPU": (SELF, "its forward could not be tried: AssertionError: no GPU here", needs_a_gpu),
    "gated without padding": (SELF, VALUES, gated_without_padding),
    "one argument more": (LAYER, VALUES, written(more=(0.25,))),
    "needs lengths": (LAYER, VALUES, then(lambda self, x, y, context, lengths: x if lengths is None else y)),
    "clamps its context": (
        LAYER,
        "its forward leaves what it is given in another state: other values",
        then(clamp_context),
    ),
    "other in training": (LAYER, VALUES, then(lambda self, x, y, *_: 2 * y if self.training else y)),
    "without gate": (LAYER, VALUES, written(gate=False)),
    "other norm": (LAYER, VALUES, written(norm=lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))),
    "narrow": (
        LAYER,
        "its forward returns something else: torch.bfloat16, not torch.float32",
        then(lambda self, x, y, *_: y.to(x.dtype)),
    ),
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


def returns_two(self, x, context, context_lens):
    q, k = self.heads(self.norm_q(self.q(x))), self.heads(self.norm_k(self.k(context)))
    return self.o(flash_attention(q, k, self.heads(self.v(context)), k_lens=context_lens).flatten(2)), context


def test_a_cross_attention_stays_the_hosts_code_whatever_it_returns(exact):
    host, given = make(), inputs()
    imitate(host, CROSS, returns_two)
    imitate(host, LAYER, written(unpacks=True))
    expected = host(*given)
    report = accelerate(host)
    assert [(line.host, line.count) for line in report.left] == [(LAYER, 2)]
    assert relative_error(host(*given), expected) < PARITY


def doubling(forward: Callable[..., Any]) -> Callable[..., Any]:
    return functools.wraps(forward)(lambda *args: 2 * forward(*args))


@pytest.mark.parametrize("kind", [SELF, CROSS])
def test_an_attention_whose_forward_is_decorated_is_left(kind, exact):
    """Our copy of the host's code would lose what the decorator does."""
    host, given = make(), inputs()
    imitate(host, kind, doubling(getattr(model, kind).forward))
    expected = host(*given)
    report = accelerate(host)
    assert [(line.host, line.text) for line in report.left] == [(kind, "its forward has a decorator")]
    assert relative_error(host(*given), expected) < PARITY


@pytest.mark.parametrize("kind", ["2.1", "2.2"])
def test_a_host_that_takes_one_form_of_modulation_is_replaced(kind, monkeypatch, exact):
    """The repositories' layers take ``e`` as of their version alone; they are proved by that."""
    forward = model.WanAttentionBlock.forward

    def one_form(self, x, e, seq_lens, grid_sizes, freqs, context, context_lens):
        assert e.ndim == (3 if kind == "2.1" else 4)
        return forward(self, x, e, seq_lens, grid_sizes, freqs, context, context_lens)

    monkeypatch.setattr(model.WanAttentionBlock, "forward", one_form)
    assert not accelerate(make()).left


def test_a_model_whose_weights_are_elsewhere_is_tried_without_them():
    host = make().to("meta")
    report = accelerate(host, dry_run=True)
    assert {line.host: line.count for line in report.replaced} == {SELF: 2, CROSS: 2, LAYER: 2}
    assert not report.left
    assert untouched(host)


def test_a_trial_calls_neither_hooks_nor_the_hosts_attention():
    host = make()
    for module in host.modules():
        module.register_forward_pre_hook(lambda *args: pytest.fail("a hook ran"))
    attention.SEEN.clear()
    state = torch.random.get_rng_state()
    report = accelerate(host, dry_run=True)
    assert len(report.replaced) == 3
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not attention.SEEN


def test_containers_of_any_kind_are_not_changed_by_a_trial(exact):
    def counting(self, x, e, *others):
        self.stats["calls"] += 1
        self.history["x"].append(len(x))
        return model.WanAttentionBlock.forward(self, x, e, *others)

    class WanAttentionBlock(model.WanAttentionBlock):
        def forward(self, x, e, seq_lens, grid_sizes, freqs, context, context_lens):
            return counting(self, x, e, seq_lens, grid_sizes, freqs, context, context_lens)

    host = make()
    for block in host.blocks:
        block.__class__, block.stats, block.history = WanAttentionBlock, Counter(), defaultdict(deque)
    assert {line.host for line in accelerate(host).replaced} == {SELF, CROSS, LAYER}
    assert [(block.stats, block.history) for block in host.blocks] == [({}, {})] * 2


@pytest.mark.slow
def test_compiled_code_of_a_host_is_not_compiled_by_a_trial(exact):
    compiled = []

    def noting(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    layer = torch.compile(model.WanAttentionBlock.forward, backend=noting)

    def forward(self, x, e, seq_lens, grid_sizes, freqs, context, context_lens):
        return layer(self, x, e, seq_lens, grid_sizes, freqs, context, context_lens)

    host = make()
    imitate(host, LAYER, forward)
    assert LAYER in {line.host for line in accelerate(host, dry_run=True).replaced}
    assert not compiled


def test_modules_that_two_models_share_are_replaced_in_the_first(exact):
    first, second, given = make(), make(), inputs()
    expected = first(*given)
    second.blocks = first.blocks
    report = accelerate(SimpleNamespace(first=first, second=second))
    text = "the same modules as in first"
    assert [(x.component, x.count, x.text) for x in report.left] == [("second", 2, text)] * 3
    assert {line.component for line in report.replaced} == {"first"}
    assert relative_error(second(*given), expected) < PARITY
    report = accelerate(first.blocks[0])
    assert {(line.host, line.text) for line in report.left} == {
        (kind, "accelerated already") for kind in (SELF, CROSS, LAYER)
    }
    restore(first)
    assert torch.equal(second(*given), expected)


def test_quantised_projections_are_no_other_form_and_not_read():
    host = make(num_layers=3)
    for block in host.blocks:
        for part in (block.ffn[0], block.self_attn.q):
            values = torch.randint(0, 99, part.weight.shape, dtype=torch.int8)
            part.weight = nn.Parameter(values, requires_grad=False)
    host.blocks[2].to("meta")
    report = accelerate(host, dry_run=True)
    assert {line.host: line.count for line in report.replaced} == {SELF: 3, CROSS: 3, LAYER: 3}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.jit")
def test_scripted_children_are_skipped():
    host = make()
    host.scripted, host.traced = torch.jit.script(nn.ReLU()), torch.jit.trace(nn.ReLU(), torch.zeros(2))
    assert not accelerate(host, dry_run=True).left
