"""Derivatives, transforms and modes of torch around every operator, where kernels would take the plain call.

A kernel knows nothing of tangents, of batches of ``vmap``, or of gradients: taken for such a call it would give zeros
or shapes of its own. The expected derivative is a central difference of the PyTorch path in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from swifti2v_kernels import dequantize_rows, merge_attention, quantize_rows, scaled_linear, segment_attention
from swifti2v_kernels.common.dispatch import use_backend
from tests.support.differentiable_calls import CALLS, Differentiable
from tests.support.global_states import unusual_state
from tests.support.tolerances import KERNEL, relative_error

#: The error of differences of calls that take float32 alone.
COARSE = 1e-3
SMOOTH = [call for call in CALLS if call.operator is not quantize_rows]


def is_coarse(call: Differentiable) -> bool:
    """Returns whether a call takes float32 alone."""
    return call.operator in (dequantize_rows, scaled_linear) or call.name == "norm_rope by its tables"


def close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], limit: float = 5 * KERNEL["float32"]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < limit


def difference(call: Differentiable) -> tuple[tuple[Tensor, ...], float]:
    """Returns the derivative of a call in the direction of ``tensors(seed=1)``, and how exact it is."""
    coarse = is_coarse(call)
    dtype, h = (torch.float32, 1e-2) if coarse else (torch.float64, 1e-6)
    with use_backend("torch"):
        there, back = (
            call.results(*(x + s * h * t for x, t in zip(call.tensors(dtype), call.tensors(dtype, 1), strict=True)))
            for s in (1, -1)
        )
    results = tuple((a.double() - b.double()) / (2 * h) for a, b in zip(there, back, strict=True))
    return results, COARSE if coarse else 5 * KERNEL["float32"]


@pytest.mark.parametrize("call", SMOOTH, ids=lambda call: call.name)
def test_forward_derivatives_are_those_of_the_formula(call: Differentiable) -> None:
    inputs, directions = call.tensors(torch.float32), call.tensors(torch.float32, 1)
    expected, limit = difference(call)
    close(torch.func.jvp(call.results, tuple(inputs), tuple(directions))[1], expected, limit)
    close(torch.func.linearize(call.results, *inputs)[1](*directions), expected, limit)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(inputs, directions, strict=True)]
        tangents = [forward_ad.unpack_dual(x).tangent for x in call.results(*duals)]
    assert None not in tangents
    close(tuple(tangents), expected, limit)


@pytest.mark.parametrize("call", SMOOTH, ids=lambda call: call.name)
def test_gradients_are_those_of_the_formula(call: Differentiable) -> None:
    inputs, directions = call.tensors(torch.float32), call.tensors(torch.float32, 1)
    expected, limit = difference(call)
    weights = [torch.randn_like(x) for x in call.results(*inputs)]

    def weighted(*tensors: Tensor) -> Tensor:
        return sum((x * w).sum() for x, w in zip(call.results(*tensors), weights, strict=True))

    slope = sum((t * w.double()).sum() for t, w in zip(expected, weights, strict=True))
    leaves = [x.clone().requires_grad_() for x in inputs]
    by_transform = torch.func.grad(weighted, argnums=tuple(range(len(inputs))))(*inputs)
    for gradients in (torch.autograd.grad(weighted(*leaves), leaves), by_transform):
        products = [(g.double() * t.double()).sum() for g, t in zip(gradients, directions, strict=True)]
        scale = sum((t.abs() * w.double().abs()).sum() for t, w in zip(expected, weights, strict=True))
        assert abs(sum(products) - slope) < limit * scale


@pytest.mark.parametrize("call", [c for c in SMOOTH if not is_coarse(c)], ids=lambda call: call.name)
def test_second_derivatives_agree_in_every_order_of_modes(call: Differentiable) -> None:
    """Forward over forward, reverse over forward, and reverse over reverse, along one direction in float64."""
    inputs, directions = tuple(call.tensors(torch.float64)), tuple(call.tensors(torch.float64, 1))

    def at(s: Tensor) -> Tensor:
        shifted = (x + s * t for x, t in zip(inputs, directions, strict=True))
        return sum(x.sin().sum() for x in call.results(*shifted))

    def forward(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda s: torch.func.jvp(f, (s,), (torch.ones_like(s),))[1]

    zero = torch.zeros((), dtype=torch.float64)
    reverse = torch.func.grad
    expected = reverse(reverse(at))(zero)
    for first, second in ((forward, forward), (forward, reverse), (reverse, forward)):
        assert abs(second(first(at))(zero) - expected) < 1e-9 * (1 + abs(expected))


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_vmap_is_a_loop_or_is_refused(call: Differentiable) -> None:
    entries = [call.tensors(torch.float32, seed) for seed in (0, 1)]
    batch = [torch.stack(tensors) for tensors in zip(*entries, strict=True)]
    if call.name in ("frames_out", "scaled_linear out"):  # the memory that it writes to is not a batch
        with pytest.raises(RuntimeError, match="vmap: inplace arithmetic"):
            torch.func.vmap(call.results)(*batch)
        return
    expected = tuple(torch.stack(x) for x in zip(*(call.results(*tensors) for tensors in entries), strict=True))
    close(torch.func.vmap(call.results)(*batch), expected)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_results_are_the_same_in_every_global_state_and_of_fake_tensors(call: Differentiable) -> None:
    """Global states change no bit of the kernels' results; those of fake tensors have the same shapes and dtypes."""
    inputs = call.tensors(torch.float32)
    expected = call.results(*inputs)
    with unusual_state():
        found = call.results(*inputs)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    for backend in ("auto", "torch"):
        with FakeTensorMode() as mode, use_backend(backend):
            fakes = call.results(*(mode.from_tensor(x) for x in inputs))
        assert [(x.shape, x.dtype) for x in fakes] == [(x.shape, x.dtype) for x in expected]


def test_what_is_rounded_to_8_bits_has_no_derivative() -> None:
    x, direction = torch.randn(2, 3, 8)
    _, tangents = torch.func.jvp(lambda x: quantize_rows(x, torch.int8).scales, (x,), (direction,))
    assert torch.equal(tangents, torch.zeros(3))
    assert not quantize_rows(x.requires_grad_()).scales.requires_grad


def test_a_kernel_asked_for_by_name_refuses_transforms() -> None:
    call = next(call for call in CALLS if call.name == "rms_norm_silu")
    inputs = tuple(call.tensors(torch.float32))

    def by_kernel(*tensors: Tensor) -> Tensor:
        return call.operator(*tensors, backend="triton")

    with pytest.raises(ValueError, match=r"backend: 'triton' cannot take this call: a transform of torch\.func"):
        torch.func.jvp(by_kernel, inputs, inputs)
    with forward_ad.dual_level(), pytest.raises(ValueError, match="forward-mode derivatives are on"):
        by_kernel(*inputs)


@pytest.mark.parametrize("call", [c for c in CALLS if c.writes], ids=lambda call: call.name)
def test_what_is_overwritten_hands_on_no_gradient(call: Differentiable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory with a history of its own is written by PyTorch, which cuts the history off; a kernel would not."""
    leaf = torch.zeros((), requires_grad=True)
    for name in ("zeros", "zeros_like"):
        stock = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, stock=stock, **kwargs: stock(*args, **kwargs) + leaf)
    total = sum(x.sum() for x in call.results(*call.tensors(torch.float32)))
    (gradient,) = torch.autograd.grad(total + 0 * leaf, leaf)
    assert gradient == 0


def test_results_are_contiguous_whoever_computes_them() -> None:
    q = torch.randn(2, 5, 2, 64)
    for backend in ("triton", "torch"):
        out, lse = segment_attention(q, [(q, q)], return_lse=True, backend=backend)
        results = [segment_attention(q, [(q, q)], backend=backend), out, lse]
        assert all(x.is_contiguous() for x in (*results, *merge_attention([out, q], [lse, lse], backend=backend)))
