"""Loops over rows on torch's own threads.

Between its operators torch's threads wait in a loop for a while. Others beside them fight for the cores: 0.2 ms for a
product, and theirs is woken in a few microseconds. So where torch has OpenMP with GNU's interface (the builds for Linux
do), loops are handed to it; elsewhere to threads of Python.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils

from compress.formats.compiled import intrinsic, jit

_SIZE = 1 << 18  # values: below, waking torch's threads costs more than they save
_PYTHON_SIZE = 1 << 20  # the same of Python's, which takes longer
_PARTS = 4  # for each thread: a core that is busy elsewhere takes fewer of them
FAILED = "a loop over the rows failed; is there enough memory?"
_forked = False  # libgomp's threads are not there in a child, and it would wait for them
_entries: dict[Any, int] = {}


def in_threads(loop: Any, rows: int, size: int, *arguments: Any) -> None:
    """loop(start, stop, *arguments) over parts of the rows, which are independent. size: values in all.

    loop: from `jit`; it returns nothing. arguments: NumPy's arrays and numbers, Python's numbers, and tuples of these.
    Threads: as many as torch has. Raises RuntimeError where a part of several fails; what that raised is lost.
    """
    start, threads, parts = team(rows, size)
    if threads <= 1:
        loop(0, rows, *arguments)
    elif not start:
        _in_python(loop, rows, threads, parts, arguments)
    elif _launch(start, entry(loop, arguments), threads, parts, rows, *arguments):
        raise RuntimeError(FAILED)


def team(rows: int, size: int) -> tuple[int, int, int]:
    """Who works on so many rows: OpenMP's function, 0 where it is not to be had; threads; and parts of the rows."""
    start = _openmp() if has_openmp() else 0
    threads = min(torch.get_num_threads(), rows) if size > (_SIZE if start else _PYTHON_SIZE) else 1
    return start, threads, min(_PARTS * threads, rows) if threads > 1 else 1


def has_openmp() -> bool:
    """Whether `run_parts` can wake threads."""
    return not _forked and _openmp() != 0


def _in_python(loop: Any, rows: int, threads: int, parts: int, arguments: tuple[Any, ...]) -> None:
    left = iter(list(pairwise(rows * i // parts for i in range(parts + 1))))  # each thread takes the next

    def work() -> None:
        for pair in left:
            loop(*pair, *arguments)

    jobs: list[Future[None]] = []
    with contextlib.suppress(RuntimeError):  # when Python ends, it starts no more work; then all is done here
        jobs += [_pool(threads - 1).submit(work) for _ in range(threads - 1)]
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


@cache
def _openmp() -> int:
    """The address of the function that runs another on all of torch's threads, void (*)(void *), with its argument."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


def entry(loop: Any, arguments: tuple[Any, ...]) -> int:
    """The address of the machine code of a loop for arguments of these types."""
    key = (loop, _kinds(arguments))
    found = _entries.get(key)
    if found is None:
        types_ = (types.int64, types.int64, *map(loop.typeof_pyval, arguments))
        loop.compile(types_)
        compiled = loop.overloads[types_]
        if compiled.signature.return_type != types.none:
            raise TypeError(f"{loop.__name__} returns something, which nobody would get")
        found = _entries[key] = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
    return found


def _kinds(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """What numba's types of the values depend on; asking it for these takes 0.1 ms. Raises TypeError for others."""
    found: list[Any] = []
    for value in values:
        kind = type(value)
        if kind is np.ndarray:
            found.append((value.dtype, value.ndim, value.flags.num))
        elif kind is tuple:
            found.append(_kinds(value))
        elif kind in (int, float, bool) or isinstance(value, np.generic):
            found.append(kind)
        else:
            raise TypeError(f"loops are not given {kind.__name__}: it may stand for several of numba's types")
    return tuple(found)


@jit
def _launch(start, entry, threads, parts, rows, *arguments):  # type: ignore[no-untyped-def]
    return run_parts(start, entry, threads, parts, rows, arguments)


@intrinsic
def run_parts(context, start, entry, threads, parts, rows, arguments):  # type: ignore[no-untyped-def]
    """Calls entry(first, last, *arguments) for each part of the rows; whether one of them failed.

    entry: of a loop. start: OpenMP's function, which is not called for a single thread.
    """

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        start, entry, threads, parts, rows, arguments = values
        shared = _pointer(builder, (_integer(0), parts, rows, entry, _integer(0), arguments))
        part = _part(context, builder, signature.args[5], shared.type.pointee)
        kind = ir.FunctionType(ir.VoidType(), [part.type, i8.as_pointer(), i32, i32])
        run, place = builder.inttoptr(start, kind.as_pointer()), builder.bitcast(shared, i8.as_pointer())
        with builder.if_else(builder.icmp_signed(">", threads, _integer(1))) as (several, single):
            with several:
                builder.call(run, [part, place, builder.trunc(threads, i32), ir.Constant(i32, 0)])
            with single:
                builder.call(part, [place])
        return builder.load(cgutils.gep_inbounds(builder, shared, 0, _FAILED))

    return types.int64(*[types.int64] * 5, arguments), generate


_NEXT, _COUNT, _ROWS, _ENTRY, _FAILED, _ARGUMENTS = range(6)  # what threads share
i8, i32, i64 = map(ir.IntType, (8, 32, 64))


def _integer(value: int) -> ir.Constant:
    return ir.Constant(i64, value)


def _pointer(builder: Any, values: tuple[Any, ...]) -> Any:
    """Where a structure of the values lies."""
    place = cgutils.alloca_once(builder, ir.LiteralStructType([value.type for value in values]))
    for number, value in enumerate(values):
        builder.store(value, cgutils.gep_inbounds(builder, place, 0, number))
    return place


def _part(context: Any, builder: Any, arguments: Any, shared: Any) -> Any:
    """A function for one thread: takes the next part until there is none. arguments: their types in numba."""
    kind = ir.FunctionType(ir.VoidType(), [i8.as_pointer()])
    function = ir.Function(builder.module, kind, f"{builder.function.name}.part")
    function.linkage = "internal"
    entry, again, body, end = (function.append_basic_block() for _ in range(4))
    builder = ir.IRBuilder(entry)
    place = builder.bitcast(function.args[0], shared.as_pointer())
    builder.branch(again)
    builder.position_at_end(again)

    def field(number: int) -> Any:
        return cgutils.gep_inbounds(builder, place, 0, number)

    number = builder.atomic_rmw("add", field(_NEXT), _integer(1), "monotonic")
    parts, rows = builder.load(field(_COUNT)), builder.load(field(_ROWS))
    builder.cbranch(builder.icmp_signed("<", number, parts), body, end)
    builder.position_at_end(body)
    bounds = [builder.sdiv(builder.mul(rows, n), parts) for n in (number, builder.add(number, _integer(1)))]
    values = [*bounds, *cgutils.unpack_tuple(builder, builder.load(field(_ARGUMENTS)))]
    status = _called(context, builder, builder.load(field(_ENTRY)), values, arguments)
    with builder.if_then(status.is_error):
        builder.store(_integer(1), field(_FAILED))
    builder.branch(again)
    builder.position_at_end(end)
    builder.ret_void()
    return function


@intrinsic
def call(context, entry, start, stop, arguments):  # type: ignore[no-untyped-def]
    """Calls entry(start, stop, *arguments) from another loop; fails where that does. entry: of a loop, for arguments of
    these types."""

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        loop, *bounds, rest = values
        status = _called(context, builder, loop, [*bounds, *cgutils.unpack_tuple(builder, rest)], signature.args[3])
        with builder.if_then(status.is_error):
            context.call_conv.return_status_propagate(builder, status)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3, arguments), generate


def _called(context: Any, builder: Any, entry: Any, values: list[Any], arguments: Any) -> Any:
    """The status of a loop's call. arguments: the types in numba of those behind start and stop."""
    kinds, convention = (types.int64, types.int64, *arguments.types), context.call_conv
    loop = builder.inttoptr(entry, convention.get_function_type(types.none, kinds).as_pointer())
    return convention.call_function(builder, loop, types.none, kinds, values)[0]


def _after_fork() -> None:
    global _forked
    _forked = True
    _pool.cache_clear()  # the child has none of these threads


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_after_fork)
