"""bitstack on one weight: what each block stores and leaves, beside slow references."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import compress
from compress.bitstack import Bitstack
from compress.kernels import bitstack as kernels
from compress.lowrank import truncated_svd
from compress.scheme import Spec, Tensors
from compress.stats import Stats


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stats_of(moment: Tensor) -> Stats:
    root = moment.sqrt()
    return Stats(100, moment, root, root)


def first_blocks(tensors: Tensors, blocks: int) -> Tensors:
    return {local: tensor for local, tensor in tensors.items() if Bitstack().block_of(local) < blocks}


def energies(weight: Tensor, tensors: Tensors, importance: Tensor | None = None) -> list[float]:
    """What is left of |W|^2 with 1, 2, ... blocks; importance: (n,), of each column."""
    columns = torch.ones(weight.shape[1]) if importance is None else importance
    scheme, total = Bitstack(), float((weight.double().square() * columns).sum())
    blocks = sum(local.startswith("plane_") for local in tensors)
    decoded = [scheme.decode(first_blocks(tensors, count)).double() for count in range(1, blocks + 1)]
    return [float(((weight.double() - w).square() * columns).sum()) / total for w in decoded]


def test_three_weights_worked_by_hand() -> None:
    tensors = {
        "like": torch.empty(0, 1, 3),
        "u": torch.tensor([[2.0]]).bfloat16(),
        "v": torch.tensor([[1.0, 1.0, 0.5]]).bfloat16(),
        "plane_0": torch.tensor([[0b010]], dtype=torch.uint8),
        "steps_0": torch.tensor([1.0]).half(),
        "plane_1": torch.tensor([[0b100]], dtype=torch.uint8),
        "steps_1": torch.tensor([-0.5, 0.75]).half(),
        "plane_2": torch.tensor([[0b101]], dtype=torch.uint8),
        "steps_2": torch.tensor([-0.25, 0.125, -0.5, 0.25]).half(),
    }
    scheme = Bitstack(blocks=3)
    assert scheme.decode(first_blocks(tensors, 1)).tolist() == [[2.0, -2.0, 1.0]]
    assert scheme.decode(first_blocks(tensors, 2)).tolist() == [[1.0, -1.0, 1.75]]
    assert scheme.decode(tensors).tolist() == [[1.25, -0.5, 2.0]]


def test_where_other_factors_take_the_scale_away_a_sixteenth_of_the_first_is_left() -> None:
    u, v = torch.tensor([[1.0, 1.0]]).bfloat16(), torch.tensor([[4.0, 4.0, 4.0], [-4.0, -5.0, 1.0]]).bfloat16()
    assert kernels.scale(u, v).tolist() == [[0.25, 0.25, 5.0]]


def test_signs_alone_store_an_outer_product_of_magnitudes_exactly() -> None:
    weight = torch.tensor([[1.0], [2.0], [0.5]]) * torch.tensor([[1.0, -4.0, 2.0, -0.5]])
    weight[1] *= -1
    tensors = Bitstack(blocks=1).encode(weight)
    assert torch.allclose(Bitstack().decode(tensors), weight, rtol=2**-7)  # u and v are bfloat16
    assert tensors["plane_0"].tolist() == [[0b1010], [0b0101], [0b1010]]


def test_two_magnitudes_in_no_order_take_two_blocks() -> None:
    weight = torch.eye(64) * 3 + 1
    weight[5, 9] = -1
    left = energies(weight, Bitstack(blocks=2).encode(weight))
    assert left[0] > 0.1 and left[1] < 1e-4


def slow_decode(tensors: Tensors) -> Tensor:
    """The definition in kernels/bitstack.py, one weight after the other."""
    u, v = tensors["u"].float(), tensors["v"].float()
    blocks = sum(local.startswith("plane_") for local in tensors)
    out = torch.empty(u.shape[0], v.shape[1])
    for row, column in itertools.product(range(u.shape[0]), range(v.shape[1])):
        bits = [int(tensors[f"plane_{i}"][row, column // 8]) >> column % 8 & 1 for i in range(blocks)]
        scale = max(sum((u[row] * v[:, column]).tolist()), float(u[row, 0] * v[0, column]) / 16)
        level = 0.0
        for i in range(blocks):
            steps = tensors[f"steps_{i}"].tolist()
            before = bits[1:i][: len(steps).bit_length() - 2]
            level += steps[int("".join(map(str, [*before, bits[i]])), 2)] if i else steps[0]
        out[row, column] = (-1) ** bits[0] * scale * level
    return out


@pytest.mark.parametrize("blocks", [1, 2, 8, 10, 16])
@pytest.mark.parametrize("shape", [(5, 11), (1, 8), (3, 1), (9, 64)], ids=str)
def test_decode_is_its_definition(shape: tuple[int, int], blocks: int) -> None:
    tensors = Bitstack(blocks=blocks, rank="3").encode(gaussian(*shape))
    assert torch.allclose(Bitstack().decode(tensors), slow_decode(tensors), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(40, 131), (1, 7), (130, 64)], ids=str)
def test_plain_torch_gives_the_same_bits(shape: tuple[int, int], dtype: torch.dtype) -> None:
    scheme = Bitstack(blocks=9)
    stack = scheme.prepare(scheme.encode(gaussian(*shape).to(dtype))).weight
    assert torch.equal(kernels.decode(stack), kernels.decode_torch(stack))


def slow_planes(weight: Tensor, tensors: Tensors) -> list[list[int]]:
    """The code of every weight, highest bit first: at each plane the nearer of the two levels."""
    ratios = (weight.abs() / kernels.scale(tensors["u"], tensors["v"])).flatten().tolist()
    codes = []
    for ratio in ratios:
        bits: list[int] = []
        level = float(tensors["steps_0"])
        for i in range(1, sum(local.startswith("plane_") for local in tensors)):
            steps = tensors[f"steps_{i}"].tolist()
            at = 2 * int("0" + "".join(map(str, bits[: len(steps).bit_length() - 2])), 2)
            bits.append(int(abs(ratio - level - steps[at + 1]) < abs(ratio - level - steps[at])))
            level += steps[at + bits[-1]]
        codes.append(bits)
    return codes


def test_every_bit_chooses_the_nearer_level() -> None:
    weight = gaussian(6, 20)
    tensors = Bitstack(blocks=7).encode(weight)
    found = [kernels._bits(tensors[f"plane_{i}"], 20).flatten().tolist() for i in range(1, 7)]
    assert [list(bits) for bits in zip(*found, strict=True)] == slow_planes(weight, tensors)
    assert torch.equal(kernels._bits(tensors["plane_0"], 20).bool(), weight < 0)


def test_each_block_leaves_less_and_the_first_eight_what_a_good_quantizer_does() -> None:
    weight = gaussian(768, 1024)
    left = energies(weight, Bitstack().encode(weight))
    assert all(after < before / 2 for before, after in itertools.pairwise(left))
    # Lloyd-Max quantizers of 1 to 8 bits leave .363, .117, .0345, .0095, .0025, .00066, .00017, .000043 of a Gaussian.
    lloyd = [0.3634, 0.1175, 0.03454, 0.009497, 0.002499, 0.0006642, 0.0001729, 0.0000443]
    assert all(found < 1.25 * best for found, best in zip(left, lloyd, strict=True))
    assert left[0] < 0.9935 * lloyd[0]  # the scale has followed the weights


def test_sixteen_blocks_leave_next_to_nothing() -> None:
    weight = gaussian(64, 256).bfloat16()
    left = energies(weight, Bitstack(blocks=16).encode(weight))
    assert all(after <= before for before, after in itertools.pairwise(left)) and left[-1] < 1e-5


def test_rows_and_columns_of_other_sizes_lose_no_more_than_a_gaussian() -> None:
    spread = torch.logspace(-3, 1, 512)
    for weight in (gaussian(512, 512) * spread[:, None], gaussian(512, 512) * spread):
        left = energies(weight, Bitstack().encode(weight))
        assert left[1] < 0.12 and left[3] < 0.0102 and left[7] < 6e-5


def test_the_levels_reach_heavy_tails() -> None:
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(4.0).sample((512, 512))
    left = energies(weight, Bitstack().encode(weight))
    assert left[1] < 0.22 and left[3] < 0.03 and left[7] < 2.5e-4  # residual signs of rank 16: .22, .085


def test_parts_of_a_matrix_that_have_nothing_in_common_are_all_seen() -> None:
    """The largest singular vectors are zero on the smaller of two blocks: a scale of them would be, too."""
    weight = torch.zeros(128, 128)
    weight[:64, :64], weight[64:, 64:] = gaussian(64, 64), gaussian(64, 64, seed=1) / 2
    for rank in ("1", "2"):
        decoded = Bitstack(rank=rank).decode(Bitstack(rank=rank).encode(weight))
        assert ((weight - decoded)[64:].norm() / weight[64:].norm()).item() < 0.1
    assert torch.allclose(Bitstack().decode(Bitstack(blocks=2).encode(torch.eye(64))), torch.eye(64), rtol=1e-3)


def test_zeros_one_row_and_one_weight() -> None:
    scheme = Bitstack()
    assert not scheme.decode(scheme.encode(torch.zeros(4, 9))).any()
    weight = gaussian(4, 9)
    weight[1], weight[:, 4] = 0, 0
    decoded = scheme.decode(scheme.encode(weight))
    assert not decoded[1].any() and not decoded[:, 4].any() and (weight - decoded).norm() < 0.1 * weight.norm()
    for single in (torch.tensor([[-3.5]]), torch.tensor([[1e-40]]), torch.tensor([[3e38]])):
        assert torch.allclose(scheme.decode(scheme.encode(single)), single, rtol=0.01, atol=0)


def test_a_value_near_the_end_of_its_dtype_stays_finite() -> None:
    weight = gaussian(8, 64).half()
    weight[3, 5] = 65504
    for blocks in range(1, 9):
        tensors = Bitstack(blocks=blocks).encode(weight)
        assert Bitstack().decode(tensors).isfinite().all()


def full_svd_error(matrix: Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(matrix.double())[rank:].square().sum().sqrt())


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_the_truncated_svd_is_as_near_as_the_full_one(rank: int) -> None:
    for matrix in (gaussian(200, 300).abs(), gaussian(300, 64).abs() * torch.logspace(-2, 0, 64), gaussian(16, 16)):
        u, v = truncated_svd(matrix, rank)
        assert torch.allclose(v.double() @ v.double().T, torch.eye(rank, dtype=torch.float64), atol=1e-5)
        error = float((matrix.double() - u.double() @ v.double()).norm())
        # A Gaussian's values lie close together: the smaller it is, the more a direction that is missed matters.
        assert error <= (1.001 if rank == 1 else 1.01) * full_svd_error(matrix, rank) + 1e-4


def test_the_truncated_svd_of_a_matrix_of_little_rank_is_exact() -> None:
    for m, n, true in ((60, 90, 3), (90, 60, 10), (20, 30, 20), (5, 7, 1)):
        matrix = gaussian(m, true) @ gaussian(true, n, seed=1)
        matrix[2], matrix[:, 1] = 0, 0
        for rank in {true, min(m, n, true + 4)}:
            u, v = truncated_svd(matrix, rank)
            assert (u @ v - matrix).norm() < 1e-5 * matrix.norm()
            assert not u[2].any() and not v[:, 1].any()


def test_the_same_bytes_on_any_number_of_threads(on_threads: Any) -> None:
    weight, before = gaussian(600, 700).bfloat16(), torch.get_num_threads()
    first, *others = on_threads(lambda: Bitstack().encode(weight))
    assert torch.get_num_threads() == before
    assert all(
        torch.equal(first[key].view(torch.uint8), other[key].view(torch.uint8)) for other in others for key in first
    )


def test_columns_that_carry_more_lose_less() -> None:
    weight, moment = gaussian(256, 256), torch.ones(256)
    weight[:128, 32:] *= 8  # rows are large where columns are not important, and the other way round
    weight[128:, :32] *= 8
    moment[:32] = 400
    with_stats = energies(weight, Bitstack().encode(weight, stats_of(moment)), moment)
    without = energies(weight, Bitstack(scaling="none").encode(weight, stats_of(moment)), moment)
    assert all(a <= b for a, b in zip(with_stats[:4], without[:4], strict=True)) and with_stats[0] < 0.95 * without[0]


def test_a_scale_of_the_inputs_changes_v_and_no_code() -> None:
    """So a norm can take it, or leave it."""
    generator = torch.Generator().manual_seed(1)
    weight, scale = gaussian(40, 96), torch.exp2(torch.randint(-3, 4, (96,), generator=generator).float())
    moment = torch.logspace(-2, 2, 96)[torch.randperm(96, generator=generator)]
    before = Bitstack().encode(weight, stats_of(moment))
    after = Bitstack().encode(weight * scale, stats_of(moment / scale**2))
    first, second = (Bitstack().decode(tensors) for tensors in (before, after))
    assert (second / scale - first).norm() < 0.02 * first.norm()  # factors are bfloat16
    planes = [[kernels._bits(tensors[f"plane_{i}"], 96) for tensors in (before, after)] for i in range(4)]
    same = [float((a == b).float().mean()) for a, b in planes]
    assert same[0] == 1 and min(same) > 0.97


def test_the_scale_for_a_norm_is_the_nearest_power_of_two() -> None:
    scale = Bitstack().exact_scale(torch.tensor([1.0, 4.0, 16.0, 0.0, 0.3, 79.0]))
    # of roots of these by their mean, 16.717: .245, .489, .978, 0, .134, 2.174
    assert scale is not None and scale.tolist() == [0.25, 0.5, 1.0, 2**-7, 0.125, 2.0]
    scale = Bitstack().exact_scale(torch.zeros(3))
    assert scale is not None and scale.tolist() == [1, 1, 1]


def test_only_scaling_by_activations_needs_text() -> None:
    assert Bitstack().needs_calibration and not Bitstack(scaling="none").needs_calibration
    weight = gaussian(8, 32)
    for moment in (torch.zeros(32), torch.full((32,), 1e-30), torch.full((32,), 1e30)):
        decoded = Bitstack().decode(Bitstack().encode(weight, stats_of(moment)))
        assert (weight - decoded).norm() < 0.05 * weight.norm()


def test_the_factors_take_less_than_12_percent() -> None:
    for shape in ((4096, 4096), (1024, 4096), (14336, 4096), (384, 1024), (576, 576)):
        m, n = shape
        rank = Bitstack().rank_of(shape)
        assert rank >= 1 and 16 * rank * (m + n) <= 0.12 * m * n
        size = Bitstack().bytes(shape, torch.bfloat16)
        assert 8 * size / (m * n) < 8 * 1.01 + 0.12
    assert Bitstack(rank="5").rank_of((4, 100)) == 4  # no more than the matrix has


def test_what_a_prepared_weight_holds_is_counted() -> None:
    for shape, blocks in (((20, 131), 5), ((7, 256), 2), ((9, 64), 8)):
        scheme = Bitstack(blocks=blocks, rank="3")
        tensors = scheme.encode(gaussian(*shape))
        stack = scheme.prepare(tensors).weight
        held = stack.levels.nbytes + stack.vectors.nbytes
        held += 0 if stack.pairs is stack.vectors else stack.pairs.nbytes
        specs = {local: Spec.of(local, tensor) for local, tensor in tensors.items()}
        assert scheme.prepared_bytes(specs, "cpu") == held
        assert scheme.prepared_bytes(specs, "cuda") == stack.levels.nbytes  # whose kernels read v as it is


def test_tensors_may_lie_in_memory_in_any_order() -> None:
    tensors = compress.encode(gaussian(24, 300), "bitstack", blocks=3, scaling="none")
    turned = {name: t.mT.contiguous().mT if t.dim() == 2 else t for name, t in tensors.items()}
    found, wanted = (compress.decode(some, "bitstack", blocks=3, scaling="none") for some in (turned, tensors))
    assert torch.equal(found, wanted)


def test_any_number_of_blocks_is_whole_but_none_may_be_missing_between() -> None:
    scheme, tensors = Bitstack(), Bitstack().encode(gaussian(8, 32))
    specs = {local: Spec.of(local, tensor) for local, tensor in tensors.items()}
    for blocks in range(1, 9):
        some = {local: spec for local, spec in specs.items() if scheme.block_of(local) < blocks}
        scheme.check(some)
        assert scheme.original(some) == Spec(torch.float32, (8, 32))
    for absent, message in (
        ("plane_3", "no plane_3"),
        ("u", "no u is"),
        ("like", "no like"),
        ("plane_0", "no plane_0"),
    ):
        with pytest.raises(ValueError, match=message):
            scheme.check({local: spec for local, spec in specs.items() if local != absent})
    with pytest.raises(ValueError, match="plane_2 is .* and bitstack needs"):
        scheme.check({**specs, "plane_2": Spec(torch.uint8, (8, 3))})
    with pytest.raises(ValueError, match="plane_8 is stored, and Bitstack.* has none"):
        scheme.check({**specs, "plane_8": specs["plane_7"]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 0}, "blocks is 0; give a number from 1 to 16"),
        ({"blocks": 17}, "blocks is 17"),
        ({"rank": "0"}, "rank is '0'; give auto, or a number"),
        ({"rank": "many"}, "rank is 'many'"),
        ({"scaling": "fisher"}, "scaling is 'fisher'"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress.encode(gaussian(4, 4), "bitstack", **options)
