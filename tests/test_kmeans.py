"""kmeans: cases worked by hand, what each option must keep, and that fitting to outputs pays."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import compress
from compress import outliers
from compress.calibrate import Calibration
from compress.exporting import export
from compress.formats import bitpack, cluster, datatypes
from compress.formats.nf4 import LEVELS
from compress.ganq import Fit
from compress.kernels import lookup, prepared
from compress.kmeans import Kmeans
from compress.registry import make
from compress.stats import Stats

RTN: dict[str, Any] = {"method": "rtn", "sensitivity": "none"}


def gaussian(shape: tuple[int, int], seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(tokens: int, width: int) -> Tensor:
    """Correlated channels of very different size, as activations are."""
    mixed = gaussian((tokens, width), 1, torch.float32) @ gaussian((width, width), 2, torch.float32)
    return mixed * torch.logspace(-1, 1, width)[torch.randperm(width, generator=torch.Generator().manual_seed(3))]


def statistics(x: Tensor) -> Stats:
    return Stats(len(x), x.square().mean(0), x.abs().mean(0), x.abs().amax(0), x.T @ x / len(x))


def output_error(scheme: Kmeans, weight: Tensor, x: Tensor) -> float:
    decoded = scheme.decode(scheme.encode(weight, statistics(x)))
    return float((x @ (weight.float() - decoded.float()).T).norm() / (x @ weight.float().T).norm())


def bits(scheme: Kmeans, shape: tuple[int, int]) -> float:
    return 8 * scheme.bytes(shape, torch.bfloat16) / math.prod(shape)


def test_four_values_are_stored_exactly_in_two_bits() -> None:
    weight = torch.tensor([[3.0, -1.0, 0.5, 7.0, 3.0], [1.0, 1.0, 1.0, 1.0, 1.0]], dtype=torch.bfloat16)
    tensors = Kmeans(bits=2, **RTN).encode(weight)
    assert tensors["codebook"].tolist() == [[-1.0, 0.5, 3.0, 7.0], [1.0] * 4]
    assert bitpack.unpack(tensors["indices"], 2, 5).tolist() == [[2, 0, 1, 3, 2], [0] * 5]
    assert torch.equal(Kmeans(bits=2, **RTN).decode(tensors), weight)


@pytest.mark.parametrize("granularity", ["channel", "tensor", "group"])
def test_rows_share_codebooks_as_granularity_says(granularity: Any) -> None:
    weight, scheme = gaussian((40, 96)), Kmeans(bits=3, granularity=granularity, **RTN)
    tensors = scheme.encode(weight)
    parts = {"channel": 1, "tensor": 40, "group": 16}[granularity]
    expected = torch.cat([cluster.codebooks(rows.reshape(1, -1), 8) for rows in weight.split(parts)])
    assert torch.equal(tensors["codebook"], expected.bfloat16())
    stored = expected.bfloat16().float().repeat_interleave(parts, 0)[:40]
    assert torch.equal(scheme.decode(tensors), stored.gather(1, cluster.assign(weight, stored).long()).bfloat16())


def test_everything_stored_is_counted() -> None:
    # 4096 x 1024 codes; 16 16-bit entries of each row; with int8 and a scale; of 256 groups; with 0.5 % outliers
    shape = (4096, 1024)
    assert bits(Kmeans(), shape) == 4 + 16 * 16 / 1024
    assert bits(Kmeans(entries="int8"), shape) == 4 + (16 * 8 + 16) / 1024
    assert bits(Kmeans(granularity="group", scale=True), shape) == 4 + 16 * 16 / 1024 / 16 + 16 / 1024
    sparse = round(0.005 * math.prod(shape)) * 32 + 4097 * 32
    assert bits(Kmeans(outliers=0.005), shape) == 4 + 16 * 16 / 1024 + sparse / math.prod(shape)
    assert bits(Kmeans(codebook="bitmod3"), shape) == 3 + 16 / 128 + 32 / 1024  # 8 selectors of 2 bits in one word
    assert bits(Kmeans(nested=True), shape) == 4 + 16 * (4 + 8 + 16) / (1 << 16)  # 64 rows share


@pytest.mark.parametrize("width", [2, 3])
def test_importance_of_channels_lowers_the_output_error(width: int) -> None:
    weight, x = gaussian((32, 96)), inputs(400, 96)
    weighted = output_error(Kmeans(bits=width, method="rtn"), weight, x)
    assert weighted < output_error(Kmeans(bits=width, **RTN), weight, x)


@pytest.mark.parametrize(
    "options",
    [
        *({"granularity": granularity} for granularity in ("channel", "tensor", "group")),
        {"entries": "int8"},
        {"scale": True, "granularity": "group"},
        {"outliers": 0.02},
        {"codebook": "nf", "block_size": 32},
        {"codebook": "bitmod3", "block_size": 32},
    ],
    ids=str,
)
def test_fitting_to_the_outputs_lowers_their_error(options: dict[str, Any]) -> None:
    weight, x = gaussian((32, 96)), inputs(400, 96)
    fitted = output_error(Kmeans(bits=3, **options) if "codebook" not in options else made(options), weight, x)
    nearest = output_error(made({**options, "method": "rtn"}), weight, x)
    assert fitted < 0.85 * nearest


def made(options: dict[str, Any]) -> Kmeans:
    scheme = make("kmeans", {"bits": 3, **options})
    assert isinstance(scheme, Kmeans)
    return scheme


def loss(fit: Fit) -> Tensor:
    difference = fit.stored - fit.weight
    return ((difference @ fit.damped) * difference).sum(1)


@pytest.mark.parametrize("rows", [1, 5])
def test_no_step_after_the_first_makes_the_error_larger(rows: int) -> None:
    x, weight = inputs(300, 48), gaussian((15, 48), 4, torch.float32)
    levels = cluster.codebooks(weight.view(15 // rows, -1), 4).repeat_interleave(rows, 0)
    fit = Fit(weight, x.T @ x / 300, levels[None], 48)
    fit.compensate()
    errors = [loss(fit)]
    for _ in range(3):
        fit.refit(rows, torch.ones(15), lambda found: found.bfloat16().float())
        errors.append(loss(fit))
        fit.descend()
        errors.append(loss(fit))
        assert torch.equal(fit.stored, fit.levels[0].gather(1, fit.codes.long()))
        assert (fit.levels[0].diff(dim=1) >= 0).all()
    for before, after in zip(errors, errors[1:], strict=False):
        grouped = [error.view(-1, rows).sum(1) for error in (before, after)]
        assert (grouped[1] <= grouped[0] * (1 + 1e-5)).all()
    assert errors[-1].sum() < 0.95 * errors[0].sum()


def test_a_refit_solves_the_normal_equations() -> None:
    x, weight = inputs(300, 24), gaussian((2, 24), 5, torch.float32)
    fit = Fit(weight, x.T @ x / 300, cluster.codebooks(weight, 4)[None], 24)
    fit.compensate()
    fit.refit(1, torch.ones(2), torch.clone)
    for row in range(2):
        used = torch.nn.functional.one_hot(fit.codes[row].long(), 4).double()
        metric = fit.damped.double()
        exact = torch.linalg.solve(used.T @ metric @ used, used.T @ metric @ weight[row].double())
        assert torch.allclose(fit.levels[0, row].double(), exact, atol=2e-3)


def test_moving_columns_ends_where_no_single_code_is_better() -> None:
    x, weight = inputs(200, 12), gaussian((3, 12), 6, torch.float32)
    fit = Fit(weight, x.T @ x / 200, cluster.codebooks(weight, 4)[None], 12)
    fit.compensate()
    for _ in range(20):
        fit.descend()
    best = loss(fit)
    for column in range(12):
        for code in range(4):
            moved = Fit(weight, fit.hessian, fit.levels, 12)
            moved.damped, moved.stored = fit.damped, fit.stored.clone()
            moved.stored[:, column] = fit.levels[0][:, code]
            assert (loss(moved) >= best * (1 - 1e-5)).all()


def test_outliers_come_back_as_they_were_and_the_rest_gets_nearer() -> None:
    weight = gaussian((8, 128))
    weight[2, 5], weight[7, 127] = 40.0, -60.0
    scheme = Kmeans(bits=2, outliers=2 / 1024, **RTN)
    tensors = scheme.encode(weight)
    assert tensors["outlier_start"].tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 2]
    assert tensors["outlier_column"].tolist() == [5, 127]
    decoded = scheme.decode(tensors)
    assert (decoded[2, 5], decoded[7, 127]) == (40.0, -60.0)
    plain = Kmeans(bits=2, **RTN).decode(Kmeans(bits=2, **RTN).encode(weight))
    assert (decoded - weight)[[2, 7]].norm() < 0.8 * (plain - weight)[[2, 7]].norm()


def test_damaged_outliers_are_refused() -> None:
    tensors = outliers.pack(gaussian((2, 4)), torch.eye(2, 4, dtype=torch.bool), torch.bfloat16)
    with pytest.raises(ValueError, match="outlier_column: is past"):
        outliers.put(torch.zeros(2, 1, dtype=torch.bfloat16), tensors)
    tensors["outlier_start"][1] = 5
    with pytest.raises(ValueError, match="outlier_start: is not that"):
        outliers.put(torch.zeros(2, 4, dtype=torch.bfloat16), tensors)


def test_fixed_codebooks_are_those_of_their_papers() -> None:
    assert torch.allclose(datatypes.levels("nf", 4)[0], torch.tensor(LEVELS), atol=1e-6)
    basic = {0.0, 1.0, 2.0, 4.0, -1.0, -2.0, -4.0}
    tables = [set(table) - basic for table in datatypes.levels("bitmod3", 3).tolist()]
    assert tables == [{-3.0}, {3.0}, {-6.0}, {6.0}]
    four = datatypes.levels("bitmod4", 4)
    assert four.shape == (4, 16) and [set(t) - set(four[0].tolist()) for t in four.tolist()[1:]] == [
        {5.0},
        {-8.0},
        {8.0},
    ]
    for width in range(2, 9):
        levels = datatypes.levels("nf", width)[0]
        assert len(levels) == 1 << width and (levels.diff() > 0).all() and 0.0 in levels.tolist()


def test_a_block_on_one_of_the_four_grids_is_stored_exactly() -> None:
    tables = datatypes.levels("bitmod3", 3)
    weight = torch.cat([table.repeat(4) * scale for table, scale in zip(tables, (0.25, 1, 8, 0.5), strict=True)])[None]
    scheme = Kmeans(codebook="bitmod3", block_size=32, **RTN)
    tensors = scheme.encode(weight.bfloat16())
    assert scheme.bits == 3 and torch.equal(scheme.decode(tensors), weight.bfloat16())
    assert bitpack.unpack(tensors["selector"], 2, 4).tolist() == [[0, 1, 2, 3]]


def test_the_best_of_four_grids_is_better_than_the_basic_one() -> None:
    weight = gaussian((16, 512))
    errors = {}
    for name, tables in (("four", datatypes.levels("bitmod4", 4)), ("one", datatypes.levels("bitmod4", 4)[:1])):
        scales, numbers = datatypes.search(weight, tables, 128, torch.ones(1, 512))
        levels = (scales[..., None] * tables[numbers.int()]).view(64, 16)
        blocks = weight.view(64, 128)
        found = levels.gather(1, cluster.assign(blocks, levels).long())
        errors[name] = float((found - blocks.float()).norm())
    assert errors["four"] < 0.98 * errors["one"]


@pytest.mark.parametrize(
    ("bits", "options"),
    [(2, {}), (4, {}), (6, {}), (4, {"granularity": "group", "entries": "int8", "scale": True})],
    ids=str,
)
def test_a_nested_weight_is_read_at_any_width(bits: int, options: dict[str, Any]) -> None:
    """Within 5 % of the error of codebooks of their own, which as many rows share: here all."""
    weight, scheme = gaussian((32, 1024)), Kmeans(bits=bits, nested=True, **RTN, **options)
    tensors = scheme.encode(weight)
    for width in range(2, bits + 1):
        narrow, fewer = scheme.recode(tensors, bits=width)
        assert fewer["indices"].shape == (width, 32, 32)
        narrow.check({name: compress.scheme.Spec.of(name, tensor) for name, tensor in fewer.items()})
        own = Kmeans(bits=width, **RTN, **{**options, "granularity": "tensor"})
        errors = [
            float((w - weight).float().norm()) ** 2 for w in (narrow.decode(fewer), own.decode(own.encode(weight)))
        ]
        assert errors[0] <= 1.05 * errors[1]
    for wrong in ({"bits": bits + 1}, {"bits": 1}, {"group_size": 3}):
        with pytest.raises(ValueError, match="cannot be chosen at loading"):
            scheme.recode(tensors, **wrong)


def test_a_nested_checkpoint_is_loaded_with_fewer_bits(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    compress.quantize(tiny_model("llama"), tmp_path / "out", "kmeans", nested=True, scoring=None, **RTN)
    module = "model.layers.0.mlp.up_proj"
    weights = {}
    for width in (2, 3, 4):
        model = compress.load(tmp_path / "out", bits=width)
        assert model.get_submodule(module).scheme.bits == width
        weights[width] = model.get_submodule(module).weight.float()
    full = compress.load(tmp_path / "out").get_submodule(module).weight.float()
    assert torch.equal(weights[4], full)
    assert (weights[3] - full).norm() < (weights[2] - full).norm()
    with pytest.raises(ValueError, match="bits=2 to 4"):
        compress.load(tmp_path / "out", bits=5)
    compress.quantize(tiny_model("llama"), tmp_path / "plain", "kmeans", scoring=None, **RTN)
    with pytest.raises(ValueError, match="kmeans with nested=true"):
        compress.load(tmp_path / "plain", bits=3)


def test_a_calibrated_checkpoint_is_written_as_planned_runs_and_is_exported(llama_dir: Path, tmp_path: Path) -> None:
    report = compress.quantize(
        llama_dir, tmp_path / "out", "kmeans", bits=3, granularity="group", scoring=None,
        calibration=Calibration(samples=4, seq_len=32),
    )  # fmt: skip
    assert all(line["output_error"] is not None for line in report.tensors if line["scheme"] == "kmeans")
    export(tmp_path / "out", tmp_path / "plain")
    tokens = torch.arange(3, 23)[None]
    with torch.no_grad():
        found, plain = (compress.load(tmp_path / name)(tokens).logits for name in ("out", "plain"))
    assert torch.allclose(found.float(), plain.float(), atol=0.05)


@pytest.mark.parametrize("planes", [False, True], ids=["packed", "planes"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_compiled_lookup_gives_what_plain_torch_gives(dtype: torch.dtype, planes: bool) -> None:
    for width in range(1, 9):
        for (rows, columns), shared, block in (((5, 70), 2, 70), ((3, 33), 1, 32), ((1, 1), 1, 1)):
            codes = torch.randint(0, 1 << width, (rows, columns), dtype=torch.uint8)
            packed = bitpack.pack(codes, width)
            if planes:
                packed = torch.stack([bitpack.pack((codes >> b) & 1, 1) for b in range(width - 1, -1, -1)])
            tables = torch.randn(-(-rows // shared), -(-columns // block), 1 << width).to(dtype)
            found = lookup.decode(packed, tables, (rows, columns), shared, block)
            assert torch.equal(found, lookup.decode_torch(packed, tables, (rows, columns), shared, block))
            assert found[-1, -1] == tables[-1, -1, int(codes[-1, -1])]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("options", [{}, {"codebook": "nf"}, {"nested": True}], ids=["learned", "nf", "nested"])
def test_on_a_gpu_codes_lie_in_memory_once(bits: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = Kmeans(bits=bits, **options, **RTN)
    tensors = scheme.encode(gaussian((5, 131)))
    with monkeypatch.context() as patch:
        patch.setattr(prepared, "runs_triton", lambda device: True)
        held = scheme.prepare(tensors)
    assert held.weight.indices.data_ptr() == tensors["indices"].data_ptr()
    assert torch.equal(held.decode(), scheme.decode(tensors))


def test_tensors_that_do_not_belong_together_are_refused() -> None:
    tensors = Kmeans(**RTN).encode(gaussian((8, 64)))
    with pytest.raises(ValueError, match="codebook is .*, and kmeans needs"):
        compress.decode({**tensors, "codebook": tensors["codebook"][:3]}, "kmeans")
    with pytest.raises(ValueError, match="no like is stored"):
        compress.decode({name: tensor for name, tensor in tensors.items() if name != "like"}, "kmeans")
    with pytest.raises(ValueError, match="indices: "):
        Kmeans(**RTN).decode({**tensors, "indices": tensors["indices"][:, :3]})
    with pytest.raises(ValueError, match="tables: "):
        Kmeans(**RTN).decode({**tensors, "codebook": tensors["codebook"][:3]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, "bits is 0; give 1 to 8"),
        ({"bits": 1, "nested": True}, "bits is 1; give 2 to 8"),
        ({"bits": 2, "codebook": "bitmod3"}, "bits is 2; give 3"),
        ({"group_size": 0}, "group_size is 0; give 1 or more"),
        ({"outliers": 0.7}, "outliers is 0.7; give a fraction"),
        ({"codebook": "nf", "nested": True}, "are for codebook=learned, not nf"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("kmeans", options)


def test_without_data_nothing_is_asked_for_and_with_it_what_is_used() -> None:
    wants = {(s.needs_calibration, s.needs_hessian) for s in (Kmeans(), Kmeans(sensitivity="none"))}
    assert wants == {(True, True)}
    assert (Kmeans(method="rtn").needs_calibration, Kmeans(method="rtn").needs_hessian) == (True, False)
    assert (Kmeans(nested=True).needs_calibration, Kmeans(nested=True).needs_hessian) == (True, False)
    assert not Kmeans(**RTN).needs_calibration


def test_threads_do_not_change_a_bit(on_threads: Any) -> None:
    weight = gaussian((60, 2048))
    first, *others = on_threads(lambda: Kmeans(bits=3, **RTN).encode(weight))
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    x, weight = inputs(100, 32), gaussian((6, 32))
    x[:, ::2] = 0
    for scheme in (Kmeans(bits=3), Kmeans(bits=3, method="rtn")):
        decoded = scheme.decode(scheme.encode(weight, statistics(x)))
        assert (decoded[:, ::2].float() - weight[:, ::2].float()).norm() < 0.5 * weight[:, ::2].float().norm()
    nothing = Kmeans(bits=3).encode(weight, statistics(torch.zeros(10, 32)))
    assert (Kmeans(bits=3).decode(nothing) - weight).float().norm() < 0.3 * weight.float().norm()


def test_a_weight_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="holds nothing"):
        Kmeans(**RTN).encode(torch.empty(0, 4, dtype=torch.bfloat16))


def test_fitting_gives_the_same_bytes_on_any_number_of_threads(on_threads: Any) -> None:
    x = inputs(600, 512)
    first, *others = on_threads(lambda: Kmeans(bits=3).encode(gaussian((2100, 512)), statistics(x)))
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)
