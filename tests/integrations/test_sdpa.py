"""``replace_sdpa``: calls of torch's attention are routed within the block, as given otherwise, and counted."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import scaled_dot_product_attention as imported_by_name

from swifti2v_kernels.integrations.sdpa import replace_sdpa
from tests.support.tolerances import PARITY, relative_error


def qkv() -> list[Tensor]:
    return [torch.randn(2, 3, 7, 8) for _ in range(3)]


class Attention(nn.Module):
    """One head-split attention; ``fail`` raises after it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.fail = False

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        if self.fail:
            raise ZeroDivisionError
        return out


@pytest.mark.parametrize("function", [imported_by_name, torch._C._nn.scaled_dot_product_attention])
def test_served_calls_equal_torch_whatever_name_they_come_under(function):
    q, k, v = qkv()
    expected = imported_by_name(q, k, v, scale=0.3)
    with replace_sdpa(backend="torch") as calls:
        actual = function(q, key=k, value=v, attn_mask=None, scale=0.3)
    assert relative_error(actual, expected) < PARITY
    assert dict(calls.implementations) == {"reference": 1}
    assert not calls.not_served
    function(q, k, v)
    assert calls.served == 1


class Labelled(Tensor):
    pass


REASONS = {
    "attn_mask is given": lambda q, k, v: ((q, k, v), {"attn_mask": torch.ones(7, 7, dtype=torch.bool)}),
    "is_causal": lambda q, k, v: ((q, k, v, None, 0.0, True), {}),
    "dropout_p is not 0": lambda q, k, v: ((q, k, v), {"dropout_p": 0.5}),
    "enable_gqa: fewer heads of keys than of queries": lambda q, k, v: (
        (q, k[:, :1], v[:, :1]),
        {"enable_gqa": True},
    ),
    "not [B, H, L, D]": lambda q, k, v: ((q[0], k[0], v[0]), {}),
    "a subclass of Tensor": lambda q, k, v: ((q, k, v.as_subclass(Labelled)), {}),
    "q, k and v differ in dtype or device": lambda q, k, v: ((q, k.double(), v), {}),
    "q, k and v differ in batch, heads or head_dim": lambda q, k, v: ((q, k, v[..., :4]), {}),
    "no keys or no channels": lambda q, k, v: ((q, k[:, :, :0], v[:, :, :0]), {}),
    "channels that are not contiguous": lambda q, k, v: ((q, k, v.mT.contiguous().mT), {}),
    "scale is not positive": lambda q, k, v: ((q, k, v), {"scale": -1.0}),
    "an input needs gradients, which no kernel computes": lambda q, k, v: ((q.requires_grad_(), k, v), {}),
    "kernels need an NVIDIA GPU or TRITON_INTERPRET=1, got cpu": lambda q, k, v: ((q, k, v), {}),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_cannot_be_served_is_torchs_own_result_and_counted_by_reason(reason):
    args, kwargs = REASONS[reason](*qkv())
    results = []
    for routing in (contextlib.nullcontext(), replace_sdpa()):
        torch.manual_seed(0)
        with routing as calls:
            try:
                results.append(F.scaled_dot_product_attention(*args, **kwargs))
            except RuntimeError as error:
                results.append(str(error))
    assert torch.equal(*results) if isinstance(results[0], Tensor) else results[0] == results[1]
    assert calls.served == 0
    assert dict(calls.not_served) == {reason: 1}
    assert f"1  not served: {reason}" in str(calls)


def test_kernels_asked_for_by_name_where_there_are_none_are_an_error():
    with replace_sdpa(backend="triton"), pytest.raises(ValueError, match="backend: 'triton' cannot take this call"):
        F.scaled_dot_product_attention(*qkv())


def test_only_calls_inside_the_module_are_routed():
    model, x = nn.Sequential(Attention()), torch.randn(2, 7, 16)
    other = Attention()
    expected = model(x)
    with replace_sdpa(model, backend="torch") as calls:
        other(x)
        F.scaled_dot_product_attention(*qkv())
        assert calls.served == 0
        assert not calls.not_served
        assert relative_error(model(x), expected) < PARITY
        other(x)
    assert calls.served == 1
    assert torch.equal(model(x), expected)


def test_an_exception_closes_the_routing_and_removes_the_hooks():
    model, x = Attention(), torch.randn(2, 7, 16)
    model.fail = True
    with replace_sdpa(model, backend="torch") as calls:
        with pytest.raises(ZeroDivisionError):
            model(x)
        F.scaled_dot_product_attention(*qkv())
        assert calls.served == 1
    with pytest.raises(ZeroDivisionError), replace_sdpa(model, backend="torch"):
        model(x)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    F.scaled_dot_product_attention(*qkv())
    assert calls.served == 1
    assert not calls.not_served


def test_a_forward_in_another_thread_does_not_open_the_block():
    model, x = Attention(), torch.randn(2, 7, 16)
    inside, leave = threading.Event(), threading.Event()

    def hold(*_):
        inside.set()
        leave.wait(20)

    with replace_sdpa(model, backend="torch") as calls:
        model.register_forward_pre_hook(hold)
        thread = threading.Thread(target=model, args=(x,))
        thread.start()
        assert inside.wait(20)
        F.scaled_dot_product_attention(*qkv())
        leave.set()
        thread.join()
    assert not calls.served
    assert not calls.not_served


def test_compiled_before_or_inside_the_block_it_is_compiled_once_more_and_not_counted():
    """Counts in compiled code would have it compiled at every run; as printed they say that they lack its calls."""
    model, x = Attention(), torch.randn(2, 7, 16)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    with torch.no_grad():
        expected = compiled(x)
        with replace_sdpa(model, backend="torch") as calls:
            for _ in range(3):
                assert relative_error(compiled(x), expected) < PARITY
        assert torch.equal(compiled(x), expected)
    assert graphs.frame_count == 2
    assert str(calls).splitlines() == ["attention calls", "       0  counted; calls in compiled code are not"]


def test_autocast_casts_as_before():
    q, k, v = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.scaled_dot_product_attention(q, k, v)
        with replace_sdpa(backend="torch") as calls:
            actual = F.scaled_dot_product_attention(q, k, v)
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert calls.served == 1
    assert relative_error(actual, expected) < 8e-3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"module": "model"}, TypeError, "module: expected a torch.nn.Module or None, got str"),
        ({"backend": "cuda"}, ValueError, "backend: expected one of auto, torch, triton, got 'cuda'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message), replace_sdpa(**arguments):
        pass
