"""nf4 (QLoRA, arXiv:2305.14314) in bitsandbytes' own layout: 4-bit levels of a normal distribution, in blocks.

What bitsandbytes' `Linear4bit` saves, so that it loads there. Data-free.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from compress.formats import nf4
from compress.kernels import cpu
from compress.kernels import nf4 as kernels
from compress.kernels.prepared import Prepared
from compress.scheme import Scheme, Spec, Tensors
from compress.stats import Stats

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # those that bitsandbytes runs
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_OFFSET_ROOM = 24  # characters of a float32 as JSON, at the most
_ROWS = 32  # that bitsandbytes' loop for AVX512-BF16 takes at a time


@dataclass(frozen=True)
class Nf4(Scheme):
    """4-bit NormalFloat in blocks, as bitsandbytes stores it: w = level[q] * absmax.

    Blocks run over the flattened weight; absmax is a float32, with double_quant 8 bits.
    """

    name = "nf4"
    locals: ClassVar[frozenset[str]] = frozenset(
        ("weight", "absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state")
    )
    block_size: int = 64
    double_quant: bool = False

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            known = ", ".join(map(str, BLOCK_SIZES))
            raise ValueError(f"{self.name}: block_size is {self.block_size}; give one of {known}")

    def note(self, shape: tuple[int, ...]) -> str | None:
        # Its loops for AVX-512 take whole blocks in a row for granted: that for BF16 stops, and `dequantize_4bit` reads
        # the magnitudes of other blocks (where 16 divides in_features). On a GPU and with AVX2 it runs any shape.
        if shape[1] % self.block_size:
            return (
                f"not whole blocks of {self.block_size}, with which bitsandbytes 0.50 stops or is wrong on a CPU with "
                "AVX-512; compress.load runs it"
            )
        if shape[0] % _ROWS:
            return (
                f"{shape[0]} out_features are no multiple of {_ROWS}, with which bitsandbytes 0.50 stops on a CPU with "
                "AVX512-BF16; compress.load runs it"
            )
        return None

    def specs(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Spec]:
        count = math.prod(shape)
        blocks = math.ceil(count / self.block_size)
        state = State(self.block_size, dtype, shape, 0.0 if self.double_quant else None).pack()
        specs = {
            "weight": Spec(torch.uint8, (math.ceil(count / 2), 1)),
            "absmax": Spec(torch.uint8 if self.double_quant else torch.float32, (blocks,)),
            "quant_map": Spec(torch.float32, (16,)),
        }
        if self.double_quant:
            specs["nested_absmax"] = Spec(torch.float32, (math.ceil(blocks / nf4.NESTED_BLOCK),))
            specs["nested_quant_map"] = Spec(torch.float32, (256,))
        return {**specs, "quant_state": Spec(torch.uint8, (len(state),), state)}

    def original(self, specs: Mapping[str, Spec]) -> Spec:
        state = State.unpack(specs["quant_state"].text or b"")
        return Spec(state.dtype, state.shape)

    def check(self, specs: Mapping[str, Spec]) -> None:
        if "quant_state" in specs:
            state = State.unpack(specs["quant_state"].text or b"")
            if (state.block_size, state.offset is not None) != (self.block_size, self.double_quant):
                raise ValueError(f"quant_state is {state}, and the weight is described as {self}; download it again")
            specs = {**specs, "quant_state": self.specs(state.shape, state.dtype)["quant_state"]}  # of any length
        super().check(specs)

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Tensors:
        packed, absmax = nf4.encode(weight, self.block_size)
        tensors, offset = {"weight": packed, "absmax": absmax, "quant_map": torch.from_numpy(nf4.LEVELS.copy())}, None
        if self.double_quant:
            tensors["absmax"], tensors["nested_absmax"], offset = nf4.nest(absmax)
            tensors["nested_quant_map"] = nf4.dynamic_levels()
        state = State(self.block_size, weight.dtype, tuple(weight.shape), offset).pack()
        return {**tensors, "quant_state": torch.frombuffer(bytearray(state), dtype=torch.uint8)}

    def prepare(self, tensors: Tensors) -> Any:
        state = State.unpack(Spec.of("quant_state", tensors["quant_state"]).text or b"")
        absmax, levels = tensors["absmax"], tensors["quant_map"]
        if state.offset is not None:
            nested = tensors["nested_absmax"].repeat_interleave(nf4.NESTED_BLOCK)[: absmax.numel()]
            absmax = tensors["nested_quant_map"][absmax.int()] * nested + state.offset
        found = kernels.pack(tensors["weight"], absmax, levels, state.block_size, state.shape, state.dtype)
        rows, columns = state.shape
        whole = rows * columns == absmax.numel() * state.block_size == 2 * tensors["weight"].numel()
        if whole and columns % state.block_size == 0:  # otherwise blocks go on from one row to the next
            how = (levels[None], state.block_size, (rows, columns))
            found.product = cpu.tables(tensors["weight"], absmax.view(rows, -1), *how, high_first=True)
        return found

    def decode(self, tensors: Any) -> Tensor:
        """tensors: as stored, or as `prepare` returns them."""
        weight: Tensor = (tensors if isinstance(tensors, Prepared) else self.prepare(tensors)).decode()
        return weight

    @property
    def interchange(self) -> dict[str, Any]:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_use_double_quant": self.double_quant,
        }


@dataclass(frozen=True)
class State:
    """What bitsandbytes keeps of a weight as JSON, in a tensor of bytes."""

    block_size: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: float | None  # of the magnitudes, where these are quantized

    def pack(self) -> bytes:
        """The JSON; with an offset padded by spaces, so that the size is known before."""
        fields: dict[str, Any] = {
            "quant_type": "nf4",
            "blocksize": self.block_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": self.shape,
        }
        if self.offset is None:
            return json.dumps(fields).encode()
        fields |= {"nested_blocksize": nf4.NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": 0}
        room = len(json.dumps(fields)) + _OFFSET_ROOM
        return json.dumps({**fields, "nested_offset": self.offset}).ljust(room).encode()

    @classmethod
    def unpack(cls, text: bytes) -> State:
        """Raises ValueError for anything but the state of a 2-D nf4 weight."""
        try:
            fields = json.loads(text)
            kind, shape, offset = fields["quant_type"], fields["shape"], fields.get("nested_offset")
            whole = all(type(n) is int and n >= 0 for n in shape) and len(shape) == 2
            if kind != "nf4" or not whole or fields["blocksize"] not in BLOCK_SIZES:
                raise ValueError(f"its type is {kind!r}, its blocks are of {fields['blocksize']}, its shape is {shape}")
            if offset is not None and fields["nested_blocksize"] != nf4.NESTED_BLOCK:
                raise ValueError(f"its nested blocks are of {fields['nested_blocksize']}")
            dtype = _DTYPES[fields["dtype"]]
            return cls(fields["blocksize"], dtype, tuple(shape), None if offset is None else float(offset))
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"quant_state is none that bitsandbytes writes for nf4 ({error})") from None
