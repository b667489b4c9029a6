"""What the compiled loops over a weight share: numba's settings, the weight's bits, threads."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

_THREADED_SIZE = 1 << 20  # values: below, starting threads costs more than it saves


def jit(function: Any) -> Any:
    """No fastmath: the same bytes on every machine. Division as NumPy's: a check for zero does not vectorize."""
    try:
        return numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # numba's "no locator": neither the package's directory nor the user's cache can be written
        return numba.njit(nogil=True, error_model="numpy")(function)


def float_bits(weight: Tensor) -> tuple[Any, int]:
    """weight: bf16, fp16 or fp32 on the CPU. Returns its bits, uint16 or uint32 in the same shape, and how far left
    they go to be a float32's."""
    weight = weight.detach().contiguous()
    if weight.dtype == torch.bfloat16:
        return weight.view(torch.int16).numpy().view(np.uint16), 16
    return weight.float().numpy().view(np.uint32), 0


def in_threads(loop: Any, rows: int, size: int, *arguments: Any) -> None:
    """loop(start, stop, *arguments) over parts of the rows, which are independent. size: values in all."""
    # Plain threads, not numba's: its default layer aborts when two Python threads enter it at once, and a parallel
    # kernel takes several times as long to compile.
    threads = min(numba.get_num_threads(), rows) if size > _THREADED_SIZE else 1
    if threads <= 1:
        loop(0, rows, *arguments)
        return
    bounds = [rows * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        jobs = [pool.submit(loop, *pair, *arguments) for pair in zip(bounds, bounds[1:], strict=False)]
    for job in jobs:
        job.result()
