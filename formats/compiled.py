"""What the compiled loops over a weight share: numba's settings, the weight's bits, 64 bits at any byte, threads."""

import math
import os
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import extending
from torch import Tensor

_THREADED_SIZE = 1 << 20  # values: below, starting threads costs more than it saves
_PARTS = 4  # for each thread


def jit(function: Any) -> Any:
    """No fastmath: the same bytes on every machine. Division as NumPy's: a check for zero does not vectorize."""
    try:
        return numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # numba's "no locator": neither the package's directory nor the user's cache can be written
        return numba.njit(nogil=True, error_model="numpy")(function)


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
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(np.empty(size, np.uint8)).view(dtype).view(shape)


def in_threads(loop: Any, rows: int, size: int, *arguments: Any) -> None:
    """loop(start, stop, *arguments) over parts of the rows, which are independent. size: values in all."""
    # Plain threads, not numba's: its default layer aborts when two Python threads enter it at once, and a parallel
    # kernel takes several times as long to compile.
    threads = min(numba.get_num_threads(), rows) if size > _THREADED_SIZE else 1
    if threads <= 1:
        loop(0, rows, *arguments)
        return
    parts = min(_PARTS * threads, rows)  # a core that is busy elsewhere takes fewer of them
    bounds = [rows * i // parts for i in range(parts + 1)]
    left = iter(list(zip(bounds, bounds[1:], strict=False)))  # each thread takes the next

    def work() -> None:
        for pair in left:
            loop(*pair, *arguments)

    jobs = [_pool(threads - 1).submit(work) for _ in range(threads - 1)]
    try:
        work()
    finally:
        wait(jobs)  # they read the arrays of this call
    for job in jobs:
        job.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that stay: starting them takes as long as a product with a small weight."""
    return ThreadPoolExecutor(threads, "compress")


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_pool.cache_clear)  # the child has none of these threads
