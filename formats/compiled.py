"""What the compiled loops over a weight share: numba's settings, the weight's bits, 64 bits at any byte."""

import hashlib
import math
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import extending
from torch import Tensor

LINE = 64  # bytes of a cache line


def jit(function: Any) -> Any:
    """No fastmath: the same bytes on every machine. Division as NumPy's: a check for zero does not vectorize.

    Functions that a factory makes must differ in plain values that they enclose.
    """
    if function.__closure__:
        # Machine code is found by its name, and those of numba's files tell nothing of what functions enclose.
        values = [cell.cell_contents for cell in function.__closure__]
        if not _is_plain(values):
            raise TypeError(f"{function.__qualname__} encloses more than numbers and text, which could not name it")
        function.__qualname__ += "_" + hashlib.sha256(repr(values).encode()).hexdigest()[:16]
    try:
        return numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # numba's "no locator": neither the package's directory nor the user's cache can be written
        return numba.njit(nogil=True, error_model="numpy")(function)


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, list | tuple) else isinstance(value, int | float | str)


def intrinsic(function: Any) -> Any:
    """numba's, whose type has the compiler's own argument, which callers do not pass; numbers are known to it."""
    return extending.intrinsic(prefer_literal=True)(function)


@intrinsic
def load64(context, array, offset):  # type: ignore[no-untyped-def]
    """The 64 bits at byte `offset` of a uint8 array, aligned or not. Nothing checks that they lie within it."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.load(_address(context, builder, signature, arguments), align=1)

    return numba.uint64(array, numba.int64), generate


@intrinsic
def store64(context, array, offset, value):  # type: ignore[no-untyped-def]
    """Puts 64 bits at byte `offset` of a uint8 array, aligned or not. Nothing checks that they lie within it."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        builder.store(arguments[2], _address(context, builder, signature, arguments), align=1)
        return context.get_dummy_value()

    return numba.void(array, numba.int64, numba.uint64), generate


def _address(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
    start = builder.bitcast(data, ir.IntType(8).as_pointer())
    return builder.bitcast(builder.gep(start, [arguments[1]]), ir.IntType(64).as_pointer())


def float_bits(weight: Tensor) -> tuple[Any, int]:
    """weight: bf16, fp16 or fp32 on the CPU. Returns its bits, uint16 or uint32 in the same shape, and how far left
    they go to be a float32's."""
    weight = weight.detach().contiguous()
    if weight.dtype == torch.bfloat16:
        return weight.view(torch.int16).numpy().view(np.uint16), 16
    return weight.float().numpy().view(np.uint32), 0


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """torch.empty, from NumPy, which asks for huge pages: filling such memory for the first time costs a quarter."""
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype, device="cpu")
    memory = np.empty(size + LINE, np.uint8)
    return torch.from_numpy(memory[-memory.ctypes.data % LINE :][:size]).view(dtype).view(shape)


@jit
def lines(size: int) -> Any:
    """So many bytes, from the beginning of a cache line on: vectors then lie in one each, where two take longer."""
    memory = np.empty(size + LINE, np.uint8)
    return memory[-memory.ctypes.data % LINE :][:size]


def copied(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A copy on that device; on the CPU in memory from `empty`, whose huge pages are also read a fifth faster."""
    if torch.device(device).type != "cpu":
        return tensor.to(device, copy=True)
    return empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)
