"""Teaches Triton's interpreter bfloat16, which it holds as 16 bits and would compute with as with whole numbers.

Imported by the tests that run in it: products, sums and the rounding to bfloat16 are those of a GPU then. Scans and
atomics are not.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

# It computes with numpy, which warns of infinities and NaN, and of how Triton 3.6 takes a scalar.
WARNINGS = ("ignore::RuntimeWarning", "ignore:Conversion of an array:DeprecationWarning")


def _widened(handle: Any) -> Any:
    if not isinstance(handle, interpreter.TensorHandle) or handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = np.ascontiguousarray(handle.data).view(np.uint16).astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _rounded(values: Any) -> Any:
    """float32 as the bits of bfloat16, half to even."""
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).bfloat16().view(torch.uint16).numpy()


def _teach(name: str) -> None:
    original = getattr(interpreter.InterpreterBuilder, name)

    def method(self: Any, *arguments: Any) -> Any:
        wide = [_widened(argument) for argument in arguments]
        found = original(self, *wide)
        unchanged = all(a is b for a, b in zip(arguments, wide, strict=True))
        if unchanged or name == "create_dot" or found.dtype.scalar != tl.float32 or found.data.dtype == bool:
            return found
        return interpreter.TensorHandle(_rounded(found.data), tl.bfloat16)

    setattr(interpreter.InterpreterBuilder, name, method)


for _name in ("create_dot", "binary_op", "unary_op"):
    _teach(_name)

_convert = interpreter._convert_float


def _convert_float(found: Any, source: Any, target: Any, rounding: Any) -> Any:
    if source == tl.float32 and target == tl.bfloat16:
        return _rounded(np.asarray(found).view(np.float32)).reshape(np.shape(found))
    return _convert(found, source, target, rounding)


interpreter._convert_float = _convert_float
