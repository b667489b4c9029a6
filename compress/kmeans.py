"""k-means clustering of weights (DKM [2108.12659], eDKM [2309.00964]), after training: indices into codebooks.

Codebooks are the optimum of 1-D k-means, weighted by what the channels carry or by the Fisher information (SqueezeLLM
[2306.07629]), are then fitted to the layer's outputs together with the indices (`ganq.py`), and can be trained on those
of the block (`dkm.py`). Vectors as entries, and training the weights themselves, are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from compress import codebooks, gptaq, importance, outliers
from compress.dkm import Clusters
from compress.formats import bitpack, cluster, datatypes
from compress.ganq import Fit
from compress.kernels import cpu, lookup
from compress.kernels.cpu import Product
from compress.scheme import Scheme, Spec, Tensors
from compress.stats import Stats

ROUNDS = 3  # of refitted codebooks and moved indices; more gain less than 1 %
REFITTED_BITS = 5  # at most: the normal equations grow with the square of the entries, and their gain shrinks


@dataclass(frozen=True)
class Kmeans(Scheme):
    """Indices of 1 to 8 bits into codebooks found by optimal k-means: w = codebook[q].

    granularity: who shares a codebook: nobody (channel), `group_size` neighbouring output channels, or all. Of few
    input channels a codebook of its own takes more than it gives: below about 2000, group is better for its size.
    method: ganq fits indices and codebooks to the outputs on calibration data; rtn takes the nearest entries.
    sensitivity: what k-means is weighted by: activation, the inputs' second moments; fisher, squared gradients of the
    loss, one backward pass; with none, rtn needs no data.
    codebook: learned; or fixed (nf, bitmod3, bitmod4), with a scale for every `block_size` weights of a row.
    entries: int8 halves the learned ones. scale: each output channel has one. outliers: the fraction of weights that
    are stored as they are, beside the indices. refine: so many steps of training codebooks and scales on the outputs of
    their block. nested: compress.load(OUT, bits=3) loads any width from 2 to `bits`.
    """

    name = "kmeans"
    locals: ClassVar[frozenset[str]] = frozenset(
        ("indices", "codebook", "codebook_scale", "scale", "selector", "like", *outliers.NAMES)
    )
    bits: int = 4
    granularity: Literal["channel", "tensor", "group"] = "channel"
    group_size: int = 16
    method: Literal["ganq", "rtn"] = "ganq"
    sensitivity: Literal["activation", "fisher", "none"] = "activation"
    codebook: Literal["learned", "nf", "bitmod3", "bitmod4"] = "learned"
    block_size: int = 128
    entries: Literal["float", "int8"] = "float"
    scale: bool = False
    outliers: float = 0.0
    refine: int = 0
    nested: bool = False

    def __post_init__(self) -> None:
        only = datatypes.WIDTHS.get(self.codebook)
        if only and self.bits == Kmeans.bits:
            object.__setattr__(self, "bits", only)
        least = 1 if self.codebook == "learned" and not self.nested else 2
        if not least <= self.bits <= 8 or (only and self.bits != only):
            wanted = only or f"{least} to 8"
            raise ValueError(f"{self.name}: bits is {self.bits}; give {wanted} (codebook={self.codebook})")
        for option in ("group_size", "block_size"):
            if getattr(self, option) < 1:
                raise ValueError(f"{self.name}: {option} is {getattr(self, option)}; give 1 or more, for example 16")
        if not 0 <= self.outliers <= 0.5:
            raise ValueError(f"{self.name}: outliers is {self.outliers}; give a fraction from 0 to 0.5")
        if self.refine < 0 or (self.refine and (self.codebook != "learned" or self.nested or self.outliers)):
            raise ValueError(
                f"{self.name}: refine is {self.refine}; give 0, or steps for codebook=learned, no outliers, not nested"
            )
        if self.codebook != "learned" and (self.nested or self.scale or self.entries == "int8"):
            raise ValueError(f"{self.name}: nested, scale and entries are for codebook=learned, not {self.codebook}")

    @property
    def needs_calibration(self) -> bool:
        return self.needs_hessian or self.sensitivity != "none" or self.refine > 0

    @property
    def needs_hessian(self) -> bool:
        return self.method != "rtn" and not self.nested  # no code is the best one for every width

    @property
    def needs_fisher(self) -> bool:
        return self.sensitivity == "fisher"

    @property
    def refines(self) -> int:
        return self.refine

    @property
    def recodes(self) -> bool:
        return self.nested

    def specs(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Spec]:
        rows, width = shape
        packed = (self.bits, rows, bitpack.packed_width(width, 1))
        if not self.nested:
            packed = (rows, bitpack.packed_width(width, self.bits))  # type: ignore[assignment]
        specs = {"indices": Spec(torch.int32, packed), "like": Spec(dtype, (0, *shape))}
        if self.codebook != "learned":
            blocks = -(-width // self.block_size)
            specs["scale"] = Spec(dtype, (rows, blocks))
            if self.codebook != "nf":
                specs["selector"] = Spec(torch.int32, (rows, bitpack.packed_width(blocks, 2)))
            return specs | outliers.specs(shape, dtype, self.outliers)
        books = -(-rows // self._rows(rows))
        entries = 2 ** (self.bits + 1) - 4 if self.nested else 2**self.bits  # 4 + 8 + ...
        specs["codebook"] = Spec(dtype if self.entries == "float" else torch.int8, (books, entries))
        if self.entries == "int8":
            specs["codebook_scale"] = Spec(dtype, (books, 1))
        if self.scale:
            specs["scale"] = Spec(dtype, (rows, 1))
        return specs | outliers.specs(shape, dtype, self.outliers)

    def original(self, specs: Mapping[str, Spec]) -> Spec:
        return Spec(specs["like"].dtype, specs["like"].shape[1:])

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Tensors:
        if not weight.numel():
            raise ValueError(f"{self.name}: the weight is {tuple(weight.shape)}, and holds nothing")
        weights = importance.of(self.sensitivity, weight.shape[1], stats)
        kept = outliers.choose(weight.float(), self.outliers, weights) if self.outliers else None
        tensors, codes = self._clustered(weight, weights, kept)
        values = weight
        if self.needs_hessian and stats is not None and stats.hessian is not None:
            codes, values = self._fitted(gptaq.target(weight, stats), weight.dtype, stats.hessian, tensors, kept)
        elif codes is None:
            codes = self._nearest(weight, tensors)
        if self.nested:
            planes = [bitpack.pack((codes >> b) & 1, 1) for b in range(self.bits - 1, -1, -1)]
            tensors["indices"] = torch.stack(planes)
        else:
            tensors["indices"] = bitpack.pack(codes, self.bits)
        if kept is not None:
            tensors |= outliers.pack(values, kept, weight.dtype)
        return {**tensors, "like": torch.empty((0, *weight.shape), dtype=weight.dtype)}

    def decode(self, tensors: Any) -> Tensor:
        """tensors: as stored, or as `prepare` returns them."""
        if isinstance(tensors, lookup.OnGpu):
            return tensors.decode()
        like: Tensor = tensors["like"]
        shape = (like.shape[1], like.shape[2])
        levels, rows, columns = self._levels(tensors, *shape)
        decoded = lookup.decode(tensors["indices"], codebooks.cast(levels, like.dtype), shape, rows, columns)
        return outliers.put(decoded, tensors) if "outlier_start" in tensors else decoded

    def prepare(self, tensors: Tensors) -> Any:
        if "outlier_start" in tensors:  # no kernel adds them
            return tensors
        like = tensors["like"]
        shape = (like.shape[1], like.shape[2])
        if self.codebook == "learned":
            levels, rows, columns = self._levels(tensors, *shape)
            tables = codebooks.cast(levels[:, 0], like.dtype)
            found = lookup.on_gpu(tensors["indices"], tables, shape, rows, columns, like.dtype)
            return found or super().prepare(tensors)
        tables = datatypes.levels(self.codebook, self.bits).to(like.device)
        blocks = {"scales": tensors["scale"], "selector": codebooks.selectors(tensors)}
        found = lookup.on_gpu(tensors["indices"], tables, shape, 1, self.block_size, like.dtype, **blocks)
        return found or super().prepare(tensors)

    def product(self, tensors: Tensors) -> Product | None:
        if self.bits != 4 or self.nested or self.codebook not in ("learned", "nf"):
            return None
        like, indices = tensors["like"], tensors["indices"]
        shape = (like.shape[1], like.shape[2])
        if self.codebook == "nf":
            levels = datatypes.levels(self.codebook, self.bits)
            return cpu.tables(indices, tensors["scale"], levels, self.block_size, shape)
        books, rows, _ = self._levels(tensors, *shape)
        return cpu.tables(indices, None, codebooks.cast(books[:, 0], like.dtype), shape[1], shape, rows)

    def linear(self, x: Tensor, tensors: Any, bias: Tensor | None = None) -> Tensor:
        """tensors: as stored, or as `prepare` returns them: then without a decoded weight for a few tokens."""
        differentiated = torch.is_grad_enabled() and x.requires_grad  # the fused kernel has no backward pass
        if isinstance(tensors, lookup.OnGpu) and not differentiated:
            y = tensors.linear(x, bias)
            if y is not None:
                return y
        return super().linear(x, tensors, bias)

    def recode(self, tensors: Tensors, **options: Any) -> tuple[Scheme, Tensors]:
        """bits: how many to run with, of those that a nested weight has."""
        bits: int = options.get("bits", 0)
        if not self.nested or list(options) != ["bits"] or not 2 <= bits <= self.bits:
            raise ValueError(f"{self.name}: {options} cannot be chosen at loading; bits=2 to {self.bits} can if nested")
        narrower = {"indices": tensors["indices"][:bits], "codebook": tensors["codebook"][:, : 2 ** (bits + 1) - 4]}
        return replace(self, bits=bits), {**tensors, **narrower}

    def trainable(self, weight: Tensor, tensors: Tensors) -> Clusters:
        codes, device = bitpack.unpack(tensors["indices"], self.bits, weight.shape[1]).to(weight.device), weight.device
        scale = tensors["scale"].float().to(device) if self.scale else None
        levels = codebooks.entries(tensors, self.bits).to(device)
        return Clusters(weight.float(), codes, levels, self._rows(len(weight)), scale)

    def trained(self, tensors: Tensors, trainable: Clusters) -> Tensors:
        levels = trainable.levels.detach().sort(dim=1).values.cpu()
        made = {**tensors, **codebooks.store(levels, tensors["like"].dtype, self.entries == "int8")}
        if trainable.scale is not None:
            made["scale"] = codebooks.positive(trainable.scale.detach().cpu(), tensors["like"].dtype)
        made["indices"] = bitpack.pack(trainable.codes(codebooks.entries(made, self.bits)).cpu(), self.bits)
        return made

    def _rows(self, rows: int) -> int:
        """How many share a codebook."""
        return {"channel": 1, "tensor": rows, "group": min(self.group_size, rows)}[self.granularity]

    def _clustered(self, weight: Tensor, weights: Tensor, kept: Tensor | None) -> tuple[Tensors, Tensor | None]:
        """What codes will stand for; and the codes, where they are not those of the nearest levels."""
        if self.codebook != "learned":
            return codebooks.fit_blocks(weight, self.codebook, self.bits, self.block_size, weights), None
        scale = codebooks.row_scale(weight, weights) if self.scale else None
        if scale is not None:
            weights = weights * (scale.float() / scale.float().amax()).square().clamp(min=codebooks.LITTLE)
        if kept is not None:
            weights = weights * torch.where(kept, codebooks.LITTLE, 1.0)
        scaled = weight if scale is None else weight.float() / scale.float()
        levels, codes = codebooks.learn(scaled, self.bits, self._rows(len(weight)), weights, self.nested)
        tensors = codebooks.store(levels, weight.dtype, self.entries == "int8")
        return tensors if scale is None else {**tensors, "scale": scale}, codes

    def _levels(self, tensors: Tensors, height: int, width: int) -> tuple[Tensor, int, int]:
        """What codes stand for, (n, blocks, 2**bits) float32; and the rows and columns that share a table."""
        if self.codebook != "learned":
            tables = datatypes.levels(self.codebook, self.bits).to(tensors["scale"].device)
            chosen = tables[codebooks.selectors(tensors).int()]
            return tensors["scale"].float()[..., None] * chosen, 1, self.block_size
        levels, rows = codebooks.entries(tensors, self.bits), self._rows(height)
        if self.scale:
            levels, rows = codebooks.spread(levels, rows, height) * tensors["scale"].float(), 1
        return levels[:, None], rows, width

    def _nearest(self, weight: Tensor, tensors: Tensors) -> Tensor:
        """The codes of the nearest levels: (out_features, in_features) uint8."""
        levels, rows, columns = self._levels(tensors, *weight.shape)
        levels = codebooks.spread(levels, rows, len(weight))
        parts = enumerate(weight.split(columns, 1))
        return torch.cat([cluster.assign(part, levels[:, block]) for block, part in parts], 1)

    def _fitted(
        self, weight: Tensor, dtype: torch.dtype, hessian: Tensor, tensors: Tensors, kept: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The codes, and the weight that they and the outliers stand for. Replaces the codebooks in `tensors`."""
        levels, rows, columns = self._levels(tensors, *weight.shape)
        levels = codebooks.spread(levels, rows, len(weight))
        scale = tensors["scale"].float() if self.scale else torch.ones(len(weight), 1)

        def rounded(found: Tensor) -> Tensor:
            stored = codebooks.store(found.cpu(), dtype, self.entries == "int8")
            return codebooks.entries(stored, self.bits).to(found.device)

        device, together = hessian.device, self._rows(len(weight))
        target = weight / scale.to(device)
        levels = (levels / scale[:, None]).transpose(0, 1).to(device)
        fit = Fit(target, hessian, levels, columns, None if kept is None else kept.to(device))
        fit.compensate()
        refits = self.codebook == "learned" and self.bits <= REFITTED_BITS
        for step in range(2 * ROUNDS + 1):
            if step % 2:
                fit.descend()
            elif refits:
                fit.refit(together, (scale[:, 0] / scale.amax()).square().to(device), rounded)
        if refits:
            tensors |= codebooks.store(fit.levels[0][::together].cpu(), dtype, self.entries == "int8")
        return fit.codes.T.contiguous().cpu(), fit.stored.T.cpu() * scale
