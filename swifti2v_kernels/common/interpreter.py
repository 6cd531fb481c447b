"""Repairs of Triton's interpreter (3.6 to 3.9), which come before the first kernel that this library runs in it.

The stock interpreter keeps bfloat16 and float8 values as raw integers. It multiplies these in ``tl.dot``, truncates
where the hardware rounds to nearest even, and adds bits where an operator meets two bfloat16 tensors. Here those
operations go through float32, with torch's conversions. Triton 3.6 cannot use a tensor as the end of a loop where NumPy
no longer takes an array of one element for a number (from 2.4 on a warning or an error, by its version).
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
_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)
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
        limit = torch.finfo(target).max
        x = torch.where(x.isnan(), x, x.clamp(-limit, limit))
        return x.to(target).view(torch.uint8).numpy().reshape(np.shape(values))
    return x.to(target).view(torch.int16).numpy().view(np.uint16).reshape(np.shape(values))


def with_room(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Calls a function with room for the frames of all that it calls.

    Python 3.11 and newer keep frames in chunks of 16 kB. Where a loop calls across the end of one, every call maps
    memory and every return gives it back, which took a third of the time. The chunk with this frame has half a megabyte
    more.
    """
    return function(*args, **kwargs)


with_room.__code__ = with_room.__code__.replace(co_stacksize=1 << 16)


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
    stock_binary: Callable[..., Any] = builder.binary_op
    stock_unary: Callable[..., Any] = builder.unary_op

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

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if lhs.dtype.scalar != tl.bfloat16 or rhs.dtype.scalar != tl.bfloat16 or op in _BITWISE:
            return stock_binary(self, lhs, rhs, op)
        result = op(widen(lhs.data, lhs.dtype), widen(rhs.data, rhs.dtype))
        if result.dtype == np.bool_:
            return _Handle(result, tl.int1)
        return _Handle(narrow(result, tl.bfloat16), tl.bfloat16)

    def unary_op(self: Any, arg: Any, op: Any) -> Any:
        if arg.dtype.scalar != tl.bfloat16:
            return stock_unary(self, arg, op)
        return _Handle(narrow(op(widen(arg.data, arg.dtype)), tl.bfloat16), tl.bfloat16)

    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast_impl, create_fp_to_fp, create_dot
    builder.binary_op, builder.unary_op = binary_op, unary_op

    stock_patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, *rest: Any) -> Any:
        result = stock_patch(tensor, *rest)
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])
        return result

    interpreter._patch_lang_tensor = patch_tensor

    stock_launch = interpreter.GridExecutor.__call__
    replaced: set[int] = set()

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        replaced.clear()
        with_room(stock_launch, self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        # The stock one replaces all of triton.language at every call of a function, which takes a third of the time.
        # What a launch has replaced stays so until its end: once for every module that the functions are of is enough.
        if id(self.fn.__globals__) not in replaced:
            replaced.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.GridExecutor.__call__, interpreter.InterpretedFunction.__call__ = launch, call

    # It computes whether every sum and product of integers overflows, and asserts it in debug mode alone.
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=options.debug)
