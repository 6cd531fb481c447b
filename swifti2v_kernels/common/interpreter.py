"""Repairs of Triton's interpreter (3.6 to 3.9), which come before the first kernel that this library runs in it.

The stock interpreter keeps bfloat16 and float8 values as raw integers. It multiplies these in ``tl.dot`` and truncates
where the hardware rounds to nearest even: here both go through float32, with torch's conversions. That it also adds
bits where an operator meets two bfloat16 tensors is left, since the kernels here compute in float32. Triton 3.6 cannot
use a tensor as the end of a loop where NumPy no longer takes an array of one element for a number (from 2.4 on a
warning or an error, by its version).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

#: The interpreter's own. A kernel of the Hub may not ask for NumPy, and nothing but the interpreter needs it.
np = interpreter.np
_DTYPES = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
_Handle = interpreter.TensorHandle


def widen(data: np.ndarray, dtype: Any) -> np.ndarray:
    """Returns the values of an interpreter array, in float32 for all types of 16 bits and less."""
    if dtype.scalar in _DTYPES:
        bits = np.ascontiguousarray(data)
        raw = torch.from_numpy(bits.view(np.int16 if bits.itemsize == 2 else np.uint8))
        return raw.view(_DTYPES[dtype.scalar]).float().numpy().reshape(np.shape(data))
    return data.astype(np.float32) if data.dtype == np.float16 else data


def narrow(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Returns float32 values as the interpreter keeps ``dtype``: rounded to nearest even; float8 saturates."""
    target = _DTYPES[dtype.scalar]
    x = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    if target != torch.bfloat16:
        limit = torch.finfo(target).max  # NaN stays NaN
        return x.clamp(-limit, limit).to(target).view(torch.uint8).numpy().reshape(np.shape(values))
    return x.to(target).view(torch.int16).numpy().view(np.uint16).reshape(np.shape(values))


def version_obstacle() -> str | None:
    """Returns why kernels cannot be trusted in this Triton's interpreter, or None: others have not been looked at."""
    major, minor = triton.__version__.split(".")[:2]
    if (3, 6) <= (int(major), int(minor)) <= (3, 9):
        return None
    return f"kernels are interpreted by Triton 3.6 to 3.9, this is {triton.__version__}"


@functools.cache
def repair_interpreter() -> None:
    """Replaces the faulty operations, once, for all kernels of the process."""
    builder = interpreter.InterpreterBuilder
    stock_cast: Callable[..., Any] = builder.cast_impl

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        before, after = source.dtype.scalar, target.scalar
        if before == after or not {before, after} & set(_DTYPES):
            return stock_cast(self, source, target)
        values = widen(source.data, before)
        if after in _DTYPES:
            return _Handle(narrow(values, after), after)
        return _Handle(values.astype(interpreter._get_np_dtype(target)), after)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        return cast_impl(self, source, target)

    def create_dot(self: Any, a: Any, b: Any, acc: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        x, y = widen(a.data, a.dtype), widen(b.data, b.dtype)
        if x.dtype.kind in "iu":  # float64 holds these products exactly
            x, y = x.astype(np.float64), y.astype(np.float64)
        return _Handle(np.matmul(x, y).astype(acc.data.dtype) + acc.data, acc.dtype.scalar)

    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast_impl, create_fp_to_fp, create_dot

    stock_patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, *rest: Any) -> Any:
        result = stock_patch(tensor, *rest)
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])
        return result

    interpreter._patch_lang_tensor = patch_tensor

    stock_lang, replaced = interpreter._patch_lang, set[int]()

    def patch_lang(function: Any) -> Any:
        # The stock one replaces all of triton.language at every call of a function, which takes a third of the time.
        # What a launch has replaced stays so until its end: once for every module that the functions are of is enough.
        if id(function.__globals__) in replaced:
            return None
        scope = stock_lang(function)
        stock_restore = scope.restore
        scope.restore = lambda: (replaced.clear(), stock_restore())
        replaced.add(id(function.__globals__))
        return scope

    interpreter._patch_lang = patch_lang

    # It computes whether every sum and product of integers overflows, and asserts it in debug mode alone.
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=options.debug)
