"""The order of the residual stream: found and tried on every architecture, kept where it helps, undone by `verify`."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import compress
from compress import stream
from compress.against import compare
from compress.calibrate import Calibration
from compress.prepare import Prepared
from compress.recipe import Rules
from compress.scheme import Spec
from compress.source import Source
from compress.statistics import Statistics
from compress.stream import Reordered, Stream

TEXT = Calibration(samples=6, seq_len=32)
LOUD = 32  # channels of the stream: as many as a block has


@pytest.fixture(scope="module")
def uneven(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same function with a norm's gain up in some channels, and the columns down that read them."""
    path = tmp_path_factory.mktemp("uneven")
    for file in llama_dir.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(path / "model.safetensors")
    channels = torch.randperm(len(tensors["model.norm.weight"]), generator=torch.Generator().manual_seed(0))[:LOUD]
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[channels] *= 8
        if any(reader in name for reader in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            tensor[:, channels] /= 8
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


class Counting(TorchDispatchMode):
    """Counts what torch is asked to compute, by operation and shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = [tuple(arg.shape) for arg in args if isinstance(arg, torch.Tensor)]
        self.calls[f"{function} {shapes}"] += 1
        return function(*args, **(kwargs or {}))


def prepared(model: Path) -> Prepared:
    return Prepared(model, "bfp", {}, Rules())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(tokens()).logits.float()
    return found


def choose(model: Path, folder: Path) -> Stream | str:
    made = prepared(model)
    return stream.choose(made.source, made.plan, made.structure, tokens(), folder, "cpu")


def tokens() -> torch.Tensor:
    return torch.randint(3, 120, (4, 24), generator=torch.Generator().manual_seed(0))


FOLLOWED = [
    "llama-tied-biased",
    "gemma2",
    "phi",
    "gpt2",
    "opt",
    "gpt-neox",
    "falcon",
    "t5",
    "mixtral",
    "gpt-oss",
    "jetmoe",
]


@pytest.mark.parametrize("name", FOLLOWED)
def test_the_channels_are_found_in_every_tensor(name: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """In another order, every block gives what it gave, in that order; without one of the tensors none does."""
    made, ids = prepared(tiny_model(name)), tokens()
    width = made.structure.model.config.get_text_config().hidden_size
    axes = stream.find(made.structure, made.source, width)
    how = (width, {}, ids, tmp_path, "cpu")
    assert stream._measured(made.source, axes, *how) is not None
    assert stream._measured(made.source, dict(list(axes.items())[1:]), *how) is None


def test_without_a_layer_that_reads_the_stream_it_stays_in_order(uneven: Path, tmp_path: Path) -> None:
    made = Prepared(uneven, "bfp", {}, Rules(include=("down_proj",)))
    found = stream.choose(made.source, made.plan, made.structure, tokens(), tmp_path, "cpu")
    assert found == "no layer that reads it is compressed"


def test_a_convolution_along_the_stream_is_not_taken_for_a_norm(llama_dir: Path) -> None:
    """Its weight is (channels, 1, width): what has the stream on another axis than the last is left alone."""
    made = prepared(llama_dir)
    width = made.structure.model.config.hidden_size
    made.source.specs["model.layers.0.self_attn.o_norm.conv"] = Spec(torch.float32, (width, 1, 3))
    assert "model.layers.0.self_attn.o_norm.conv" not in stream.find(made.structure, made.source, width)


def test_a_model_that_is_not_understood_is_left_as_it_is(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Here the width of the queries is that of the stream, which a layer seems to add to."""
    assert choose(tiny_model("deepseek-v3"), tmp_path) == "tried in another order, this model computes something else"


def test_loud_channels_come_into_blocks_of_their_own(uneven: Path, tmp_path: Path) -> None:
    found = choose(uneven, tmp_path)
    assert isinstance(found, Stream)
    norm = Source(uneven).read("model.layers.0.input_layernorm.weight").abs()
    ends = norm[found.order].float()
    assert ends[-LOUD:].min() > 4 or ends[:LOUD].min() > 4
    assert min(found.gains.values()) >= 0 and max(found.gains.values()) > 0.5


def test_no_order_is_kept_that_makes_a_layer_worse(llama_dir: Path, tmp_path: Path) -> None:
    assert choose(llama_dir, tmp_path) == "every order that was tried makes the error of a layer larger"


def test_another_scheme_that_reads_the_stream_keeps_it_in_order(uneven: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("- {match: q_proj, scheme: int4, method: rtn}\n")
    made = Prepared(uneven, "bfp", {}, Rules(recipe))
    found = stream.choose(made.source, made.plan, made.structure, tokens(), tmp_path, "cpu")
    assert found == "a scheme that does not reorder has a part in it"


def test_the_reordered_model_is_better_and_is_undone_by_verify(uneven: Path, tmp_path: Path) -> None:
    reports = {}
    for reorder in (False, True):
        out = tmp_path / str(reorder)
        how: dict[str, Any] = {"method": "rtn", "reorder": reorder, "scoring": None}
        reports[reorder] = compress.quantize(uneven, out, "bfp", **how, **({"calibration": TEXT} if reorder else {}))
    wanted = logits(AutoModelForCausalLM.from_pretrained(uneven, dtype=torch.float32))
    plain, better = (float((logits(compress.load(tmp_path / str(r))) - wanted).norm()) for r in (False, True))
    assert better < 0.6 * plain
    document = json.loads((tmp_path / "True" / "compress.json").read_text())
    assert document["stream"]["axes"]["model.norm.weight"] == 0
    assert any("residual stream reordered" in note for note in reports[True].notes)
    notes = {line["name"]: line["note"] for line in reports[True].tensors}
    assert "residual stream reordered: squared error down by" in notes["model.layers.0.mlp.gate_proj"]
    lines = list(compare(tmp_path / "True", uneven))
    assert not [line for line in lines if line.problem]
    assert all(line.equal for line in lines if line.action == "copied")
    assert max(line.relative_error for line in lines) < 0.3


def test_nothing_is_added_to_a_forward_pass(uneven: Path, tmp_path: Path) -> None:
    """The same operations, one by one, whether or not channels were reordered."""
    for reorder in (False, True):
        how: dict[str, Any] = {"calibration": TEXT} if reorder else {}
        compress.quantize(uneven, tmp_path / str(reorder), "bfp", method="rtn", reorder=reorder, scoring=None, **how)
    counted = []
    for reorder in (False, True):
        model = compress.load(tmp_path / str(reorder))
        with Counting() as counting:
            logits(model)
        counted.append(counting.calls)
    assert counted[0] == counted[1] and sum(counted[0].values()) > 100


def test_saved_statistics_serve_as_well_as_text(uneven: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"stats": tmp_path / "stats.safetensors", "calibration": TEXT, "scoring": None}
    reports = {}
    for name in ("measured", "read"):
        out = tmp_path / name
        reports[name] = compress.quantize(uneven, out, "bfp", **how)
        assert any("residual stream reordered" in note for note in reports[name].notes)
        assert not [line for line in compare(out, uneven) if line.problem]
    fresh = compress.quantize(uneven, tmp_path / "fresh", "bfp", calibration=TEXT, scoring=None)
    errors = [
        {line["name"]: line["output_error"] for line in r.tensors if line["scheme"]} for r in (fresh, reports["read"])
    ]
    first = "model.layers.0.self_attn.q_proj"  # whose inputs are the same, whatever is compressed before it
    assert errors[1][first] == pytest.approx(errors[0][first], rel=0.02)


def test_what_was_measured_is_put_in_order_by_hand(uneven: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "stats.safetensors"
    how: dict[str, Any] = {"sensitivity": "fisher", "method": "rtn", "scoring": None, "calibration": TEXT}
    compress.quantize(uneven, out, "kmeans", stats=file, **how)
    saved, order = Statistics(file), torch.randperm(64, generator=torch.Generator().manual_seed(0))
    moved = saved.reordered(order.tolist(), {"model.layers.0.mlp.up_proj": 1, "model.layers.0.mlp.down_proj": 0})
    for module, side in (("mlp.up_proj", 1), ("mlp.down_proj", 0), ("self_attn.q_proj", None)):
        name = f"model.layers.0.{module}"
        before, after, squares = saved.stats(name, ()), moved.stats(name, ()), saved.fisher(name)
        assert before is not None and after is not None and squares is not None
        expected = before.second_moment[order] if side == 1 else before.second_moment
        assert torch.equal(after.second_moment, expected)
        found = moved.fisher(name)
        expected = squares if side is None else squares.index_select(side, order)
        assert found is not None and torch.equal(found, expected)


def test_an_order_is_read_back_as_it_was_written() -> None:
    written = Stream({"norm": 0}, [2, 0, 1], {"layer": 0.25})
    assert Stream.from_dict(json.loads(json.dumps(written.to_dict()))) == written


def test_a_reordered_source_gives_slices_and_whole_tensors_alike(tiny_model: Callable[[str], Path]) -> None:
    source = Source(tiny_model("gpt-oss"))
    name = next(name for name, spec in source.specs.items() if len(spec.shape) == 3)
    order = torch.randperm(source.specs[name].shape[1]).tolist()
    other = Reordered(source, {name: 1}, order)
    assert torch.equal(other.read(name), source.read(name)[:, order])
    assert torch.equal(other.read(name, 1), source.read(name)[1][order])
