"""Checks of arguments that operators share; messages name the argument, what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
    return not any(x is not None and (x.device.type == "meta" or is_fake(x)) for x in tensors)


def check_views(name: str, views: Sequence[Tensor], like: Tensor) -> None:
    """Checks that views are ``[B, L, H, D]`` with contiguous D and fit ``like`` in all but L.

    Raises:
        TypeError: not a tensor.
        ValueError: shape, dtype, device or layout do not fit.
    """
    batch, _, heads, head_dim = like.shape
    for i, x in enumerate(views):
        label = name if len(views) == 1 else f"{name}[{i}]"
        if not isinstance(x, Tensor):
            raise TypeError(f"{label}: expected a tensor, got {type(x).__name__}")
        if x.ndim != 4 or (x.shape[0], x.shape[2], x.shape[3]) != (batch, heads, head_dim):
            raise ValueError(f"{label}: expected [{batch}, L, {heads}, {head_dim}], got {tuple(x.shape)}")
        if x.dtype != like.dtype or x.device != like.device:
            raise ValueError(f"{label}: expected {like.dtype} on {like.device}, got {x.dtype} on {x.device}")
        if x.shape[3] > 1 and x.stride(3) != 1:
            raise ValueError(f"{label}: expected head_dim to be contiguous (stride 1), got stride {x.stride(3)}")


def check_range(name: str, values: Tensor, low: int, high: int) -> None:
    """Checks that every value of a vector lies in ``low .. high``.

    On the CPU the values are read and named. On a GPU, reading them would stop the stream, so the check runs there: a
    violation ends the process's CUDA work with the message. Under ``torch.compile`` likewise. Where values cannot be
    looked at (:func:`concrete`) nothing is checked.

    Raises:
        ValueError: a value on the CPU is out of range.
    """
    if not concrete(values):
        if torch.compiler.is_compiling():
            _check_range_there(name, values, low, high)
    elif values.device.type != "cpu":
        _check_range_there(name, values, low, high)
    elif any(not low <= value <= high for value in values.tolist()):
        raise ValueError(f"{name}: expected values in {low}..{high}, got {values.tolist()}")


def _check_range_there(name: str, values: Tensor, low: int, high: int) -> None:
    torch._assert_async(((values >= low) & (values <= high)).all(), f"{name}: a value lies outside {low}..{high}")


def check_index(name: str, index: Tensor, length: int | None, low: int, high: int, device: torch.device) -> None:
    """Checks that ``index`` is a contiguous int32 vector on ``device`` with ``length`` entries in ``low..high``.

    Without a ``length`` it may have any number of entries but 0.

    Values are read and checked on the CPU only. On a GPU that would stop the stream, and checking them there would cost
    five launches beside every kernel: each operator says what it does with an entry out of range instead (NaN, or
    nothing written), never an access outside its tensors.

    Raises:
        TypeError: not a tensor.
        ValueError: shape, dtype, device or, on the CPU, a value does not fit.
    """
    if not isinstance(index, Tensor):
        raise TypeError(f"{name}: expected an int32 tensor, got {type(index).__name__}")
    fits = index.ndim == 1 and index.shape[0] > 0 and length in (None, index.shape[0])
    if not fits or index.dtype != torch.int32 or index.device != device or not index.is_contiguous():
        layout = "" if index.is_contiguous() else ", not contiguous"
        raise ValueError(
            f"{name}: expected [{'T' if length is None else length}] int32 on {device},"
            f" got {list(index.shape)} {index.dtype} on {index.device}{layout}"
        )
    if index.device.type == "cpu" and concrete(index):
        check_range(name, index, low, high)


def check_store(name: str, store: Tensor, like: Tensor | None = None) -> None:
    """Checks that a store is ``[B, z, S, h, w]`` with contiguous w and a block, and fits ``like`` in B, h, w, device.

    Raises:
        TypeError: not a tensor.
        ValueError: shape, dtype, device or layout do not fit.
    """
    if not isinstance(store, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(store).__name__}")
    if store.ndim != 5 or 0 in store.shape[1:]:
        raise ValueError(f"{name}: expected [B, z, S, h, w], no axis but B empty, got {tuple(store.shape)}")
    if store.dtype not in FLOATS:
        raise ValueError(f"{name}: expected float32, float16 or bfloat16 (float64: torch), got {store.dtype}")
    if like is not None:
        batch, _, _, height, width = like.shape
        if (store.shape[0], *store.shape[3:]) != (batch, height, width) or store.device != like.device:
            raise ValueError(
                f"{name}: expected [{batch}, z, S, {height}, {width}] on {like.device}, got {list(store.shape)}"
                f" on {store.device}"
            )
    if store.shape[4] > 1 and store.stride(4) != 1:
        raise ValueError(f"{name}: expected w to be contiguous (stride 1), got stride {store.stride(4)}")


def check_parameter(
    name: str, x: Tensor, shape: tuple[int | str, ...], dtype: torch.dtype | None, device: torch.device
) -> None:
    """Checks that ``x`` is contiguous, on ``device``, and of this shape and dtype.

    Letters in the shape stand for any size but 0, and None for any floating dtype.

    Raises:
        TypeError: not a tensor.
        ValueError: shape, dtype, device or layout do not fit.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    fits = x.ndim == len(shape) and all(
        n > 0 if isinstance(m, str) else n == m for n, m in zip(x.shape, shape, strict=False)
    )
    dtypes = FLOATS if dtype is None else (dtype,)
    if not fits or x.dtype not in dtypes or x.device != device or not x.is_contiguous():
        layout = "" if x.is_contiguous() else ", not contiguous"
        kind = "float32, float16 or bfloat16" if dtype is None else str(dtype)
        raise ValueError(
            f"{name}: expected contiguous [{', '.join(map(str, shape))}] {kind} on {device},"
            f" got {list(x.shape)} {x.dtype} on {x.device}{layout}"
        )


def check_frames(
    name: str,
    x: Tensor,
    shape: tuple[int | str, ...] = ("B", "T", "h", "w", "C"),
    dtypes: Sequence[torch.dtype] = FLOATS,
    device: torch.device | None = None,
) -> None:
    """Checks that frames are ``[B, T, h, w, C]`` of this shape (letters: any size but 0) and dtype, C contiguous.

    Raises:
        TypeError: not a tensor.
        ValueError: shape, dtype, device or layout do not fit.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    fits = x.ndim == 5 and all(n > 0 if isinstance(m, str) else n == m for n, m in zip(x.shape, shape, strict=False))
    if not fits or x.dtype not in dtypes or device not in (None, x.device):
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        where = "" if device is None else f" on {device}"
        raise ValueError(
            f"{name}: expected [{', '.join(map(str, shape))}] {kinds}{where}, got {list(x.shape)} {x.dtype}"
            f" on {x.device}"
        )
    if x.shape[4] > 1 and x.stride(4) != 1:
        raise ValueError(f"{name}: expected the channels to be contiguous (stride 1), got stride {x.stride(4)}")


def check_vector(name: str, x: Tensor | None, length: int, like: Tensor) -> None:
    """Checks that ``x`` is None, or contiguous ``[length]`` in the dtype and on the device of ``like``.

    Raises:
        TypeError: not a tensor.
        ValueError: shape, dtype, device or layout do not fit.
    """
    if x is None:
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor or None, got {type(x).__name__}")
    if x.shape != (length,) or x.dtype != like.dtype or x.device != like.device or not x.is_contiguous():
        raise ValueError(
            f"{name}: expected contiguous [{length}] {like.dtype} on {like.device}, got {list(x.shape)} {x.dtype}"
            f" on {x.device}"
        )


def same_view(a: Tensor, b: Tensor) -> bool:
    """Returns whether both views name the same elements in the same order; they do if they are one tensor."""
    if a is b or not concrete(a, b):
        return a is b
    if a.data_ptr() != b.data_ptr() or a.shape != b.shape or a.dtype != b.dtype:
        return False
    # The stride of an axis of one is never used.
    return all(n == 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))


def check_targets(
    targets: Mapping[str, Tensor | None], inputs: Mapping[str, Tensor | None], rows: Sequence[str]
) -> None:
    """Checks what is to be written: distinct elements, apart from each other and from the inputs.

    Where addresses cannot be looked at (:func:`concrete`) nothing is checked.

    Args:
        targets: what is written, by argument.
        inputs: what is read, by argument.
        rows: inputs of which a program reads all that it overwrites before it does: a target may be one of them, whole.

    Raises:
        ValueError: a target breaks this, or may.
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

    The answer is exact for slices of one buffer that begins where its storage does: along some axis these are disjoint
    intervals, or they share an element. Addresses alone count, since tensors of two storages may share memory too, such
    as those that NumPy and DLPack lend.
    """
    if a.numel() == 0 or b.numel() == 0 or a.device != b.device or a.device.type == "meta":
        return False
    if a.data_ptr() > b.data_ptr():
        a, b = b, a
    if b.data_ptr() >= a.data_ptr() + (_extent(a) + 1) * a.element_size():
        return False
    if a.dtype != b.dtype or a.stride() != b.stride():
        return True
    # Where the buffer starts is not known: the storage's start and the first view's are likely.
    starts = (min(x.untyped_storage().data_ptr() for x in (a, b)), a.data_ptr())
    return not any(_disjoint_along_an_axis(a, b, start) for start in starts)


def _disjoint_along_an_axis(a: Tensor, b: Tensor, start: int) -> bool:
    """Returns whether the views are disjoint along an axis of a buffer that has their strides and begins at ``start``.

    False where a view would leave that buffer.
    """
    (offset_a, rest_a), (offset_b, rest_b) = (divmod(x.data_ptr() - start, x.element_size()) for x in (a, b))
    if rest_a or rest_b:
        return False
    disjoint = False
    larger = None
    for axis in sorted(range(a.ndim), key=lambda axis: -a.stride(axis)):
        stride, n, m = a.stride(axis), a.shape[axis], b.shape[axis]
        if stride == 0:
            continue
        start_a, offset_a = divmod(offset_a, stride)
        start_b, offset_b = divmod(offset_b, stride)
        # An index beyond the next larger stride would be another row.
        if larger is not None and (larger % stride or max(start_a + n, start_b + m) * stride > larger):
            return False
        disjoint |= start_a + n <= start_b or start_b + m <= start_a
        larger = stride
    return disjoint and offset_a == offset_b


def self_overlapping(x: Tensor) -> bool:
    """Returns whether two indices of ``x`` name the same element, or may."""
    needed = 1
    for stride, n in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if stride < needed:
            return True
        needed = stride * n
    return False


def _extent(x: Tensor) -> int:
    return sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
