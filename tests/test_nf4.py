"""nf4: by hand, beside a slow reference and bitsandbytes' own quantizer, and as checkpoints in bitsandbytes' hands.

One other process, which never imports us, loads our directories and writes some with bitsandbytes itself.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import compress
from compress.bitsandbytes import NAMES, read
from compress.exporting import export
from compress.formats.nf4 import LEVELS, dynamic_levels, encode, nest
from compress.hf import model_class
from compress.kernels import nf4 as kernels
from compress.kernels.linear import CompressedLinear
from compress.nf4 import BLOCK_SIZES, Nf4, State
from compress.recipe import Rules
from compress.scheme import Spec, Tensors

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(16, 128), (1, 1), (3, 1), (7, 131), (130, 258), (1, 64)]


def gaussian(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(scale).to(dtype)


def slow_codes(weight: Tensor, block_size: int) -> tuple[list[int], list[float]]:
    """Value by value in float32: the first level that the value is not beyond the middle to the next of."""
    values = weight.float().flatten().numpy()
    middles = [(low + high) / np.float32(2) for low, high in zip(LEVELS[:-1], LEVELS[1:], strict=True)]
    codes, maxima = [], []
    for start in range(0, len(values), block_size):
        block = values[start : start + block_size]
        whole = len(block) == block_size
        largest = max(abs(block))
        floor = max(largest, np.float32(1e-38))
        maxima.append(float(largest if whole else floor))
        for value in block:
            scaled = value * (np.float32(1) / floor) if whole else value / floor
            codes.append(next((i for i, middle in enumerate(middles) if scaled <= middle), 15))
    return codes, maxima


def test_the_levels_are_the_quantiles_that_the_paper_defines() -> None:
    outermost = 1 - (1 / 30 + 1 / 32) / 2
    sides = [torch.linspace(outermost, 0.5, count + 1, dtype=torch.float64)[:-1] for count in (8, 7)]
    positive, negative = (torch.special.ndtri(side) for side in sides)
    levels = torch.cat([positive, torch.zeros(1), -negative]).sort().values / positive.max()
    assert torch.allclose(torch.from_numpy(LEVELS).double(), levels, atol=1e-6)


def test_a_block_of_levels_is_stored_exactly_and_in_order() -> None:
    weight = 2 * torch.from_numpy(LEVELS).view(2, 8)
    tensors = Nf4(32).encode(weight)
    assert tensors["weight"].tolist() == [[0x01], [0x23], [0x45], [0x67], [0x89], [0xAB], [0xCD], [0xEF]]
    assert tensors["absmax"].tolist() == [2.0]
    assert torch.equal(Nf4(32).decode(tensors), weight)


def test_halfway_between_two_levels_goes_to_the_lower() -> None:
    levels = torch.from_numpy(LEVELS)
    weight = torch.cat([(levels[:-1] + levels[1:]) / 2, torch.ones(17)]).view(1, 32)
    packed, _ = encode(weight, 32)
    assert packed[:7].flatten().tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD]


def test_blocks_run_over_the_ends_of_rows() -> None:
    weight = torch.full((3, 48), 0.5)
    weight[1, 15] = 8.0  # the 64th value
    tensors = Nf4(64).encode(weight)
    assert tensors["absmax"].tolist() == [8.0, 0.5, 0.5]
    decoded = Nf4(64).decode(tensors)
    assert decoded[1, 15] == 8.0 and not torch.equal(decoded[0], weight[0])
    assert torch.equal(decoded[1, 16:], weight[1, 16:]) and torch.equal(decoded[2], weight[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_those_of_a_slow_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for scale in (1.0, 0.0, 1e-6, 1e-39):
        weight = gaussian(shape, dtype, scale)
        packed, absmax = encode(weight, 32)
        codes, maxima = slow_codes(weight, 32)
        codes += [7] * (len(codes) % 2)
        assert packed.flatten().tolist() == [16 * a + b for a, b in zip(codes[::2], codes[1::2], strict=True)]
        assert absmax.tolist() == maxima


def test_an_empty_weight_has_no_codes() -> None:
    packed, absmax = encode(torch.empty(0, 8), 64)
    assert packed.shape == (0, 1) and absmax.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compiled_and_plain_decoders_give_the_same_bits(shape: tuple[int, int], dtype: torch.dtype) -> None:
    levels = torch.from_numpy(LEVELS)
    for scale in (1.0, 0.0, 1e-39, 1e4):
        weight = gaussian(shape, dtype, scale)
        packed, absmax = encode(weight, 64)
        compiled = kernels.decode(packed, absmax, levels, 64, shape, dtype)
        assert torch.equal(compiled, kernels.decode_torch(packed, absmax, levels, 64, shape, dtype))
        codes = [byte >> shift & 15 for byte in packed.flatten().tolist() for shift in (4, 0)][: weight.numel()]
        exact = levels.double()[codes] * absmax.double().repeat_interleave(64)[: weight.numel()]
        assert torch.equal(compiled.flatten(), exact.float().to(dtype))


def test_the_bytes_do_not_depend_on_the_number_of_threads(on_threads: Any) -> None:
    weight = gaussian((150, 1001))
    first, *others = on_threads(lambda: Nf4(double_quant=True).encode(weight))
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)


def test_bits_per_weight() -> None:
    state = len('{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [256, 256]}')
    assert Nf4().bytes((256, 256), torch.bfloat16) == 256 * 256 // 2 + 4 * 1024 + 4 * 16 + state
    large = (4096, 4096)
    assert 8 * Nf4().bytes(large, torch.bfloat16) / 4096**2 == pytest.approx(4.5, abs=1e-3)
    nested = 4 + 8 / 64 + 32 / 64 / 256
    assert 8 * Nf4(double_quant=True).bytes(large, torch.bfloat16) / 4096**2 == pytest.approx(nested, abs=1e-3)


def test_nested_magnitudes_are_the_nearest_levels() -> None:
    absmax = gaussian((1000,), torch.float32).abs()
    codes, largest, offset = nest(absmax)
    levels = dynamic_levels()
    assert offset == pytest.approx(absmax.mean().item(), rel=1e-6)
    spread = largest.repeat_interleave(256)[:1000]
    scaled = (absmax - offset) / spread
    distances = (scaled[:, None] - levels).abs()
    found = (scaled - levels[codes.int()]).abs()
    # Their own float32 rounding is all that two neighbours can be mistaken by.
    assert (found - distances.amin(dim=1)).max() < 1e-7
    assert largest.shape == (4,) and (scaled.abs().max() - 1).abs() < 1e-6


def test_equal_magnitudes_nest_without_error() -> None:
    weight = torch.ones(64, 64)
    for double_quant in (False, True):
        scheme = Nf4(double_quant=double_quant)
        assert torch.equal(scheme.decode(scheme.encode(weight)), weight)


def test_the_size_of_the_state_is_known_before_its_offset() -> None:
    lengths = {
        len(State(64, torch.float32, (3, 4), offset).pack())
        for offset in (0.0, 1.401298464324817e-45, 3.4028234663852886e38, 1.1754943508222875e-38, -0.12345678806304932)
    }
    assert len(lengths) == 1
    state = State(64, torch.float16, (3, 4), 0.12345678806304932)
    assert State.unpack(state.pack()) == state


@pytest.mark.parametrize("block_size", [0, 16, 48, 8192])
def test_a_block_size_that_bitsandbytes_does_not_run_is_refused(block_size: int) -> None:
    with pytest.raises(ValueError, match="give one of 32, 64, 128"):
        Nf4(block_size)


@pytest.mark.parametrize(
    "fields",
    [
        {"quant_type": "fp4"},
        {"blocksize": 16},
        {"shape": [4, 8, 2]},
        {"shape": [4, -8]},
        {"shape": None},
        {"dtype": "int8"},
        {"nested_offset": 1.0, "nested_blocksize": 128},
        {"nested_offset": "one", "nested_blocksize": 256},
    ],
)
def test_a_state_that_is_not_of_nf4_is_refused(fields: dict[str, Any]) -> None:
    good = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 8]}
    assert State.unpack(json.dumps(good).encode()) == State(64, torch.bfloat16, (4, 8), None)
    with pytest.raises(ValueError, match="quant_state is none that bitsandbytes writes"):
        State.unpack(json.dumps({**good, **fields}).encode())


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"null", b"[" * 5000])
def test_a_state_that_is_no_text_of_theirs_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match="quant_state is none that bitsandbytes writes"):
        State.unpack(text)


def test_tensors_that_do_not_belong_together_are_refused() -> None:
    tensors = Nf4().encode(gaussian((8, 64)))
    with pytest.raises(ValueError, match="absmax is .*, and nf4 needs"):
        compress.decode({**tensors, "absmax": tensors["absmax"][:3]}, "nf4")
    with pytest.raises(ValueError, match="quant_state is .* and the weight is described as"):
        compress.decode(tensors, "nf4", block_size=128)
    with pytest.raises(ValueError, match="no quant_map is stored"):
        compress.decode({name: tensor for name, tensor in tensors.items() if name != "quant_map"}, "nf4")
    with pytest.raises(ValueError, match="packed: there are 100 values"):
        Nf4().decode({**tensors, "weight": tensors["weight"][:100]})


@pytest.mark.parametrize(
    ("shape", "block_size", "said"),
    [
        ((64, 128), 64, None),
        ((64, 128), 128, None),
        ((64, 96), 64, "not whole blocks of 64"),
        ((64, 128), 256, "not whole blocks of 256"),
        ((40, 128), 64, "40 out_features are no multiple of 32"),
    ],
)
def test_the_plan_says_what_bitsandbytes_cannot_run_everywhere(
    shape: tuple[int, int], block_size: int, said: str | None
) -> None:
    note = Nf4(block_size).note(shape)
    assert note is None if said is None else note is not None and note.startswith(said)


# Beside bitsandbytes' own quantizer.


def plainly(packed: Tensor, state: Any) -> Tensor:
    """What bitsandbytes defines a weight to be, in plain torch: its loops for AVX-512 take blocks that cross rows for
    others, and lose the subnormal numbers of bf16."""
    from bitsandbytes.backends.default import ops

    compute = ops._dequantize_4bit_compute.__wrapped__  # not compiled
    found: Tensor = compute(packed.view(-1), state.absmax, state.code, state.blocksize, state.shape, state.dtype)
    return found


def as_theirs(tensors: Tensors) -> tuple[Tensor, Any]:
    """The packed weight and its state as bitsandbytes reads them."""
    from bitsandbytes.functional import QuantState

    named = {NAMES[local]: tensor for local, tensor in tensors.items() if local != "weight"}
    return tensors["weight"], QuantState.from_dict(named, torch.device("cpu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_what_is_stored_is_what_bitsandbytes_stores(block_size: int, dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for shape in (*SHAPES, (257, 130)):
        for scale in (1.0, 0.0, 1e-7, 1e-39, 6e3):
            weight = gaussian(shape, dtype, scale)
            ours = Nf4(block_size).encode(weight)
            packed, state = functional.quantize_4bit(weight, blocksize=block_size, quant_type="nf4")
            theirs = {"weight": packed, **{f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
            assert theirs.keys() == {NAMES.get(local, local) for local in ours}
            for local, tensor in ours.items():
                assert torch.equal(tensor, theirs[NAMES.get(local, local)]), (local, shape, scale)
            decoded = Nf4(block_size).decode(ours)
            assert torch.equal(decoded, plainly(packed, state).view(shape))
            if shape[-1] % block_size == 0 and scale != 1e-39:
                assert torch.equal(decoded, functional.dequantize_4bit(packed, state).view(shape))


def test_a_doubly_quantized_weight_is_near_theirs_and_decoded_alike() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(dynamic_levels(), functional.create_dynamic_map())
    scheme, weight = Nf4(double_quant=True), gaussian((512, 514))
    ours = scheme.encode(weight)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    theirs = {"weight": packed, **{f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
    assert {(NAMES.get(k, k), t.dtype) for k, t in ours.items()} == {(k, t.dtype) for k, t in theirs.items()}
    for local in ("weight", "quant_map", "nested_quant_map"):
        assert torch.equal(ours[local], theirs[NAMES.get(local, local)])
    ours_state = as_theirs(ours)[1]
    assert ours_state.offset.item() == pytest.approx(state.offset.item(), rel=1e-6)
    assert torch.allclose(ours_state.state2.absmax, state.state2.absmax, rtol=1e-5)
    # Their CPU code looks 65536 values up, so that some magnitudes go to a neighbour; ours are no worse for it.
    off = (ours["absmax"].int() - theirs["weight.absmax"].int()).abs()
    assert (off > 0).float().mean() < 0.01
    for tensors, found in ((ours, as_theirs(ours)), (_local(theirs), (packed, state))):
        assert torch.equal(scheme.decode(tensors), functional.dequantize_4bit(*found))
    _, absmax = encode(weight, 64)
    errors = [_absmax_of(tensors).sub(absmax).norm() for tensors in (ours, _local(theirs))]
    assert errors[0] <= errors[1]


def _local(theirs: Tensors) -> Tensors:
    return {next((local for local, name in NAMES.items() if name == key), key): t for key, t in theirs.items()}


def _absmax_of(tensors: Tensors) -> Tensor:
    state = State.unpack(Spec.of("quant_state", tensors["quant_state"]).text or b"")
    nested = tensors["nested_absmax"].repeat_interleave(256)[: tensors["absmax"].numel()]
    assert state.offset is not None
    return tensors["nested_quant_map"][tensors["absmax"].int()] * nested + state.offset


# Checkpoints.

CLIENT = """
import sys, json, warnings
warnings.simplefilter("ignore")
import torch, transformers
import bitsandbytes

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)
task = json.load(open(sys.argv[1]))
for path, (source, fields) in task["write"].items():
    config = transformers.BitsAndBytesConfig(**fields)
    transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=config).save_pretrained(path)
found = {}
for path in task["load"]:
    model, notes = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(notes.values()), (path, notes)
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            weights[f"{name}.weight"] = bitsandbytes.functional.dequantize_4bit(module.weight.data, state)
            if state.shape[0] % 32 or state.shape[1] % state.blocksize:
                module.support_avx512bf16_for_cpu = False  # its loop for these processors would stop
    with torch.no_grad():
        found[path] = {"weights": weights, "logits": model(torch.arange(3, 23)[None]).logits}
assert "compress" not in sys.modules
torch.save(found, task["out"])
"""

RECIPE = """
- {match: q_proj, scheme: nf4, block_size: 32}
- {match: down_proj, scheme: nf4, block_size: 128, double_quant: true}
- {match: 're:layers[.]0[.]self_attn[.]o_proj', scheme: none}
"""
# what it is called -> (tiny model, options, how many weights)
OURS: dict[str, tuple[str, dict[str, Any], int]] = {
    **{f"{name}-{d}": (name, {"double_quant": d}, 14) for name in ("llama", "llama-ragged") for d in (False, True)},
    "tied-biased": ("llama-tied-biased", {}, 14),
    "phi3": ("phi3", {"block_size": 32}, 8),
    "conv1d": ("gpt2", {}, 8),
    "recipe": ("llama", {"recipe": RECIPE}, 13),
    "head": ("llama", {"recipe": "- {match: lm_head, scheme: nf4}"}, 15),
}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
THEIRS: dict[str, tuple[str, dict[str, Any], int]] = {
    "plain": ("llama", NF4, 14),
    "double": ("llama-ragged", {**NF4, "bnb_4bit_use_double_quant": True}, 14),
    "conv1d": ("gpt2", NF4, 8),
    "fp4": ("llama", {"load_in_4bit": True}, 14),
}


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.arange(3, 23)[None]).logits
    return found


def difference(found: Tensor, reference: Tensor) -> float:
    found, reference = found.detach().double(), reference.detach().double()
    return float((found - reference).norm() / reference.norm())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nf4")


@pytest.fixture(scope="module")
def elsewhere(base: Path, tiny_model: Callable[[str], Path]) -> dict[str, dict[str, Any]]:
    """name -> logits and weights of every directory in a process with bitsandbytes and without us."""
    pytest.importorskip("bitsandbytes")
    for name, (model, options, _) in OURS.items():
        options = dict(options)
        recipe = options.pop("recipe", None)
        if recipe:
            (base / f"{name}.yaml").write_text(recipe)
        rules = Rules(base / f"{name}.yaml" if recipe else None)
        compress.quantize(tiny_model(model), base / name, "nf4", rules=rules, scoring=None, **options)
    write = {str(base / f"their-{name}"): (str(tiny_model(m)), fields) for name, (m, fields, _) in THEIRS.items()}
    load = [str(base / name) for name in OURS] + [path for path in write if not path.endswith("fp4")]
    (base / "task.json").write_text(json.dumps({"load": load, "write": write, "out": str(base / "found.pt")}))
    (base / "client.py").write_text(CLIENT)
    command = [sys.executable, str(base / "client.py"), str(base / "task.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=base, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return {Path(path).name: found for path, found in torch.load(base / "found.pt", weights_only=True).items()}


def check_runs(path: Path, theirs: dict[str, Any], running: Callable[[Any], dict[str, Tensor]], count: int) -> None:
    ours = compress.load(path)
    found = running(ours)
    assert len(found) == count and found.keys() == theirs["weights"].keys()
    for name, weight in found.items():
        assert torch.equal(weight, theirs["weights"][name].view(weight.shape)), name
    # The weights are the same; where a processor has bf16 products, bitsandbytes sums with them, and rounds absmax.
    assert difference(logits(ours), theirs["logits"]) < 0.02


@pytest.mark.parametrize("name", OURS)
def test_transformers_loads_it_with_bitsandbytes_alone(
    name: str, base: Path, elsewhere: dict[str, dict[str, Any]], running_weights: Any
) -> None:
    config = json.loads((base / name / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bitsandbytes" and config["bnb_4bit_compute_dtype"] == "bfloat16"
    check_runs(base / name, elsewhere[name], running_weights, OURS[name][2])
    card = (base / name / "README.md").read_text()
    assert "with bitsandbytes;" in card and ("bitsandbytes 0.50 stops" in card) == ("ragged" in name)


@pytest.mark.parametrize("name", [name for name in THEIRS if name != "fp4"])
def test_their_checkpoint_runs_on_our_kernels_and_exports_as_it_was_turned(
    name: str,
    base: Path,
    elsewhere: dict[str, dict[str, Any]],
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    running_weights: Any,
) -> None:
    path = base / f"their-{name}"
    check_runs(path, elsewhere[path.name], running_weights, THEIRS[name][2])
    export(path, tmp_path / "plain")
    exported = model_class(compress.load(path).config).from_pretrained(tmp_path / "plain")
    # GPT-2's attention projection is square: its shape alone would not tell which way it lies.
    assert difference(logits(exported), elsewhere[path.name]["logits"]) < 0.02
    original = model_class(exported.config).from_pretrained(tiny_model(THEIRS[name][0]))
    for parameter, weight in original.named_parameters():
        assert difference(exported.get_parameter(parameter), weight) < 0.12, parameter


@pytest.mark.parametrize("name", ["llama-False", "conv1d", "recipe"])
def test_our_checkpoint_is_exported_and_compressed_again(
    name: str, base: Path, elsewhere: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    before = compress.load(base / name)
    export(base / name, tmp_path / "plain")
    assert difference(logits(compress.load(tmp_path / "plain")), logits(before)) < 0.01
    compress.quantize(base / name, tmp_path / "again", "int8", scoring=None)
    assert difference(logits(compress.load(tmp_path / "again")), logits(before)) < 0.05


def test_a_lossless_copy_of_their_checkpoint_runs_and_comes_back(
    base: Path, elsewhere: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    path = base / "their-plain"
    compress.quantize(path, tmp_path / "coded", "df11", scoring=None)
    assert torch.equal(logits(compress.load(tmp_path / "coded")), logits(compress.load(path)))
    export(tmp_path / "coded", tmp_path / "back", to="original")
    before, after = (load_file(directory / "model.safetensors") for directory in (path, tmp_path / "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_what_was_loaded_is_saved_as_it_was(base: Path, elsewhere: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    compress.load(base / "recipe").save_pretrained(tmp_path / "saved")
    before, after = (load_file(directory / "model.safetensors") for directory in (base / "recipe", tmp_path / "saved"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(compress.load(tmp_path / "saved")), logits(compress.load(base / "recipe")))


def test_importing_us_takes_over_our_checkpoints_and_leaves_theirs(
    base: Path, elsewhere: dict[str, dict[str, Any]]
) -> None:
    ours = AutoModelForCausalLM.from_pretrained(base / "llama-False")
    assert sum(isinstance(module, CompressedLinear) for module in ours.modules()) == 14
    theirs = AutoModelForCausalLM.from_pretrained(base / "their-plain")
    assert not any(isinstance(module, CompressedLinear) for module in theirs.modules())


def test_a_recipe_keeps_what_it_leaves_out_from_bitsandbytes(base: Path, elsewhere: dict[str, dict[str, Any]]) -> None:
    config = json.loads((base / "recipe" / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_skip_modules"] == ["model.layers.0.self_attn.o_proj", "lm_head"]
    stored = load_file(base / "recipe" / "model.safetensors")
    state = "weight.quant_state.bitsandbytes__nf4"
    specs = {name: Spec.of(name, tensor) for name, tensor in stored.items()}
    schemes = read(config, specs)
    assert schemes["model.layers.1.self_attn.q_proj"] == Nf4(32)
    assert schemes["model.layers.0.mlp.down_proj"] == Nf4(128, double_quant=True)
    assert schemes["model.layers.0.mlp.up_proj"] == Nf4() and len(schemes) == 13
    assert f"model.layers.0.self_attn.o_proj.{state}" not in stored


def test_fp4_int8_and_other_storage_are_refused_by_name(base: Path, elsewhere: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="fp4 of bitsandbytes is not supported, only nf4"):
        compress.plan(base / "their-fp4", "int4")
    with pytest.raises(ValueError, match="int8 of bitsandbytes is not supported"):
        read({"load_in_8bit": True}, {})
    with pytest.raises(ValueError, match="bnb_4bit_quant_storage bfloat16 is not supported"):
        read({**NF4, "bnb_4bit_quant_storage": "bfloat16"}, {})


def test_a_damaged_checkpoint_is_refused_by_name(
    base: Path, elsewhere: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    tensors = load_file(base / "their-plain" / "model.safetensors")
    (tmp_path / "config.json").write_text((base / "their-plain" / "config.json").read_text())
    name = "model.layers.0.mlp.up_proj.weight"
    state = f"{name}.quant_state.bitsandbytes__nf4"
    for broken in (
        {state: tensors[state][:-3]},
        {state: torch.zeros(10000, dtype=torch.uint8)},
        {f"{name}.absmax": tensors[f"{name}.absmax"][:-1]},
        {name: tensors[name][:-1]},
    ):
        save_file({**tensors, **broken}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="model.layers.0.mlp.up_proj: "):
            compress.plan(tmp_path, "int4")
