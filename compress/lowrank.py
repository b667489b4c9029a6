"""Low-rank approximations of a matrix and of magnitudes: deterministic, for a fraction of the cost of a full SVD.

The largest singular values are found by block Lanczos [1504.05477]: all products of the iteration span the space that
is searched, not only the last one, which then takes half as many.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

ROUNDS = 3  # products with the matrix and with its transpose
WIDTH = 8  # vectors in each of them, or as many as are asked for

Factors = tuple[Tensor, Tensor]  # u (m, rank) and v (rank, n), the first column and row not negative


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """u (m, rank) and v (rank, n), float32, so that u @ v is near the best approximation of that rank.

    matrix: (m, n) float32, finite, rank at most min(m, n). v has orthonormal rows as far as singular values differ from
    zero; rows and columns of zeros in the matrix are such in u and v. The same bits on any number of threads.
    """
    m, n = matrix.shape
    vectors = torch.randn(n, max(rank, WIDTH), generator=torch.Generator().manual_seed(0))
    vectors[:, 0] = 1  # a matrix of magnitudes is near its mean
    basis, image = torch.empty(m, 0), torch.empty(n, 0)
    with one_thread():
        for _ in range(ROUNDS):
            vectors = matrix @ vectors[:, : min(m, n) - basis.shape[1]]
            for _ in range(2):  # once is not enough where little is left
                vectors = vectors - basis @ (basis.T @ vectors)
            vectors, _ = torch.linalg.qr(vectors)
            vectors = vectors - basis @ (basis.T @ vectors)
            basis = torch.cat((basis, vectors), dim=1)
            vectors = matrix.T @ vectors
            image = torch.cat((image, vectors), dim=1)
        # basis @ image.T is the matrix as far as the basis spans it; its small Gram matrix in float64.
        _, rotation = torch.linalg.eigh(image.double().T @ image.double())
        rotation = rotation.flip(1)[:, :rank].float()
        v = (image @ rotation).T.contiguous()
        values = v.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        u = basis @ rotation * values
    return u * matrix.any(1)[:, None], v / values[:, None] * matrix.any(0)


@contextmanager
def one_thread() -> Iterator[None]:
    """Products whose sums are not split between threads: how they are would show in the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def approximations(weight: Tensor, importance: Tensor, rank: int) -> Iterator[Factors]:
    """Approximations of a weight's magnitudes, of which one or the other is better: bfloat16 factors.

    weight: (m, n), finite. importance: (n,), how much the square of an error in each column matters. The scale that
    this makes of the columns is divided out of v again: it costs no byte and no multiplication.
    """
    columns = importance.sqrt()
    # By a power of two, so that no square overflows; the factors are multiplied with it again, exactly.
    exponent = math.frexp(float(weight.abs().amax()))[1]
    magnitudes = _times_power(weight.float().abs(), -exponent) * columns
    for make in (_svd_factors, _mean_factors):
        u, v = make(magnitudes, rank)
        v = v / columns
        yield _times_power(u, exponent // 2).bfloat16(), _times_power(v, exponent - exponent // 2).bfloat16()


def _svd_factors(magnitudes: Tensor, rank: int) -> Factors:
    """The best ones."""
    u, v = truncated_svd(magnitudes, rank)
    balance = (u.abs().amax(0) / v.abs().amax(1).clamp(min=1e-30)).clamp(min=1e-30).sqrt()
    u, v = u / balance, v * balance[:, None]
    u[:, 0], v[0] = u[:, 0].abs(), v[0].abs()  # those of a matrix that is not negative are of one sign
    return u, v


def _mean_factors(magnitudes: Tensor, rank: int) -> Factors:
    """Mean magnitudes of rows and columns, which miss no part of a matrix in which parts have nothing in common."""
    rows, columns = magnitudes.double().mean(1), magnitudes.double().mean(0)
    u, v = torch.zeros(len(rows), rank), torch.zeros(rank, len(columns))
    root = math.sqrt(float(rows.mean())) or 1.0
    u[:, 0], v[0] = rows / root, columns / root
    return u, v


def _times_power(values: Tensor, exponent: int) -> Tensor:
    """values * 2**exponent, in two steps: 2**130 is no float32."""
    return values * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2)
