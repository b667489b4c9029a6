"""k-means clustering of weights (DKM [2108.12659], eDKM [2309.00964]), after training: indices into codebooks.

Codebooks are the optimum of 1-D k-means, weighted by what the channels carry or by the Fisher information (SqueezeLLM
[2306.07629]), are then fitted to the layer's outputs together with the indices (`ganq.py`), and can be trained on those
of the block (`dkm.py`). Vectors as entries, and training the weights themselves, are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress import codebooks, gptaq, importance, outliers
from compress.clustered import Clustered
from compress.dkm import Clusters
from compress.formats import bitpack, cluster
from compress.ganq import Fit
from compress.scheme import Tensors
from compress.stats import Stats

ROUNDS = 3  # of refitted codebooks and moved indices; more gain less than 1 %
REFITTED_BITS = 5  # at most: the normal equations grow with the square of the entries, and their gain shrinks


@dataclass(frozen=True)
class Kmeans(Clustered):
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

    def trainable(self, weight: Tensor, tensors: Tensors) -> Clusters:
        codes, device = bitpack.unpack(tensors["indices"], self.bits, weight.shape[1]).to(weight.device), weight.device
        scale = tensors["scale"].float().to(device) if self.scale else None
        levels = codebooks.entries(tensors, self.bits).to(device)
        return Clusters(
            None if self.needs_hessian else weight.float(), codes, levels, self.rows_together(weight.shape), scale
        )

    def trained(self, tensors: Tensors, trainable: Clusters) -> Tensors:
        levels = trainable.levels.detach().sort(dim=1).values.cpu()
        made = {**tensors, **codebooks.store(levels, tensors["like"].dtype, self.entries == "int8")}
        if trainable.scale is not None:
            made["scale"] = codebooks.positive(trainable.scale.detach().cpu(), tensors["like"].dtype)
        made["indices"] = bitpack.pack(trainable.codes(codebooks.entries(made, self.bits)).cpu(), self.bits)
        return made

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
        levels, codes = codebooks.learn(scaled, self.bits, self.rows_together(weight.shape), weights, self.nested)
        tensors = codebooks.store(levels, weight.dtype, self.entries == "int8")
        return tensors if scale is None else {**tensors, "scale": scale}, codes

    def _nearest(self, weight: Tensor, tensors: Tensors) -> Tensor:
        """The codes of the nearest levels: (out_features, in_features) uint8."""
        levels, rows, columns = self.levels(tensors, *weight.shape)
        levels = codebooks.spread(levels, rows, len(weight))
        parts = enumerate(weight.split(columns, 1))
        return torch.cat([cluster.assign(part, levels[:, block]) for block, part in parts], 1)

    def _fitted(
        self, weight: Tensor, dtype: torch.dtype, hessian: Tensor, tensors: Tensors, kept: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The codes, and the weight that they and the outliers stand for. Replaces the codebooks in `tensors`."""
        levels, rows, columns = self.levels(tensors, *weight.shape)
        levels = codebooks.spread(levels, rows, len(weight))
        scale = tensors["scale"].float() if self.scale else torch.ones(len(weight), 1)

        def rounded(found: Tensor) -> Tensor:
            stored = codebooks.store(found.cpu(), dtype, self.entries == "int8")
            return codebooks.entries(stored, self.bits).to(found.device)

        device, together = hessian.device, self.rows_together(weight.shape)
        target = weight / scale.to(device)
        levels = (levels / scale[:, None]).transpose(0, 1).contiguous().to(device)
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
        return fit.codes.cpu(), fit.stored.cpu() * scale
