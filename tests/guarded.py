"""Runs every layout's product and decoding on memory that ends, or begins, where none is: a read beside it is fatal.

tests/test_guarded.py runs this in a process of its own. What is printed last is what was under way.
"""

import ctypes
import mmap
import os
import signal

import numpy as np
import torch
from torch import Tensor

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PAGE = mmap.PAGESIZE
SHAPES = ((1, 128), (37, 416), (9, 768), (3, 1003))


def guarded(tensor: Tensor, at_front: bool) -> Tensor:
    """A copy whose first byte, or last one, is next to a page that cannot be read; it is never freed."""
    if not tensor.nbytes:
        return tensor.clone()
    pages = -(-tensor.nbytes // PAGE)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    base = LIBC.mmap(None, (pages + 2) * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    for page in (0, pages + 1):
        assert LIBC.mprotect(base + page * PAGE, PAGE, 0) == 0
    start = base + PAGE + (0 if at_front else pages * PAGE - tensor.nbytes)
    raw = np.frombuffer((ctypes.c_uint8 * tensor.nbytes).from_address(start), np.uint8)
    found = torch.from_numpy(raw)
    found.view(tensor.dtype).copy_(tensor.flatten())
    return found.view(tensor.dtype).view(tensor.shape)


def main() -> None:
    from test_cpu import CASES, gaussian

    from compress.registry import make

    torch.set_num_threads(1)
    planes = ("bitstack", {"blocks": 2, "scaling": "none"})
    for name, options in [*CASES, planes, ("df11", {"coding": "fixed"}), ("df11", {})]:
        for shape in SHAPES:
            if shape[1] == 1003 and name not in ("df11", "kmeans", "bitstack"):
                continue  # others have whole groups
            scheme = make(name, options).fit(shape).for_dtype(torch.bfloat16)
            tensors = scheme.encode(gaussian(*shape) * 0.02)
            for at_front in (False, True):
                held = {local: guarded(tensor, at_front) for local, tensor in tensors.items()}
                for tokens in (1, 5):
                    x = gaussian(tokens, shape[1])
                    print(name, options, shape, "front" if at_front else "end", tokens, flush=True)
                    found = scheme.linear(guarded(x, at_front), scheme.prepare(held))
                    assert torch.equal(found, scheme.linear(x, scheme.prepare(tensors)))
                assert torch.equal(scheme.decode(held), scheme.decode(tensors))


def check_the_guard_is_there() -> None:
    """A child that reads one byte too many, at either end, must die of it."""
    for at_front, beside in ((False, 32), (True, -1)):
        if (child := os.fork()) == 0:
            ctypes.string_at(guarded(torch.zeros(8), at_front).data_ptr() + beside, 1)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGSEGV


if __name__ == "__main__":
    check_the_guard_is_there()
    main()
