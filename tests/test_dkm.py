"""Training codebooks on what their block gives: exact gradients, little kept for them, and only what helps is kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import compress
from compress import refine
from compress.calibrate import Calibration
from compress.dkm import TEMPERATURE, Clusters
from compress.formats import cluster
from compress.formats.checkpoint import Checkpoint
from compress.kmeans import Kmeans
from compress.samples import Samples

RTN: dict[str, Any] = {"method": "rtn", "sensitivity": "none"}
TEXT = Calibration(samples=6, seq_len=32)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def clusters(weight: Tensor, entries: int, rows: int, scale: Tensor | None = None) -> tuple[Clusters, Tensor, Tensor]:
    """Those of the nearest entries of optimal codebooks; these, and the codes."""
    scaled = weight if scale is None else weight / scale
    levels = cluster.codebooks(scaled.view(-1, rows * weight.shape[1]), entries)
    codes = cluster.assign(scaled, levels.repeat_interleave(rows, 0))
    return Clusters(weight, codes, levels, rows, scale), levels, codes


def attended(weight: Tensor, levels: Tensor) -> Tensor:
    """DKM's soft assignment as torch computes it: what stands for each weight of rows that have a codebook each."""
    gap = (levels[:, -1] - levels[:, 0]) / (levels.shape[1] - 1)
    temperature = (TEMPERATURE * gap.detach().square())[:, None, None]
    distance = (weight[..., None] - levels[:, None]).square()
    return ((-distance / temperature).softmax(-1) * levels[:, None]).sum(-1)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("scaled", [False, True])
def test_its_gradients_are_those_of_the_soft_assignment(rows: int, scaled: bool) -> None:
    x, weight = gaussian(2, 7, 40, seed=1).requires_grad_(), gaussian(6, 40)
    scale = torch.rand(6, 1, generator=torch.Generator().manual_seed(2)) + 0.5 if scaled else None
    made, levels, _ = clusters(weight, 4, rows, scale)
    y = made.multiply(x)
    given = gaussian(2, 7, 6, seed=3)
    found = torch.autograd.grad(y, [x, *made.parameters], given)
    # The same at the 256 values, with the parameters where they are.
    values = made.values.repeat_interleave(rows, 0).gather(1, made.indices.long())
    shift = torch.zeros_like(levels).requires_grad_()
    gap = (levels[:, -1:] - levels[:, :1]) / 3
    soft = attended(values, (levels + gap * shift).repeat_interleave(rows, 0))
    grow = torch.zeros(6, 1).requires_grad_()
    soft = soft if scale is None else soft * scale * (1 + grow)
    expected = torch.autograd.grad(F.linear(x.detach(), soft), [shift, grow][: 1 + scaled], given)
    torch.testing.assert_close(found[1], expected[0], rtol=1e-3, atol=1e-4)
    hard = levels.repeat_interleave(rows, 0).gather(1, cluster.assign(values, levels.repeat_interleave(rows, 0)).long())
    hard = hard if scale is None else hard * scale
    torch.testing.assert_close(y, F.linear(x, hard))
    torch.testing.assert_close(found[0], given @ hard)
    if scaled:  # forwards it is the nearest entry, and so for what multiplies with it
        of_weight = given.flatten(0, 1).T @ x.detach().flatten(0, 1)
        torch.testing.assert_close(found[2], (of_weight * hard).sum(1, keepdim=True))


@pytest.mark.parametrize("options", [{}, {"entries": "int8"}, {"scale": True, "granularity": "group"}], ids=str)
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_what_is_not_trained_stays_as_it_is(bits: int, options: dict[str, Any]) -> None:
    weight = gaussian(20, 96).bfloat16()
    weight[3] = 0.5  # of which all are one value
    scheme = Kmeans(bits=bits, refine=5, **options, **RTN)
    tensors = scheme.encode(weight)
    made = scheme.trained(tensors, scheme.trainable(weight, tensors))
    assert made.keys() == tensors.keys()
    decoded, before = scheme.decode(made).float(), scheme.decode(tensors).float()
    torch.testing.assert_close(
        decoded, before, rtol=2**-7, atol=0.02 if bits == 8 else 1e-6
    )  # 8 bits: one value a cell


def test_weights_that_were_moved_to_another_entry_stay_there() -> None:
    codes, levels = torch.tensor([[1, 1, 2, 3]], dtype=torch.uint8), torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    made = Clusters(None, codes, levels, 1, None)
    assert torch.equal(made.codes(levels), codes)
    torch.testing.assert_close(made.multiply(torch.eye(4)), torch.tensor([[1.0], [1.0], [2.0], [3.0]]))


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    """Of all tensors that are kept for a backward pass; those that share memory once."""
    sizes: dict[int, int] = {}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)  # so that no other gets its place
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        forward().sum().backward()  # type: ignore[no-untyped-call]
    return sum(sizes.values())


def test_fifty_times_less_is_kept_than_by_the_soft_assignment_itself() -> None:
    x, weight = gaussian(2, 1024), gaussian(256, 1024)
    made, levels, _ = clusters(weight, 8, 256)
    own = saved_bytes(lambda: made.multiply(x))
    indices, values = 256 * 1024, 4 * 256
    assert own == indices + values + 4 * x.numel() + 4 * (8 + 1 + 1)  # codebook, its mean gap, temperature
    shift = levels.clone().requires_grad_()
    plain = saved_bytes(lambda: F.linear(x, attended(weight, shift.expand(256, 8))))
    assert plain > 50 * own


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"granularity": "group"}),
        ("llama", {"method": "rtn", "entries": "int8"}),
        ("gpt2", {"granularity": "tensor", "scale": True, **RTN}),
        ("mixtral", {"granularity": "group", **RTN}),
        ("gpt-oss", {"granularity": "group", **RTN}),
    ],
)
def test_the_output_of_each_block_gets_nearer_to_the_original(
    name: str, options: dict[str, Any], tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: Any
) -> None:
    tokens = torch.randint(3, 60, (6, 24), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("compress.run.draw", lambda *_: Samples(tokens, "random"))
    report = compress.quantize(tiny_model(name), tmp_path / "out", "kmeans", bits=2, refine=12, scoring=None, **options)
    notes = {line["note"] for line in report.tensors if line["scheme"] and "refined" in (line["note"] or "")}
    assert len(notes) == 2  # one of each block
    for note in notes:
        before, after = (float(part) for part in note.replace(",", "").split() if part[0] == "0")
        assert after < before and "not kept" not in note
    assert compress.load(tmp_path / "out")(torch.arange(3, 9)[None]).logits.isfinite().all()


def bits_of(path: Path) -> dict[str, bytes]:
    checkpoint = Checkpoint(path)
    return {name: bytes(checkpoint.raw(name)) if entry.bytes else b"" for name, entry in checkpoint.entries.items()}


def test_what_makes_a_block_worse_is_not_kept(llama_dir: Path, tmp_path: Path, monkeypatch: Any) -> None:
    how: dict[str, Any] = {"bits": 3, "scoring": None, "calibration": TEXT, "granularity": "group"}
    compress.quantize(llama_dir, tmp_path / "plain", "kmeans", **how)
    monkeypatch.setattr(refine, "RATE", 30.0)
    report = compress.quantize(llama_dir, tmp_path / "out", "kmeans", refine=2, **how)
    assert bits_of(tmp_path / "out") == bits_of(tmp_path / "plain")
    assert all("not kept" in line["note"] for line in report.tensors if line["scheme"])


class Killed(BaseException):
    """Nothing of ours catches it, as nothing catches kill -9."""


def test_an_interrupted_run_writes_the_same_bytes(llama_dir: Path, tmp_path: Path, monkeypatch: Any) -> None:
    how: dict[str, Any] = {"bits": 2, "refine": 4, "scoring": None, "calibration": TEXT}
    compress.quantize(llama_dir, tmp_path / "out", "kmeans", **how)
    train, calls = refine.train, [0]

    def dying(*arguments: Any) -> None:
        train(*arguments)
        calls[0] += 1
        if calls[0] == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(refine, "train", dying)
        with pytest.raises(Killed):
            compress.quantize(llama_dir, tmp_path / "cut", "kmeans", **how)
    compress.quantize(llama_dir, tmp_path / "cut", "kmeans", **how)
    assert bits_of(tmp_path / "cut") == bits_of(tmp_path / "out")


def test_it_is_refused_where_there_is_nothing_to_train_or_to_run(llama_dir: Path, tmp_path: Path) -> None:
    for options in ({"codebook": "nf"}, {"nested": True}, {"outliers": 0.01}):
        with pytest.raises(ValueError, match="refine is 3; give 0, or steps for codebook=learned"):
            Kmeans(refine=3, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="refine is -1"):
        Kmeans(refine=-1)
    with pytest.raises(ValueError, match="refine: .* --stats is there to run none"):
        compress.quantize(llama_dir, tmp_path / "out", "kmeans", refine=3, stats=tmp_path / "file", scoring=None)
