"""Checks of arguments that operators share; messages name the argument, what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

#: What tensors of numbers may be; float64 is for references alone.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def concrete(*tensors: Tensor | None) -> bool:
    """Returns whether values and addresses of these tensors can be looked at.

    They cannot while a graph is traced, in a transform of ``torch.func``, and of fake or ``meta`` tensors.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    for x in tensors:
        # A plain tensor is spared the question, which takes longer than all others about it.
        if x is not None and (x.is_meta or ((type(x) is not Tensor or torch._is_functional_tensor(x)) and is_fake(x))):
            return False
    return True


class Spec(NamedTuple):
    """The contract of one tensor, a row of the table that :func:`check_tensors` goes through.

    Attributes:
        shape: its axes: a number, or a letter for any size but 0, or a letter and ``*`` for any size.
        dtypes: one dtype or several; None for any.
        whole: True where it must be contiguous; else its last axis must be.
        last: what its last axis is, in words, for the message; empty where that may have any stride.
    """

    shape: Sequence[int | str]
    dtypes: torch.dtype | tuple[torch.dtype, ...] | None = FLOATS
    whole: bool = False
    last: str = "the channels"


def check_tensors(call: Any, device: torch.device, **specs: Spec) -> None:
    """Checks the fields of a call that are not None against their specs, in this order; see :func:`check_tensor`."""
    for name, spec in specs.items():
        x = getattr(call, name)
        if x is not None:
            check_tensor(name, x, spec, device)


def check_tensor(name: str, x: Tensor, spec: Spec, device: torch.device | None = None) -> None:
    """Checks that ``x`` is a tensor (else TypeError) as ``spec`` says, on ``device``, if any (else ValueError)."""
    shape, dtypes, whole, last = spec
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    scattered, sizes = whole and not x.is_contiguous(), x.shape
    known = dtypes is None or (x.dtype in dtypes if isinstance(dtypes, tuple) else x.dtype == dtypes)
    if not known or scattered or (device is not None and x.device != device) or not _fits(sizes, shape):
        kinds = (dtypes,) if isinstance(dtypes, torch.dtype) else dtypes
        axes = ", ".join(str(n).removesuffix("*") for n in shape)
        wanted, given = [f"contiguous [{axes}]" if whole else f"[{axes}]"], [str(list(sizes))]
        if kinds:
            wanted.append("float32, float16 or bfloat16" if kinds == FLOATS else " or ".join(map(str, kinds)))
            given.append(str(x.dtype))
        if device is not None:
            wanted.append(f"on {device}")
            given.append(f"on {x.device}")
        layout = ", not contiguous" if scattered else ""
        raise ValueError(f"{name}: expected {' '.join(wanted)}, got {' '.join(given)}{layout}")
    if last and not whole and x.stride(-1) != 1 and sizes[-1] > 1:
        raise ValueError(f"{name}: expected {last} to be contiguous (stride 1), got stride {x.stride(-1)}")


def _fits(shape: Sequence[int], wanted: Sequence[int | str]) -> bool:
    if isinstance(wanted, torch.Size) or len(shape) != len(wanted):
        return shape == wanted
    for n, m in zip(shape, wanted, strict=True):
        if (n == 0 and m[-1] != "*") if isinstance(m, str) else n != m:
            return False
    return True


def check_values(name: str, values: Tensor, low: int, high: int) -> None:
    """Checks that every value of a vector lies in ``low .. high``, on the CPU.

    On a GPU reading them would stop the stream, and checking them there would cost five launches beside every kernel:
    each operator says what it does with a value out of range instead, never an access outside its tensors.
    """
    if values.device.type == "cpu" and concrete(values):
        given = values.tolist()
        if given and (min(given) < low or max(given) > high):
            raise ValueError(f"{name}: expected values in {low}..{high}, got {given}")


def check_index(name: str, index: Tensor, length: int | None, low: int, high: int, device: torch.device) -> None:
    """Checks that ``index`` is a contiguous int32 vector on ``device`` with ``length`` entries in ``low..high``.

    Without a ``length`` it may have any number of entries but 0. For values see :func:`check_values`.
    """
    check_tensor(name, index, Spec(("T" if length is None else length,), torch.int32, whole=True), device)
    check_values(name, index, low, high)


def same_view(a: Tensor, b: Tensor) -> bool:
    """Returns whether both views name the same elements in the same order; they do if they are one tensor."""
    if a is b or not concrete(a, b):
        return a is b
    if a.data_ptr() != b.data_ptr() or a.shape != b.shape or a.dtype != b.dtype:
        return False
    # The stride of an axis of one is never used.
    return all(n == 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))


def check_written(
    call: Any, outputs: Sequence[str], targets: Mapping[str, Tensor | None] | None = None, rows: Sequence[str] = ()
) -> None:
    """Checks what a call writes, ``targets`` or by default ``outputs``, by :func:`check_targets`.

    What is read are its fields that are tensors, without ``outputs``.
    """
    inputs = {n: x for n, x in zip(call._fields, call, strict=True) if isinstance(x, Tensor) and n not in outputs}
    check_targets({n: getattr(call, n) for n in outputs} if targets is None else targets, inputs, rows)


def check_targets(
    targets: Mapping[str, Tensor | None], inputs: Mapping[str, Tensor | None], rows: Sequence[str]
) -> None:
    """Checks what is to be written: distinct elements, apart from each other and from the inputs.

    Where addresses cannot be looked at (:func:`concrete`) nothing is checked. Of the inputs ``rows`` a program reads
    all that it overwrites before it does: a target may be one of them, whole.
    """
    written = {name: x for name, x in targets.items() if x is not None}
    if not concrete(*written.values(), *inputs.values()):
        return
    for name, target in written.items():
        if self_overlapping(target):
            layout = f"shape {tuple(target.shape)}, strides {target.stride()}"
            raise ValueError(f"{name}: expected distinct elements to write to, got {layout}")
        for other, x in inputs.items():
            if x is None or (other in rows and same_view(target, x)) or not overlapping(target, x):
                continue
            allowed = f"{other} itself or memory of its own" if other in rows else "memory of its own"
            raise ValueError(f"{name}: expected {allowed}, but it overlaps {other}")
        for other, x in written.items():
            if other != name and overlapping(target, x):
                raise ValueError(f"{name}: expected memory of its own, but it overlaps {other}, which is written too")


def overlapping(a: Tensor, b: Tensor) -> bool:
    """Returns whether two strided views share an element, or may: True where that cannot be decided cheaply.

    The answer is exact for views of one dtype with the same strides, as slices of one buffer are. Addresses alone
    count, since tensors of two storages may share memory too, such as those that NumPy and DLPack lend.
    """
    if a.numel() == 0 or b.numel() == 0 or a.device != b.device or a.device.type == "meta":
        return False
    if a.data_ptr() > b.data_ptr():
        a, b = b, a
    extent = sum((n - 1) * stride for n, stride in zip(a.shape, a.stride(), strict=True))
    distance, rest = divmod(b.data_ptr() - a.data_ptr(), a.element_size())
    if distance > extent:
        return False
    if a.dtype != b.dtype or a.stride() != b.stride() or rest:
        return True
    axes = [(stride, n - 1, m - 1) for stride, n, m in zip(a.stride(), a.shape, b.shape, strict=True) if stride]
    return _reached(distance, sorted(axes, reverse=True))


def _reached(distance: int, axes: Sequence[tuple[int, int, int]]) -> bool:
    """Returns whether ``distance`` is a sum of steps: for each (stride, up, down) from ``-down`` to ``up`` strides."""
    if not axes:
        return distance == 0
    (stride, up, down), *rest = axes
    # What is left must be within reach of the smaller strides, which leaves one or two steps in a usual layout.
    most, least = sum(s * n for s, n, _ in rest), -sum(s * n for s, _, n in rest)
    first, last = max(-down, -((most - distance) // stride)), min(up, (distance - least) // stride)
    return any(_reached(distance - step * stride, rest) for step in range(first, last + 1))


def self_overlapping(x: Tensor) -> bool:
    """Returns whether two indices of ``x`` name the same element, or may."""
    needed = 1
    for stride, n in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if stride < needed:
            return True
        needed = stride * n
    return False
