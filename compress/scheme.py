"""Scheme: the one interface every compression method implements."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.fold import Kind
from compress.kernels import cpu
from compress.kernels.cpu import Product
from compress.kernels.prepared import Prepared
from compress.kernels.rows import Rows
from compress.stats import Stats

if TYPE_CHECKING:
    from compress.refine import Trainable

Tensors = dict[str, Tensor]
TEXT_BYTES = 4096  # more no `Spec` takes along


@dataclass(frozen=True)
class Spec:
    """What a safetensors header says of a tensor; and the `text` of one that describes the others of its weight."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    text: bytes | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Spec:
        """Of a tensor. name: local, or in a file."""
        text = None
        if describes(name) and tensor.dtype == torch.uint8 and tensor.numel() <= TEXT_BYTES:
            text = bytes(tensor.flatten().tolist())
        return cls(tensor.dtype, tuple(tensor.shape), text)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def describes(name: str) -> bool:
    """Whether a tensor of this name holds the text that its weight is known by: bitsandbytes' `quant_state`."""
    return "quant_state" in name.split(".")


@dataclass(frozen=True)
class Scheme(ABC):
    """A way to store one linear weight; a lossless one stores any tensor.

    Its fields are its options: they are written to config.json as they are, and `--set KEY=VALUE` sets them. A scheme
    holds no tensors: the same object encodes, decodes and runs every weight that the plan gives it.
    """

    name: ClassVar[str]
    lossless: ClassVar[bool] = False  # every bit comes back, so it takes every tensor, with NaN and infinity in it
    locals: ClassVar[frozenset[str] | None] = None  # local names, where others may lie beside them in a module
    sized_by_data: ClassVar[bool] = False  # what is stored depends on the values, and not only on their number
    stacked: ClassVar[bool] = False  # it stores blocks, of which the first few are a coarser weight (`stack.py`)

    @property
    def needs_calibration(self) -> bool:
        """Whether its weights are to be fitted to data: `encode` is given stats wherever tokens reach a layer."""
        return False

    @property
    def beside(self) -> Scheme | None:
        """What the output head and embeddings are stored with, which it does not take itself; None: they are left."""
        return None

    def block_of(self, local: str) -> int:
        """The number of the block that a local tensor belongs to, where `stacked`; 0 for what is always there."""
        return 0

    def prepared_bytes(self, specs: Mapping[str, Spec], device: str) -> int:
        """Memory of what running makes of these tensors beside them. device: its type, cpu or cuda."""
        return 0

    @property
    def needs_hessian(self) -> bool:
        """Whether `encode` uses the Hessian of its stats."""
        return False

    @property
    def needs_sample(self) -> bool:
        """Whether its errors are those of the inputs too, which it quantizes: then some of these are kept."""
        return False

    @property
    def needs_fisher(self) -> bool:
        """Whether `encode` uses the squared gradients of its stats."""
        return False

    @property
    def needs_ranges(self) -> bool:
        """Whether `encode` needs stats, of any layer like it: it stores how large inputs are."""
        return False

    @property
    def refines(self) -> int:
        """Steps for which what it stores is trained on the outputs of a block (`refine.py`)."""
        return 0

    def trainable(self, weight: Tensor, tensors: Tensors) -> Trainable:
        """Where it `refines`. weight: (out_features, in_features), of which `encode` has made the tensors."""
        raise NotImplementedError

    def trained(self, tensors: Tensors, trainable: Any) -> Tensors:
        """The tensors to store, of what `trainable` made of these."""
        raise NotImplementedError

    @property
    def folds(self) -> frozenset[Kind]:
        """What its errors may shrink with, done to the channels that it reads: a scale, another order, a rotation."""
        return frozenset()

    def exact_scale(self, second_moment: Tensor) -> Tensor | None:
        """The scale that a norm before it should be divided by, where it `folds` one whatever its errors: powers of
        two, which round nothing. second_moment: (channels,), of its inputs. Returns (channels,), or None."""
        return None

    def fit(self, shape: tuple[int, ...]) -> Scheme:
        """The scheme for an (out_features, in_features) weight: itself, or for example with a group that divides it."""
        return self

    def note(self, shape: tuple[int, ...]) -> str | None:
        """What the plan says of an (out_features, in_features) weight that is stored otherwise than most."""
        return None

    def for_dtype(self, dtype: torch.dtype) -> Scheme:
        """The scheme for a weight of this dtype: itself, or one that says it, where what is stored does not."""
        return self

    def takes(self, spec: Spec) -> bool:
        """Whether a tensor of this shape and dtype is worth storing so."""
        return 0 not in spec.shape and spec.dtype in (torch.bfloat16, torch.float16, torch.float32)

    @abstractmethod
    def specs(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Spec]:
        """The tensors that `encode` makes of an (out_features, in_features) weight of `dtype`, by local name.

        Where `sized_by_data`, those that it may make, each at its largest.
        """

    def measure(self, weight: Tensor) -> int:
        """Exact stored size of this very weight."""
        return self.bytes(tuple(weight.shape), weight.dtype)

    @abstractmethod
    def encode(self, weight: Tensor, stats: Stats | None = None) -> Tensors:
        """weight: (out_features, in_features), bfloat16, float16 or float32, finite. Returns the tensors to store.

        stats: of the inputs of the linear layer; None where nothing was calibrated.
        """

    def loop(self, tensors: Tensors) -> Rows | None:
        """What decodes a few rows of these, which are on the CPU, where a compiled loop does all of that."""
        return None

    @abstractmethod
    def decode(self, tensors: Any) -> Tensor:
        """The weight that `tensors`, as stored or as `prepare` returns them, stand for: (out_features, in_features), in
        the dtype that was encoded."""

    def prepare(self, tensors: Tensors) -> Any:
        """What `decode`, `rows` and `linear` run on for many calls, on the device of `tensors`: these, unless kernels
        there want them laid out otherwise."""
        product = self.product(tensors)
        return tensors if product is None else cpu.Prepared(tensors, product)

    def product(self, tensors: Tensors) -> Product | None:
        """What multiplies with these tensors, where they are on the CPU and a compiled loop does it undecoded."""
        return None

    @property
    def recodes(self) -> bool:
        """Whether `recode` takes options when a checkpoint is loaded."""
        return self.lossless

    def recode(self, tensors: Tensors, **options: Any) -> tuple[Scheme, Tensors]:
        """The same weight for other options, where that loses nothing. Raises ValueError where it would."""
        raise ValueError(f"{self.name}: {', '.join(options)} is decided when a weight is compressed; leave it out")

    @property
    def row_tensors(self) -> frozenset[str]:
        """The local names of tensors that may be there and have a line for each row of the weight, where some of these
        lines and the other tensors decode to these rows; empty where that is not so."""
        return frozenset()

    def rows(self, tensors: Any, index: Tensor) -> Tensor:
        """decode(tensors)[index]. Override where a few rows cost less than all of them, and have no `row_tensors`."""
        if not self.row_tensors or not isinstance(tensors, dict) or not index.numel():
            return self.decode(tensors)[index]
        chosen, names = index.flatten(), self.row_tensors
        found = self.decode({name: tensor[chosen] if name in names else tensor for name, tensor in tensors.items()})
        return found.view(*index.shape, found.shape[1])

    @abstractmethod
    def original(self, specs: Mapping[str, Spec]) -> Spec:
        """Shape and dtype of the weight that was encoded, from the headers of its stored tensors alone."""

    def dtype_of(self, tensors: Tensors) -> torch.dtype:
        """The dtype of the weight that was encoded."""
        return self.original({local: Spec.of(local, tensor) for local, tensor in tensors.items()}).dtype

    def linear(self, x: Tensor, tensors: Any, bias: Tensor | None = None) -> Tensor:
        """x: (..., in_features). Returns (..., out_features).

        tensors: as stored, or as `prepare` returns them: then without a decoded weight where that is better.
        """
        y = cpu.multiply(x, tensors, bias, lambda x: self.dense(x, tensors))
        if y is not None:
            return y
        differentiated = torch.is_grad_enabled() and x.requires_grad  # fused kernels have no backward pass
        if isinstance(tensors, Prepared) and not differentiated:
            return tensors.linear(x, bias)
        return self.dense(x, tensors, bias)

    def dense(self, x: Tensor, tensors: Any, bias: Tensor | None = None) -> Tensor:
        """x @ W.T + bias with a decoded weight."""
        if self.lossless:  # gives the bits that the original gives, whatever is faster
            return F.linear(x, self.decode(tensors).to(x.dtype), bias)
        rows = self.loop(tensors) if x.device.type == "cpu" and isinstance(tensors, dict) else None
        if rows is not None:
            return cpu.dense(x, rows.shape, rows, bias)
        weight = self.decode(tensors)
        return cpu.dense(x, (weight.shape[0], weight.shape[1]), weight.__getitem__, bias)

    @property
    def interchange(self) -> dict[str, Any] | None:
        """What the `quantization_config` of another library that reads this says of it, if there is one.

        The `format` and `weights` of a compressed-tensors config group; or with `quant_method`, fields of its own.
        """
        return None

    def bytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Stored size of an (out_features, in_features) weight of `dtype`: exact, or where `sized_by_data` the most."""
        return sum(spec.bytes for spec in self.specs(shape, dtype).values())

    def check(self, specs: Mapping[str, Spec]) -> None:
        """Raises ValueError, saying what is wrong, where the headers in `specs` are not those of one stored weight."""
        try:
            original = self.original(specs)
            wanted = self.specs(original.shape, original.dtype)
            missing = sorted(wanted.keys() - specs.keys())
        except KeyError as error:
            wanted, missing = {}, [error.args[0]]
        if missing:
            raise ValueError(f"no {missing[0]} is stored, so the checkpoint is incomplete; download it again")
        for local, spec in wanted.items():
            if not _fits(specs[local], spec):
                raise ValueError(f"{local} is {specs[local]}, and {self.name} needs {spec}; download it again")

    def to_dict(self) -> dict[str, Any]:
        return {"scheme": self.name, **dataclasses.asdict(self)}


def _fits(found: Spec, wanted: Spec) -> bool:
    """The same shape and dtype; but others write one scale as () or (1, 1), and an integer in another width."""
    if math.prod(found.shape) != math.prod(wanted.shape):
        return False
    if len(found.shape) == len(wanted.shape) and found.shape != wanted.shape:
        return False
    return found.dtype == wanted.dtype or wanted.dtype == torch.int64
