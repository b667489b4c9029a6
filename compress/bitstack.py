"""BitStack (arXiv:2410.23918): a weight as blocks of about one bit, of which as many are loaded as memory allows.

The first block is the paper's: signs, and a low-rank approximation of the magnitudes. The others are bit planes: each
splits every level of the code so far in two, in units of that low-rank scale. Four blocks leave a third of the squared
error of the paper's residual signs and factors (benchmarks/results/bitstack.md), which cannot reach the tails.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from compress.df11 import Df11
from compress.fold import Kind
from compress.int8 import Int8
from compress.kernels import bitstack as kernels
from compress.kernels.bitstack import Planes
from compress.kernels.op import Packed
from compress.lowrank import Factors, approximations
from compress.nested import fit_steps
from compress.scheme import Scheme, Spec, Tensors
from compress.stats import Stats

OVERHEAD = 0.12  # bits of the factors for each weight, with rank=auto
MOST_RANK = 16  # with rank=auto: the scale is summed anew for every weight that is decoded
STEPS_PER_BYTE = 1 / 100  # of a plane: so much its table of steps may add, if that makes more than LEAST_STEPS
LEAST_STEPS = 32
MOST_CONTEXT = 7  # bits of the code that decide a step; what is left to the others is even in each such cell
SAMPLE = 1 << 17  # weights that the steps are fitted to
COMPARED = 3  # planes after which the better of two scales is known
HEADS: dict[str, Scheme | None] = {"none": None, "8": Int8(), "lossless": Df11()}
DEAD = 1e-4  # of the mean second moment: a channel that the text never uses keeps this much importance


@dataclass(frozen=True)
class Bitstack(Scheme):
    """Signs on a low-rank scale, then bit planes; any number of its blocks of 1 bit a weight can be loaded.

    scaling=activation weighs errors with the size of the inputs: columns are scaled, and their scale is a part of the
    low-rank one; the powers of two in it go into the norm before, where no other layer reads that.
    head: what the output head and the embeddings are stored with, all of which are always loaded: 8 bits (`int8`),
    lossless (`df11`), or none, which leaves them as they are.
    """

    name = "bitstack"
    stacked: ClassVar[bool] = True
    blocks: int = 8
    rank: str = "auto"
    scaling: Literal["activation", "none"] = "activation"
    head: Literal["none", "8", "lossless"] = "none"

    def __post_init__(self) -> None:
        if not 1 <= self.blocks <= 16:
            raise ValueError(f"{self.name}: blocks is {self.blocks}; give a number from 1 to 16")
        if self.rank != "auto" and not (self.rank.isdecimal() and 1 <= int(self.rank) <= 1024):
            raise ValueError(f"{self.name}: rank is {self.rank!r}; give auto, or a number from 1 to 1024")

    @property
    def needs_calibration(self) -> bool:
        return self.scaling == "activation"

    @property
    def beside(self) -> Scheme | None:
        return HEADS[self.head]

    def rank_of(self, shape: tuple[int, ...]) -> int:
        """The rank of the scale of an (m, n) weight."""
        m, n = shape
        wanted = min(MOST_RANK, int(OVERHEAD * m * n / (16 * (m + n)))) if self.rank == "auto" else int(self.rank)
        return max(1, min(wanted, m, n))

    def specs(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Spec]:
        (m, n), k = shape, self.rank_of(shape)
        specs = {
            "like": Spec(dtype, (0, m, n)),
            "u": Spec(torch.bfloat16, (m, k)),
            "v": Spec(torch.bfloat16, (k, n)),
        }
        for block in range(self.blocks):
            specs[f"plane_{block}"] = Spec(torch.uint8, (m, -(-n // 8)))
            specs[f"steps_{block}"] = Spec(torch.float16, (_step_count(block, m * n),))
        return specs

    def block_of(self, local: str) -> int:
        kind, _, number = local.partition("_")
        return int(number) if kind in ("plane", "steps") else 0

    @property
    def folds(self) -> frozenset[Kind]:
        return frozenset(["scale"] if self.scaling == "activation" else [])

    def exact_scale(self, second_moment: Tensor) -> Tensor | None:
        return torch.exp2(_importance(second_moment).sqrt().log2().round())

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Tensors:
        shape = (weight.shape[0], weight.shape[1])
        known = stats if self.scaling == "activation" else None
        importance = torch.ones(shape[1]) if known is None else _importance(known.second_moment)
        counts = [_step_count(block, weight.numel()) for block in range(self.blocks)]
        sample = slice(None, None, max(1, weight.numel() // SAMPLE))
        magnitudes = weight[sample].float().abs()

        def fit(factors: Factors, planes: int) -> tuple[float, list[Tensor]]:
            return fit_steps(magnitudes, kernels.scale(factors[0][sample], factors[1]), importance, counts[:planes])

        candidates = approximations(weight, importance, self.rank_of(shape))
        u, v = min(candidates, key=lambda factors: fit(factors, COMPARED)[0])
        _, steps = fit((u, v), self.blocks)
        tensors = {"like": torch.empty(0, *shape, dtype=weight.dtype), "u": u, "v": v}
        for block, plane in enumerate(kernels.encode(weight, u, v, steps)):
            tensors |= {f"plane_{block}": plane, f"steps_{block}": steps[block]}
        return tensors

    def decode(self, tensors: Any) -> Tensor:
        return self._packed(tensors).decode()

    def prepare(self, tensors: Tensors) -> Packed:
        blocks = _blocks(tensors)
        steps = [tensors[f"steps_{block}"] for block in range(blocks)]
        planes = tuple(tensors[f"plane_{block}"].contiguous() for block in range(blocks))
        return kernels.pack(Planes(planes, tensors["u"], tensors["v"], kernels.expand(steps), tensors["like"].dtype))

    def prepared_bytes(self, specs: Mapping[str, Spec], device: str) -> int:
        (rows, rank), columns = specs["u"].shape, specs["v"].shape[1]
        return kernels.beside((rows, columns), rank, 1 + max(map(self.block_of, specs)), device)

    def rows(self, tensors: Any, index: Tensor) -> Tensor:
        stack = self._packed(tensors).weight
        found = kernels.decode(stack.rows(index.flatten()))
        return found.view(*index.shape, found.shape[1])

    def linear(self, x: Tensor, tensors: Any, bias: Tensor | None = None) -> Tensor:
        return self._packed(tensors).linear(x, bias)

    def original(self, specs: Mapping[str, Spec]) -> Spec:
        return Spec(specs["like"].dtype, specs["like"].shape[1:])

    def check(self, specs: Mapping[str, Spec]) -> None:
        """Fewer blocks than were planned are whole too: a smaller copy has them, or another budget."""
        known = set(self.specs((1, 1), torch.float32))
        if surplus := sorted(specs.keys() - known):
            raise ValueError(f"{surplus[0]} is stored, and {self} has none; download it again")
        blocks = max((1 + self.block_of(local) for local in specs), default=1)
        type(self)(blocks, self.rank).check_whole(specs)

    def check_whole(self, specs: Mapping[str, Spec]) -> None:
        """`check` where all blocks must be there."""
        super().check(specs)

    def _packed(self, tensors: Any) -> Packed:
        return tensors if isinstance(tensors, Packed) else self.prepare(tensors)


def _importance(second_moment: Tensor) -> Tensor:
    """How much an error in each column matters: (n,) float32, of mean 1."""
    moment = second_moment.float().cpu()
    mean = float(moment.double().mean())
    return moment / mean + DEAD if mean > 0 else torch.ones_like(moment)


def _step_count(block: int, weights: int) -> int:
    """Entries in the table of steps of a plane of so many weights."""
    room = max(LEAST_STEPS, int(weights / 8 * STEPS_PER_BYTE / 2))
    return 1 << min(block, MOST_CONTEXT, room.bit_length() - 1)


def _blocks(tensors: Tensors) -> int:
    return sum(local.startswith("plane_") for local in tensors)
