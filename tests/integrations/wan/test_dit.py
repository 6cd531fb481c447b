"""The original Wan code on our operators: same result before and after, other models untouched, all or nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from swifti2v_kernels.integrations.wan import accelerate, restore
from tests.support.tolerances import OPERATOR, PARITY, relative_error
from tests.support.wan_standin import attention, model

GRID = (2, 3, 4)
CROSS = {
    kind.__name__: kind for kind in (model.WanT2VCrossAttention, model.WanI2VCrossAttention, model.WanCrossAttention)
}
every_cross = pytest.mark.parametrize("cross", CROSS)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the attention of the host float32."""
    monkeypatch.setattr(attention, "ROUNDS", False)


def make(cross: str = "WanT2VCrossAttention", **options: Any) -> model.WanModel:
    torch.manual_seed(0)
    return model.WanModel(CROSS[cross], **options)


def inputs(*grids: tuple[int, int, int], seq_len: int = 24, per_token: bool = False) -> tuple[Any, ...]:
    """Returns inputs of two entries by default, with ``e`` as in 2.1 or as in 2.2."""
    torch.manual_seed(1)
    grids = grids or (GRID, GRID)
    tokens = [torch.randn(t * h * w, 64) for t, h, w in grids]
    e = 0.3 * torch.randn(len(grids), *([seq_len] if per_token else []), 6, 64)
    return tokens, list(grids), e, torch.randn(len(grids), 9, 64), seq_len


def untouched(root: nn.Module) -> bool:
    return not any("forward" in part.__dict__ for part in root.modules())


@pytest.mark.compatibility("attention", "norms", "restore", model="original Wan code", host="stand-in")
@every_cross
@pytest.mark.parametrize("features", [{}, {"norms": False}, {"attention": False}])
@pytest.mark.parametrize("per_token", [False, True], ids=["2.1", "2.2"])
def test_same_output_and_restored_bit_for_bit(cross, features, per_token, exact):
    host, given = make(cross), inputs(per_token=per_token)
    expected = host(*given)
    report = accelerate(host, **features)
    counts = {"WanSelfAttention": 2, cross: 2} if features.get("attention", True) else {}
    counts |= {"WanAttentionBlock": 2} if features.get("norms", True) else {}
    assert {line.host: line.count for line in report.replaced} == counts
    assert relative_error(host(*given), expected) < PARITY
    assert not restore(host).left
    assert untouched(host)
    assert torch.equal(host(*given), expected)


def test_padding_and_grids_that_differ_are_the_hosts(exact):
    """Norm and rotation of queries and keys are the host's for them; attention is ours, and padding is no key."""
    host = make()
    for given in (inputs(seq_len=30), inputs(GRID, (1, 3, 4), seq_len=27)):
        expected = host(*given)
        with_ours = accelerate(host)
        assert relative_error(host(*given), expected) < PARITY
        assert "norm and rotation: grids that differ, or padding after them" in str(with_ours)
        with_ours.restore()
        assert torch.equal(host(*given), expected)


@every_cross
def test_served_calls_are_counted_and_round_as_the_hosts(cross):
    host, given = make(cross), inputs(seq_len=30)
    expected = host(*given)
    attention.SEEN.clear()
    report = accelerate(host, backend="torch")
    assert relative_error(host(*given), expected) < OPERATOR["bfloat16"]
    assert report.calls.served == (6 if cross == "WanI2VCrossAttention" else 4)
    assert not report.calls.not_served
    assert not attention.SEEN


ARGUMENTS = {
    "plain": {},
    "lengths": {"k_lens": torch.tensor([7, 4])},
    "equal lengths": {"k_lens": torch.tensor([5, 5])},
    "scales": {"softmax_scale": 0.2, "q_scale": 1.5},
    "version, deterministic": {"version": 2, "deterministic": True},
    "float16": {"dtype": torch.float16},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_flash_attention_takes_and_gives_what_the_hosts_does(arguments, dtype):
    """Values agree to bfloat16's precision, dtype and shape exactly; the counts say that ours computed them."""
    function, calls = ours("torch")
    q, k, v = (torch.randn(2, n, 3, 8).to(dtype) for n in (6, 7, 7))
    expected = attention.flash_attention(q, k, v, **ARGUMENTS[arguments])
    actual = function(q, k, v, **ARGUMENTS[arguments])
    assert actual.dtype == expected.dtype == dtype
    assert relative_error(actual, expected) < OPERATOR["bfloat16"]
    assert calls.served == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"causal": True}, "causal"),
        ({"window_size": (2, 0)}, "window_size (2, 0)"),
        ({"k_lens": torch.tensor([0, 0])}, "no keys or no channels"),
    ],
)
def test_other_flash_attention_calls_are_the_hosts_own(arguments, reason):
    function, calls = ours("torch")
    q, k, v = (torch.randn(2, 7, 3, 8) for _ in range(3))
    expected = attention.flash_attention(q, k, v, **arguments)
    assert torch.equal(function(q, k, v, **arguments), expected) or expected.isnan().all()
    assert dict(calls.not_served) == {reason: 1}
    with pytest.raises(AssertionError):  # the stand-in's own
        function(q, k, v, dropout_p=0.5)
    with pytest.raises(AssertionError):
        function(q, k, v, q_lens=torch.tensor([7, 7]))
    assert calls.not_served["dropout_p is not 0"] == calls.not_served["q_lens is given"] == 1


def ours(backend: str) -> tuple[Any, Any]:
    from swifti2v_kernels.integrations.sdpa import AttentionCalls
    from swifti2v_kernels.integrations.wan.dit import Attention

    calls = AttentionCalls()
    return Attention(calls, backend).function(attention.flash_attention), calls


def test_other_models_and_the_hosts_modules_keep_their_function():
    host, other, given = make(), make(), inputs()
    names = {name: getattr(model, name) for name in dir(model)}
    accelerate(host, backend="torch")
    assert all(getattr(model, name) is value for name, value in names.items())
    attention.SEEN.clear()
    other(*given)
    assert len(attention.SEEN) == 4
    assert untouched(other)


@pytest.mark.parametrize("options", [{"qk_norm": False}, {"cross_attn_norm": False}], ids=str)
def test_models_without_some_norms(options, exact):
    """Self-attention without norms of queries and keys is the host's own, with our function in it."""
    host, given = make(**options), inputs()
    expected = host(*given)
    report = accelerate(host, backend="torch")
    assert relative_error(host(*given), expected) < OPERATOR["bfloat16"]
    assert report.calls.served == 4
    handed_back = [line.host for verb, line in report.outcomes() if verb == "handed back"]
    assert handed_back == ["WanSelfAttention"] * ("qk_norm" in options)


def test_under_autocast_the_residual_stream_is_float32_as_the_hosts():
    host, given = make(), inputs()
    given = ([x.bfloat16() for x in given[0]], *given[1:])
    with torch.autocast("cpu", torch.bfloat16):
        expected = host(*given)
        accelerate(host, backend="torch")
        actual = host(*given)
    assert actual.dtype == expected.dtype == torch.float32
    assert relative_error(actual, expected) < OPERATOR["bfloat16"]


def test_gradients_are_the_hosts(exact):
    host, given = make(), inputs()
    with torch.enable_grad():
        expected = torch.autograd.grad(host(*given).square().sum(), list(host.parameters()))
        accelerate(host)
        actual = torch.autograd.grad(host(*given).square().sum(), list(host.parameters()))
    # A bias of keys has no influence: both are rounding alone.
    for (name, _), a, b in zip(host.named_parameters(), actual, expected, strict=True):
        assert name.endswith("cross_attn.k.bias") or relative_error(a, b) < 10 * PARITY, name


def test_hooks_of_the_host_run(exact):
    """Hooks around a layer stay around ours; one inside has the host's own code called, in which it runs."""
    host, given = make(), inputs()
    expected, ran = host(*given), []

    class Watch(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            ran.append(module)
            return args, kwargs

    hooked = [host.blocks[0], host.blocks[0].norm1, host.blocks[0].self_attn.norm_q, host.blocks[0].norm2]
    for module in hooked:
        add_hook_to_module(module, Watch())
    report = accelerate(host)
    assert sum(line.count for line in report.replaced) == 6
    assert relative_error(host(*given), expected) < PARITY
    assert ran == hooked
    assert not restore(host).left
    assert torch.equal(host(*given), expected)


def test_a_layer_in_training_keeps_its_gradient_checkpointing():
    """Trainers checkpoint within a layer's own forward, which is therefore called."""
    host = make().train()
    host.blocks[1].gradient_checkpointing = True
    report = accelerate(host)
    host(*inputs())
    handed_back = [(line.host, line.text) for verb, line in report.outcomes() if verb == "handed back"]
    assert handed_back == [("WanAttentionBlock", "1 call: gradient checkpointing")]


class VaceWanAttentionBlock(model.WanAttentionBlock):
    pass


def test_unknown_relatives_are_left_and_named(capsys):
    host = make()
    host.vace = VaceWanAttentionBlock(model.WanT2VCrossAttention, 64, 2)
    report = accelerate(host, attention=False)
    assert "forward" not in host.vace.__dict__
    lines = {line.host: line.text for line in report.left}
    assert lines["VaceWanAttentionBlock"] == "not known"
    assert lines["WanSelfAttention"] == lines["WanT2VCrossAttention"] == "attention=False"
    assert capsys.readouterr().out.strip() == str(report)


def test_the_models_of_pipeline_objects_are_found(exact):
    """The two experts and what the VAE object wraps are found; a dry run changes nothing, and the last call decides."""
    pipeline = SimpleNamespace(
        high_noise_model=make(), low_noise_model=make(), vae=SimpleNamespace(model=nn.Linear(2, 2)), rank=0
    )
    report = accelerate(pipeline, dry_run=True)
    assert {x.component for x in report.replaced} == {"high_noise_model", "low_noise_model"}
    assert [(x.component, x.text) for x in report.left] == [("vae.model", "not known")]
    assert untouched(pipeline.high_noise_model)
    accelerate(pipeline)
    report.restore()
    assert not untouched(pipeline.low_noise_model)
    accelerate(pipeline, norms=False)
    assert "forward" not in pipeline.low_noise_model.blocks[0].__dict__
    assert "forward" in pipeline.low_noise_model.blocks[0].self_attn.__dict__
    restore(pipeline)
    assert untouched(pipeline.high_noise_model)
    assert untouched(pipeline.low_noise_model)


def test_a_failure_while_replacing_undoes_what_was_replaced(monkeypatch):
    first, second = make(), make()

    def refuse(self: nn.Module, name: str, value: Any) -> None:
        if name == "forward" and self is second.blocks[1].self_attn:
            raise RuntimeError("refused")
        nn.Module.__setattr__(self, name, value)

    monkeypatch.setattr(model.WanSelfAttention, "__setattr__", refuse)
    with pytest.raises(RuntimeError, match="refused"):
        accelerate(SimpleNamespace(high_noise_model=first, low_noise_model=second))
    assert untouched(first)
    assert untouched(second)


def test_bad_arguments():
    with pytest.raises(TypeError, match="model: expected a torch module, or an object that holds some, got str"):
        accelerate("wan")
    with pytest.raises(TypeError, match="model: expected a torch module"):
        restore(SimpleNamespace(rank=0))
    with pytest.raises(ValueError, match="backend: expected one of auto, torch, triton, got 'flash'"):
        accelerate(make(), backend="flash")
