"""Keys and values in block floating point, unpacked for attention: channels put back into their places as they are
written, and what was taken off them added. Compiled with numba on the CPU, plain torch elsewhere; the same values."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from compress.formats.bfp import Format, unpack
from compress.formats.compiled import empty, jit
from compress.formats.threads import in_threads


def states(packed: Tensor, exponents: Tensor, form: Format, order: Tensor, mean: Tensor | None) -> Tensor:
    """Returns (batch, heads, tokens, head_dim) float32.

    packed: (batch, heads, tokens, ceil(head_dim * bits / 8)) and exponents: (batch, heads, tokens, blocks) uint8, rows
    as `formats.bfp` has them. order: (1, heads or 1, 1, head_dim) int64, the channel that is stored at each place.
    mean: (1, heads, 1, head_dim), what is added.
    """
    *leading, tokens, _ = packed.shape
    heads, columns = leading[-1], order.shape[-1]
    mantissas, shared = packed.flatten(0, 2), exponents.flatten(0, 2)
    if packed.device.type != "cpu":
        found = unpack(mantissas, shared, form, columns).view(*leading, tokens, columns)
        found = torch.take_along_dim(found, order.argsort(-1), dim=-1)
        return found if mean is None else found + mean.float()
    found = empty((len(mantissas), columns), torch.float32)
    added = torch.zeros(heads, columns) if mean is None else mean.view(heads, columns).float()
    in_threads(
        _rows,
        len(mantissas),
        found.numel(),
        mantissas.contiguous().numpy(),
        shared.contiguous().numpy(),
        (form.steps().numpy(), order.expand(1, heads, 1, columns).reshape(heads, columns).numpy(), added.numpy()),
        (max(1, tokens), form.bits, form.block_size, np.int32(form.half)),
        found.numpy(),
    )
    return found.view(*leading, tokens, columns)


@jit
def _rows(start, stop, packed, exponents, tables, options, found):  # type: ignore[no-untyped-def]
    (steps, order, mean), (tokens, bits, size, half) = tables, options
    mask = np.int32((1 << bits) - 1)
    for row in range(start, stop):
        head = row // tokens % order.shape[0]
        places, added = order[head], mean[head]
        for column in range(places.shape[0]):
            bit = column * bits
            byte = bit >> 3
            code = np.int32(packed[row, byte])
            if byte + 1 < packed.shape[1]:
                code |= np.int32(packed[row, byte + 1]) << np.int32(8)
            mantissa = ((code >> np.int32(bit & 7)) & mask) - half
            channel = places[column]
            found[row, channel] = np.float32(mantissa) * steps[exponents[row, column // size]] + added[channel]
