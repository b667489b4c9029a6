"""Bit planes on a low-rank scale: w = +-scale * levels[code], compiled loops on the CPU, Triton on a GPU, else torch.

scale = max(u @ v, FLOOR * u0 * v0), with u0 and v0 the first column and row of the factors. Plane 0 holds the signs;
the bits of the others, the first of them the highest, make up the code. Bit t of byte j of a plane's row is that of
column 8 j + t.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from compress.formats.compiled import float_bits, jit
from compress.formats.threads import in_threads
from compress.kernels import cpu, cpu_planes, cpu_sign_products, cpu_signs, prepared, simd
from compress.kernels.cpu import Product
from compress.kernels.op import Layout, Packed
from compress.kernels.rows import Rows

FLOOR = 1 / 16  # of the first factors' product: where the others take more than that away, they do no longer


@dataclass(frozen=True)
class Planes:
    """A weight of shape (m, n), or some rows of it.

    planes: each (m, ceil(n / 8)) uint8, contiguous. u: (m, k), v: (k, n) bfloat16. levels: (2**(planes - 1),) float32.
    addresses: (planes,) int64, where the planes lie, or None.
    """

    planes: tuple[Tensor, ...]
    u: Tensor
    v: Tensor
    levels: Tensor
    dtype: torch.dtype
    addresses: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.u.shape[0], self.v.shape[1]

    @cached_property
    def vectors(self) -> Any:
        """v as the loop of `cpu_planes` that decodes reads it."""
        return cpu_planes.interleaved(self.v.float().numpy())

    @cached_property
    def pairs(self) -> Any:
        """v as those that multiply read it."""
        return cpu_planes.paired(self.v.float().numpy()) if simd.has_dots() else self.vectors

    @cached_property
    def product(self) -> Product | None:
        """What multiplies with it on the CPU, without a decoded weight."""
        if self.u.device.type != "cpu" or not cpu_planes.can_run(self.shape[1]):
            return None

        def run(x: Tensor, dtype: torch.dtype) -> Tensor:
            columns, wide = self.shape[1], x.detach().float()
            if cpu_sign_products.takes(len(self.planes), len(x)) and self.signs:
                y = cpu_sign_products.product(self.signs, wide.contiguous().numpy())
                if y is not None:
                    return torch.from_numpy(y)
            padded = F.pad(wide, (0, -columns % 128)).contiguous()
            return torch.from_numpy(cpu_planes.product(_arrays(self, self.pairs), padded.numpy(), columns))

        return Product(f"{len(self.planes)} bit planes of rank {self.u.shape[1]}", self.shape, run)

    @cached_property
    def signs(self) -> cpu_signs.Signs | None:
        """What a few tokens are looked up with on the CPU; None where that does not do."""
        if not cpu_signs.can_run(len(self.planes), self.shape[1]):
            return None
        planes = tuple(plane.numpy() for plane in self.planes)
        return cpu_signs.prepared(planes, _words(self.u), _words(self.v), self.levels.numpy(), FLOOR)

    def rows(self, index: Tensor | slice) -> Planes:
        """Those rows of it. index: (count,) int64."""
        return replace(self, planes=tuple(plane[index] for plane in self.planes), u=self.u[index], addresses=None)

    def located(self) -> Planes:
        """With the addresses, which a kernel reads where the planes are."""
        return replace(self, addresses=_places(self).to(self.u.device))


def beside(shape: tuple[int, int], rank: int, planes: int, device: str) -> int:
    """Bytes that are held beside a weight's tensors: the level of every code, and on a CPU v as two kinds of loops read
    it, and what looking up takes."""
    size, lanes = 4 * (1 << (planes - 1)), simd.lanes()
    if device == "cpu":
        factors = rank + (-(-rank // 2) if simd.has_dots() else 0)
        size += 4 * factors * lanes * -(-shape[1] // lanes)
        if cpu_signs.can_run(planes, shape[1]) and shape[0] * shape[1] >= cpu.LEAST:
            size += cpu_signs.beside(*shape)
    return size


def expand(steps: list[Tensor]) -> Tensor:
    """The level of every code. steps: of each plane, (2**t,) float16, by the first t - 1 bits of the code before and
    the plane's own bit; of plane 0 (1,). Returns (2**(planes - 1),) float32.
    """
    levels = steps[0].float()
    for plane, step in enumerate(steps[1:], 1):
        codes = torch.arange(2**plane, device=step.device)
        levels = levels.repeat_interleave(2) + step.float()[entry(codes, plane, step.numel())]
    return levels


def entry(codes: Tensor, plane: int, count: int) -> Tensor:
    """Where the step of `plane` for a code that ends with it stands, in a table of `count` steps."""
    known = plane - (count.bit_length() - 1)  # bits of the code that the table does not look at
    return codes >> (known + 1) << 1 | codes & 1


def encode(weight: Tensor, u: Tensor, v: Tensor, steps: list[Tensor]) -> list[Tensor]:
    """The planes of a weight: to each code that was chosen, the nearer of its two continuations.

    weight: (m, n) bf16, fp16 or fp32 on the CPU, finite. u, v, steps: as above. Returns planes, each (m, ceil(n / 8)).
    """
    m, n = weight.shape
    planes = torch.zeros(len(steps), m, -(-n // 8), dtype=torch.uint8)
    table = torch.zeros(len(steps), max(step.numel() for step in steps))
    ignored = torch.zeros(len(steps), dtype=torch.int64)
    for plane, step in enumerate(steps):
        table[plane, : step.numel()] = step.float()
        ignored[plane] = plane - (step.numel().bit_length() - 1)
    words, shift = float_bits(weight)
    arguments = (words, shift, u.float().numpy(), v.float().numpy(), table.numpy(), ignored.numpy(), FLOOR)
    in_threads(_encode_rows, m, m * n, planes.numpy(), *arguments)
    return [plane.clone() for plane in planes]


def decode(stack: Planes) -> Tensor:
    """(m, n) in the stack's dtype: the same bits on every device."""
    # A few rows have no addresses: these come from the host, which a CUDA graph would not do again.
    if stack.addresses is not None and prepared.runs_triton(stack.u.device):
        from compress.kernels import bitstack_triton  # imports triton, which a machine without a GPU need not have

        return bitstack_triton.decode(stack)
    rows = decode_rows(stack)
    return decode_torch(stack) if rows is None else rows.whole


def decode_rows(stack: Planes) -> Rows | None:
    """`decode` on the CPU; None where plain torch does it."""
    if stack.u.device.type != "cpu" or not cpu_planes.can_run(stack.shape[1]):
        return None
    made = torch.bfloat16 if stack.dtype == torch.bfloat16 else torch.float32
    kind, planes = (stack.shape, stack.dtype, made), len(stack.planes)
    near = Rows(cpu_planes.loop(planes, exact=False), *kind, _arrays(stack, stack.pairs))
    return Rows(cpu_planes.loop(planes, exact=True), *kind, _arrays(stack, stack.vectors), near)


def _arrays(stack: Planes, v: Any) -> tuple[Any, ...]:
    """What the loops of `cpu_planes` take of a stack, on the CPU."""
    numbers = (np.float32(FLOOR), np.float32(torch.finfo(stack.dtype).max))
    return _places(stack).numpy(), _words(stack.u), v, stack.levels.numpy(), *numbers


def _words(factor: Tensor) -> Any:
    """The bits of bfloat16: uint16."""
    return factor.contiguous().view(torch.int16).numpy().view(np.uint16)


def _places(stack: Planes) -> Tensor:
    """The addresses of the planes: (planes,) int64, on the CPU."""
    return torch.tensor([plane.data_ptr() for plane in stack.planes])


def decode_torch(stack: Planes) -> Tensor:
    """`decode` in plain torch, on any device."""
    codes = torch.zeros(stack.shape, dtype=torch.int64, device=stack.u.device)
    for plane in stack.planes[1:]:
        codes = codes << 1 | _bits(plane, stack.shape[1])
    magnitude = scale(stack.u, stack.v) * stack.levels[codes]
    largest = torch.finfo(stack.dtype).max
    negative = _bits(stack.planes[0], stack.shape[1]).bool()
    return torch.where(negative, -magnitude, magnitude).clamp(-largest, largest).to(stack.dtype)


def scale(u: Tensor, v: Tensor) -> Tensor:
    """The scale of every weight: (m, n) float32, summed in the order of the factors."""
    u, v = u.float(), v.float()
    first = u[:, :1] * v[:1]
    total = first
    for i in range(1, len(v)):
        total = total + u[:, i : i + 1] * v[i : i + 1]
    return torch.maximum(total, first * FLOOR)


def linear(x: Tensor, stack: Planes, bias: Tensor | None = None) -> Tensor:
    """x @ W.T + bias, (..., n) -> (..., m): fused where that is faster, else of the decoded weight."""
    n = stack.shape[1]
    if prepared.runs_triton(x.device):
        from compress.kernels import bitstack_triton

        # The fused kernel has no backward pass, and many tokens are worth a decoded weight.
        if x.numel() <= bitstack_triton.FUSED_TOKENS * n and not (torch.is_grad_enabled() and x.requires_grad):
            return bitstack_triton.linear(x, stack, bias)
        return F.linear(x, decode(stack).to(x.dtype), bias)
    if x.device.type == "cpu" and not (torch.is_grad_enabled() and x.requires_grad):
        y = cpu.multiply(x, stack, bias, lambda x: _dense(x, stack, None))
        if y is not None:
            return y
    return _dense(x, stack, bias)


def _dense(x: Tensor, stack: Planes, bias: Tensor | None) -> Tensor:
    rows = decode_rows(stack)
    return cpu.dense(x, stack.shape, decode(stack).__getitem__ if rows is None else rows, bias)


def pack(stack: Planes) -> Packed:
    """The weight for its device."""
    packed = Packed(LAYOUT, stack.located() if prepared.runs_triton(stack.u.device) else stack)
    packed.product = stack.product
    return packed


LAYOUT = Layout("bitstack", Planes, decode, linear)


def _bits(plane: Tensor, count: int) -> Tensor:
    shifts = torch.arange(8, device=plane.device)
    return (plane[:, :, None] >> shifts & 1).flatten(1)[:, :count].long()


@jit
def _encode_rows(start, stop, planes, words, shift, u, v, steps, ignored, floor):  # type: ignore[no-untyped-def]
    columns = v.shape[1]
    scales, least = np.empty(columns, np.float32), np.empty(columns, np.float32)
    floor = np.float32(floor)
    for row in range(start, stop):
        cpu_signs.scale_row(u[row], v, floor, scales, least)
        for i in range(columns):
            scales[i] = max(scales[i], least[i])
        bits = words[row].astype(np.uint32) << np.uint32(shift)
        magnitudes = (bits & np.uint32(0x7FFFFFFF)).view(np.float32)
        for i in range(columns):
            byte, bit = i >> 3, np.uint8(1 << (i & 7))
            if bits[i] >> np.uint32(31):
                planes[0, row, byte] |= bit
            ratio = magnitudes[i] / scales[i] if scales[i] > 0 else np.float32(0)
            level, code = steps[0, 0], 0
            for plane in range(1, planes.shape[0]):
                at = code >> ignored[plane] << 1
                low, high = level + steps[plane, at], level + steps[plane, at + 1]
                code <<= 1
                if abs(ratio - high) < abs(ratio - low):
                    planes[plane, row, byte] |= bit
                    level, code = high, code | 1
                else:
                    level = low
