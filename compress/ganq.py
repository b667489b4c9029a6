"""GANQ [2501.12956]: weights in codebooks, fitted to the outputs of the layer on calibration data.

Codes are chosen column by column with GPTQ's error feedback, and the codebooks then solved for in closed form, in the
metric of the Hessian. Unlike the paper, which starts the feedback anew each time, later rounds move one column after
the other to what is best beside all others as they are (coordinate descent), so that no step can make the error larger.
Only codebooks rounded to what is stored are ever used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.formats import fitting
from compress.gptq import BLOCK, ordered

DAMPING = 0.1  # as in GPTQ
RIDGE = 1e-4  # of the mean diagonal, towards the codebook as it was: a level that nothing uses stays where it is
ROWS = 256  # whose normal equations are made at once


@dataclass
class Fit:
    """Codes of a weight and what they stand for; all on the Hessian's device.

    weight: (out_features, in_features) float32. hessian: (in_features, in_features) float32, mean of x x^T. levels:
    (blocks, out_features, K) float32, ascending, K a power of two: what a code stands for, by blocks of `block`
    columns. kept: (out_features, in_features) bool, values that are stored beside the codes.
    """

    weight: Tensor
    hessian: Tensor
    levels: Tensor
    block: int
    kept: Tensor | None = None
    pulled: Tensor | None = field(default=None, init=False)  # weight @ damped, where refits share it

    def compensate(self) -> None:
        """Chooses codes with GPTQ's error feedback. Raises NotPositiveDefinite where the Hessian is none."""
        self.codes = torch.empty(self.weight.shape, dtype=torch.uint8, device=self.weight.device)
        self.stored = torch.empty_like(self.weight)
        order, factor = ordered(self.hessian, DAMPING)
        factor /= factor.diagonal()[:, None].clone()
        rest = self.weight[:, order]
        for first, last in _blocks(len(order)):
            wanted = rest[:, first:last].contiguous()
            changes = self._choose(wanted, wanted, factor[first:last, first:last], order[first:last])
            rest[:, last:].addmm_(changes, factor[first:last, last:])
        diagonal = self.hessian.diagonal()
        mean = diagonal[diagonal > 0].mean() if (diagonal > 0).any() else diagonal.new_ones(())
        # As there, an input that was always zero counts like the others.
        self.damped = self.hessian + torch.diag(torch.where(diagonal > 0, DAMPING * mean, (1 + DAMPING) * mean))

    def descend(self) -> None:
        """Moves every column once to what is best beside the others."""
        steps, columns = self.damped.diagonal(), torch.arange(len(self.damped), device=self.damped.device)
        off = self.stored - self.weight
        for first, last in _blocks(len(columns)):
            part = slice(first, last)
            base = self.stored[:, part].clone(memory_format=torch.contiguous_format)
            wanted = base - off @ self.damped[part].T / steps[part]  # by half the gradient
            changes = self._choose(wanted, base, -self.damped[part, part] / steps[part], columns[part])
            off[:, part] += changes

    def refit(self, rows: int, weights: Tensor, rounded: Callable[[Tensor], Tensor]) -> None:
        """Solves for codebooks that `rows` neighbouring rows share, where that lessens their error.

        weights: (out_features,), of the rows' squared errors. rounded: (codebooks, K) to what is stored, ascending.
        """
        old = self.levels[0][::rows]
        matrix, vector = self._normal_equations(rows, weights)
        ridge = RIDGE * matrix.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(matrix.dtype).tiny
        damped = matrix + ridge[:, None, None] * torch.eye(matrix.shape[1], device=matrix.device)
        change, _ = torch.linalg.solve_ex(damped, vector - (matrix @ old.double()[..., None])[..., 0])
        found = old + change.nan_to_num(0, 0, 0).float()
        order = found.argsort(dim=1, stable=True)
        new = rounded(found.gather(1, order))
        # In the old order, to be compared: quadratic forms of the same equations.
        moved = torch.empty_like(new).scatter_(1, order, new)
        better = _form(matrix, vector, moved.double()) < _form(matrix, vector, old.double())
        new = new.where(better[:, None], old)
        ranks = order.argsort(dim=1).where(better[:, None], torch.arange(order.shape[1], device=order.device))
        spread = _spread(ranks, rows, len(self.weight)).to(torch.uint8)
        self.levels = _spread(new, rows, len(self.weight))[None]
        for part in torch.arange(len(self.weight), device=spread.device).split(ROWS):
            self.codes[part] = spread[part].gather(1, self.codes[part].long())
            found = self.levels[0, part].gather(1, self.codes[part].long())
            self.stored[part] = found if self.kept is None else torch.where(self.kept[part], self.stored[part], found)

    def _choose(self, wanted: Tensor, base: Tensor, reach: Tensor, columns: Tensor) -> Tensor:
        """The nearest levels to a block of columns, of two as near the lower one, as their codes and stored values.

        Each is chosen when those before have moved it (`fitting.choose`). Returns the changes, stored less base.
        """
        blocks = torch.arange(len(self.hessian), device=columns.device) // self.block
        found = (self.codes, self.stored) if self.kept is None else (self.codes, self.stored, self.kept)
        run = choose if wanted.is_cuda else fitting.choose
        run(wanted, base, reach, (self.levels, blocks), columns, found)
        return wanted

    def _normal_equations(self, rows: int, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Of the codebooks: (n, K, K) and (n, K) float64, sums over the rows that share one."""
        clusters, codes, rest = self.levels.shape[2], self.codes, self.weight
        if self.kept is not None:
            codes, rest = codes.masked_fill(self.kept, clusters), rest - self.stored * self.kept
        if self.kept is not None or self.pulled is None:
            self.pulled = rest @ self.damped
        sums = pairs if codes.is_cuda else fitting.pairs
        matrices, vectors = sums(codes, self.pulled, self.damped, clusters + 1)
        weights = weights[:, None].double()
        matrices, vectors = weights[..., None] * matrices[:, :-1, :-1], weights * vectors[:, :-1]
        return _summed(matrices, rows), _summed(vectors, rows)


def _blocks(count: int) -> list[tuple[int, int]]:
    return [(first, min(first + BLOCK, count)) for first in range(0, count, BLOCK)]


def choose(
    wanted: Tensor,
    base: Tensor,
    reach: Tensor,
    tables: tuple[Tensor, Tensor],
    columns: Tensor,
    found: tuple[Tensor, ...],
) -> None:
    """`fitting.choose` in plain torch."""
    codes, stored, *kept = found
    for i, (column, block) in enumerate(zip(columns.tolist(), tables[1][columns].tolist(), strict=True)):
        levels, value = tables[0][block], wanted[:, i].clone()
        code = (value[:, None] > (levels[:, 1:] + levels[:, :-1]) / 2).sum(1)
        chosen = levels.gather(1, code[:, None])[:, 0]
        if kept:
            chosen = torch.where(kept[0][:, column], value, chosen)
        codes[:, column], stored[:, column] = code.to(torch.uint8), chosen
        wanted[:, i] = chosen - base[:, i]
        wanted[:, i + 1 :].addr_(wanted[:, i], reach[i, i + 1 :])


def pairs(codes: Tensor, pulled: Tensor, hessian: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """`fitting.pairs` in plain torch."""
    matrices, vectors = [], []
    for part, row in zip(codes.split(ROWS), pulled.split(ROWS), strict=True):
        used = F.one_hot(part.long(), clusters).float()  # (rows, in_features, K)
        sums = torch.einsum("ij,rjk->rik", hessian, used)
        matrices.append(torch.einsum("rik,ril->rkl", used, sums).double())
        vectors.append(torch.einsum("ri,rik->rk", row, used).double())
    return torch.cat(matrices), torch.cat(vectors)


def _form(matrix: Tensor, vector: Tensor, values: Tensor) -> Tensor:
    return torch.einsum("nk,nkl,nl->n", values, matrix, values) - 2 * (vector * values).sum(1)


def _summed(tensor: Tensor, rows: int) -> Tensor:
    """Sums of so many neighbours along the first dimension; the last may be of fewer."""
    missing = -len(tensor) % rows
    padded = torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])
    return padded.view(-1, rows, *tensor.shape[1:]).sum(1)


def _spread(tensor: Tensor, rows: int, count: int) -> Tensor:
    return tensor.repeat_interleave(rows, 0)[:count]
