"""1-D k-means against a dynamic program over all cuts, and scikit-learn's."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from compress.formats import cluster
from compress.formats.intervals import _priced


def slow(values: Tensor, clusters: int, importance: Tensor) -> float:
    """The least error of any clustering: every cut of the sorted values is tried."""
    order = values.double().argsort()
    x, w = values.double()[order].numpy(), importance.double()[order].numpy()
    w0, w1, w2 = (np.concatenate([[0.0], (w * x**p).cumsum()]) for p in range(3))
    least = np.full(len(x) + 1, np.inf)
    least[0] = 0
    for _ in range(clusters):
        new = least.copy()
        for j in range(1, len(x) + 1):
            i = np.arange(j)
            costs = w2[j] - w2[i] - (w1[j] - w1[i]) ** 2 / (w0[j] - w0[i])
            new[j] = min(new[j], (least[i] + costs).min())
        least = new
    return float(least[-1])


def error(values: Tensor, centroids: Tensor, importance: Tensor | None = None) -> float:
    found = centroids.double()[cluster.assign(values[None], centroids[None])[0].long()]
    weights = torch.ones(len(values)) if importance is None else importance
    return float((weights.double() * (values.double() - found).square()).sum())


def test_three_clusters_by_hand() -> None:
    values = torch.tensor([[8.0, 1.0, 2.0, 9.0, 1.0, 20.0]])
    centroids = cluster.codebooks(values, 3)
    assert torch.allclose(centroids, torch.tensor([[4 / 3, 8.5, 20.0]]))
    assert cluster.assign(values, centroids).tolist() == [[1, 0, 0, 1, 0, 2]]


def test_importance_by_hand() -> None:
    # Two of three values share a centroid: the pair whose product of weights over their sum is less.
    values, heavy_end = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[1.0, 1.0, 9.0]])
    assert cluster.codebooks(values, 2, heavy_end).tolist() == [[0.5, 2.0]]
    assert cluster.codebooks(values, 2, heavy_end.flip(1)).tolist() == [[0.0, 1.5]]


@pytest.mark.parametrize("kind", ["normal", "integers", "heavy tails", "one decimal", "bfloat16"])
def test_no_cut_of_the_sorted_values_is_better(kind: str) -> None:
    random = np.random.default_rng(0)
    for trial in range(60):
        count, clusters = int(random.integers(1, 40)), int(random.integers(1, 12))
        drawn = {"integers": random.integers(-6, 6, count), "heavy tails": random.standard_t(2, count)}
        values = torch.tensor(drawn.get(kind, random.standard_normal(count)), dtype=torch.float32)
        values = (values * 10).round() / 10 if kind == "one decimal" else values
        values = values.bfloat16() if kind == "bfloat16" else values
        weights = torch.tensor(random.random(count) + 0.01, dtype=torch.float32) if trial % 2 else torch.ones(count)
        centroids = cluster.codebooks(values[None], clusters, weights[None])[0]
        assert (centroids.diff() >= 0).all()
        spread = float((weights * values.float().square()).sum())
        assert error(values, centroids, weights) <= slow(values, clusters, weights) + 1e-6 * spread


def test_it_is_never_worse_than_the_best_of_ten_runs_of_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.cluster")
    generator = torch.Generator().manual_seed(0)
    rows = torch.cat([torch.randn(4, 300, generator=generator), torch.randn(4, 300, generator=generator) ** 3])
    for row in rows:
        for clusters in (2, 7, 16):
            theirs = sklearn.KMeans(clusters, n_init=10, random_state=0).fit(row[:, None].numpy()).inertia_
            assert error(row, cluster.codebooks(row[None], clusters)[0]) <= theirs * (1 + 1e-5)


@pytest.mark.parametrize(("clusters", "left"), [(4, 0.1175), (8, 0.03454), (16, 0.009497)])
def test_a_normal_distribution_keeps_what_lloyd_and_max_found(clusters: int, left: float) -> None:
    values = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(1 << 16) + 0.5) / (1 << 16))
    centroids = cluster.codebooks(values[None], clusters)[0]
    assert error(values, centroids) / len(values) == pytest.approx(left, rel=0.002)
    assert torch.allclose(centroids, -centroids.flip(0), atol=0.01)


def test_fewer_values_than_clusters_are_kept_and_the_last_one_repeated() -> None:
    values = torch.tensor([[3.0, -1.0, 3.0, 0.0, -0.0]])
    assert cluster.codebooks(values, 6).tolist() == [[-1.0, 0.0, 3.0, 3.0, 3.0, 3.0]]
    assert cluster.codebooks(torch.zeros(2, 5), 2).tolist() == [[0.0, 0.0]] * 2
    assert cluster.codebooks(torch.ones(1, 1), 1).tolist() == [[1.0]]
    assert cluster.codebooks(torch.ones(0, 4), 2).shape == (0, 2)


def test_values_that_lie_halfway_go_to_the_lower_centroid() -> None:
    for count in (2, 40):
        centroids = torch.arange(count).float()[None]
        assert cluster.assign(centroids[:, :-1] + 0.5, centroids).tolist() == [list(range(count - 1))]


def test_scaled_mirrored_and_shuffled_values_have_their_centroids_scaled_and_mirrored() -> None:
    values = torch.randn(3, 200, generator=torch.Generator().manual_seed(1))
    centroids = cluster.codebooks(values, 8)
    assert torch.allclose(cluster.codebooks(values * 64, 8), centroids * 64, rtol=1e-5)
    assert torch.allclose(cluster.codebooks(-values, 8), -centroids.flip(1), rtol=1e-5)
    shuffled = values[:, torch.randperm(200, generator=torch.Generator().manual_seed(2))]
    assert torch.allclose(cluster.codebooks(shuffled, 8), centroids, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_row_for_the_histogram_is_as_good_as_a_sorted_one(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.randn(1, (1 << 16) + 1, generator=torch.Generator().manual_seed(3)).to(dtype)
    importance = torch.rand(1, 7, generator=torch.Generator().manual_seed(4)) + 0.1
    weights = importance[0].repeat(1 + values.shape[1] // 7)[: values.shape[1]]
    binned = cluster.codebooks(values, 16, importance)[0]
    fewer = cluster.codebooks(values[:, :-1], 16, importance)[0]
    assert error(values[0], binned, weights) <= error(values[0], fewer, weights) * 1.001


def test_importance_of_each_row_is_that_of_the_row() -> None:
    values = torch.randn(1, 50, generator=torch.Generator().manual_seed(5)).expand(3, 50)
    importance = torch.rand(3, 50, generator=torch.Generator().manual_seed(6)) + 0.01
    together = cluster.codebooks(values, 4, importance)
    for row in range(3):
        alone = cluster.codebooks(values[:1], 4, importance[row : row + 1])[0]
        assert error(values[0], together[row], importance[row]) == pytest.approx(
            error(values[0], alone, importance[row]), rel=1e-6
        )


def test_threads_do_not_change_a_bit(on_threads: Any) -> None:
    weight = torch.randn(30, 4096, generator=torch.Generator().manual_seed(7)).bfloat16()
    first, *others = on_threads(lambda: cluster.codebooks(weight, 8))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(("bits", "columns"), [(2, 4096), (3, 4096), (4, 4096), (5, 4096), (6, 16384), (8, 65536)])
def test_nested_codebooks_are_nearly_as_good_as_their_own(bits: int, columns: int) -> None:
    weight = torch.randn(2, columns, generator=torch.Generator().manual_seed(8)).bfloat16()
    codes, codebooks = cluster.nested(weight, bits)
    assert [book.shape[1] for book in codebooks] == [1 << b for b in range(2, bits + 1)]
    for width, book in enumerate(codebooks, 2):
        own = cluster.codebooks(weight, 1 << width)
        errors = [
            (weight.float() - centroids.gather(1, c.long())).square().sum()
            for centroids, c in ((book, codes >> (bits - width)), (own, cluster.assign(weight, own)))
        ]
        assert errors[0] <= 1.05 * errors[1]
        assert (book.diff(dim=1) >= 0).all()


def test_nested_codebooks_of_few_values_are_exact() -> None:
    weight = torch.tensor([[1.0, 5.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    codes, codebooks = cluster.nested(weight, 3)
    for width, book in enumerate(codebooks, 2):
        assert book.isfinite().all()
        assert width < 3 or torch.equal(book.gather(1, (codes >> (3 - width)).long()), weight)


def test_numbers_of_clusters_that_codes_cannot_count_are_refused() -> None:
    for clusters in (0, 257):
        with pytest.raises(ValueError, match=f"clusters: {clusters} is not in 1..256"):
            cluster.codebooks(torch.ones(1, 4), clusters)


def test_a_price_leads_to_the_best_of_its_number_of_intervals() -> None:
    values = torch.randn(60, generator=torch.Generator().manual_seed(9)).sort().values.double()
    sums = np.zeros((3, 61))
    for power in range(3):
        sums[power, 1:] = (values**power).cumsum(0)
    work, places, cuts = np.empty(61), np.empty((3, 61), np.int64), np.empty(61, np.int64)
    for price in (10.0, 1.0, 0.1, 0.01, 0.001):
        count = _priced(sums, price, work, places, cuts)
        parts = [values[cuts[k] : cuts[k + 1]] for k in range(count)]
        left = sum(float((part - part.mean()).square().sum()) for part in parts)
        assert left <= slow(values, count, torch.ones(60)) + 1e-9


@pytest.mark.parametrize("kind", ["one", "two", "few", "zeros", "outlier"])
def test_nested_codebooks_of_awkward_rows_are_ascending_and_nearest(kind: str) -> None:
    row = {
        "one": torch.full((1, 40), 3.0),
        "two": torch.tensor([[-1.0, 2.0] * 10]),
        "few": torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]]),
        "zeros": torch.zeros(1, 7),
        "outlier": torch.cat(
            [torch.randn(1, 99, generator=torch.Generator().manual_seed(0)), torch.tensor([[1e4]])], 1
        ),
    }[kind].bfloat16()
    codes, codebooks = cluster.nested(row, 5)
    for width, book in enumerate(codebooks, 2):
        assert (book.diff(dim=1) >= 0).all() and book.isfinite().all()
        distinct = len(row.unique())
        found = book.gather(1, (codes >> (5 - width)).long())
        if width == 5 and distinct <= 5:
            assert torch.equal(found, row.float())
        assert (found - row.float()).square().sum() <= (row.float() - row.float().mean()).square().sum() + 1e-6


def nested_errors(values: Tensor, bits: int) -> list[float]:
    """Of each width, beside that of the codebook of its own."""
    codes, codebooks = cluster.nested(values[None], bits)
    ratios = []
    for width, book in enumerate(codebooks, 2):
        found = book[0].double()[(codes[0] >> (bits - width)).long()]
        own = error(values, cluster.codebooks(values[None], 1 << width)[0])
        ratios.append(float((values.double() - found).square().sum()) / own)
    return ratios


def test_the_worst_width_of_a_nested_codebook_is_nearly_as_good_as_in_any_tree() -> None:
    for seed in range(8):
        values = torch.randn(13, generator=torch.Generator().manual_seed(seed)).sort().values
        own = [error(values, cluster.codebooks(values[None], clusters)[0]) for clusters in (4, 8)]

        def left(cuts: tuple[int, ...], values: Tensor = values) -> float:
            parts = [values[i:j].double() for i, j in itertools.pairwise((0, *cuts, 13))]
            return float(sum((part - part.mean()).square().sum() for part in parts))

        trees = itertools.combinations(range(1, 13), 7)
        best = min(max(left(cuts[1::2]) / own[0], left(cuts) / own[1]) for cuts in trees)
        assert max(nested_errors(values, 3)) <= 1.1 * best


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_nested_codebooks_of_heavy_tails_are_within_five_percent(bits: int) -> None:
    values = torch.from_numpy(np.random.default_rng(0).standard_t(5, 1 << 16)).bfloat16()
    assert max(nested_errors(values, bits)) < 1.05


@pytest.mark.parametrize("values", [[0.0] * 9, [1.0, 1.0, 2.0, 3.0], [1e-30, -1e-30, 3e30] * 5, [7.0]])
def test_nested_codebooks_of_few_values_keep_what_they_can(values: list[float]) -> None:
    weight = torch.tensor([values])
    codes, codebooks = cluster.nested(weight, 4)
    assert torch.allclose(codebooks[-1].gather(1, codes.long()), weight)
    assert all(book.isfinite().all() and (book.diff(dim=1) >= 0).all() for book in codebooks)
