"""int4 and fp8 outputs in the hands of the real compressed-tensors package, and its own checkpoints in ours.

One other process, which never imports us, loads every directory and writes some with the library itself.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from filelock import FileLock
from packaging.version import Version
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import compress
from compress import hf
from compress.exporting import export
from compress.formats.checkpoint import Checkpoint
from compress.fp8 import Fp8
from compress.hf import model_class
from compress.int4 import Int4
from compress.interchange import read, read_fp8
from compress.kernels.linear import CompressedLinear
from compress.recipe import Rules
from compress.samples import Samples

Running = Callable[[Any], dict[str, Tensor]]
pytest.importorskip("compressed_tensors")

CLIENT = """
import sys, json, warnings
warnings.simplefilter("ignore")
import torch, transformers
from pathlib import Path
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)

def scores(model):
    ids = torch.arange(3, 23)[None]
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(ids, **extra).logits

def write(path, source, fields):
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    config = QuantizationConfig(**fields, quantization_status="compressed", ignore=["lm_head"])
    apply_quantization_config(model, config)
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        args, weight = scheme.weights, module.weight.data
        rows, columns = weight.shape
        if args.strategy in ("group", "tensor_group"):
            parts, over = weight.view(rows, -1, args.group_size), -1
        elif args.strategy == "block":
            high, wide = args.block_structure
            padded = torch.nn.functional.pad(weight, (0, -columns % wide, 0, -rows % high))
            parts, over = padded.view(-(-rows // high), high, -(-columns // wide), wide), (1, 3)
        else:
            parts, over = (weight, -1) if args.strategy == "channel" else (weight.flatten(), 0)
        overall = getattr(module, "weight_global_scale", None)
        if overall is not None:
            overall.data.copy_(generate_gparam(weight.min(), weight.max()))
        scale, zero = calculate_qparams(parts.amin(over), parts.amax(over), args, overall)
        module.weight_scale.data.copy_(scale.view(module.weight_scale.shape))
        if hasattr(module, "input_scale"):
            module.input_scale.data.fill_(3 / 448 if args.type == "float" else 3 / 127)
        if getattr(module, "weight_zero_point", None) is not None:
            module.weight_zero_point.data.copy_(zero.view(module.weight_zero_point.shape))
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.save_pretrained(path)
    compressor.update_config(path)

task = json.load(open(sys.argv[1]))
for path, (source, fields) in task["write"].items():
    write(path, source, fields)
found = {}
for path, cls, how in task["load"]:
    if how:
        how = {"quantization_config": transformers.CompressedTensorsConfig(**how)}
    try:
        model = getattr(transformers, cls).from_pretrained(path, **how)
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # one by one, as we do: rounded alike, so routed alike
        found[path] = {"logits": scores(model), "state": dict(model.state_dict())}
    except Exception as error:
        found[path] = {"error": f"{type(error).__name__}: {error}"}
assert "compress" not in sys.modules
torch.save(found, task["out"])
"""

MIXED = """
- {match: lm_head, scheme: fp8, granularity: tensor}
- {match: 're:layers[.]0[.]self_attn[.]o_proj', scheme: none}
- {match: q_proj, scheme: int8, group_size: 32}
- {match: down_proj, scheme: fp8}
- {match: up_proj, scheme: int4, bits: 6, group_size: 64}
"""
WIDTHS = range(2, 9)
SMALL = ("mxfp4", "mxfp8", "nvfp4")
# what it is called -> (tiny model, scheme, options): written in the compressed-tensors layout
LAYOUT: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{f"symmetric-{bits}": ("llama", "int4", {"bits": bits, "group_size": 64}) for bits in WIDTHS},
    **{
        f"asymmetric-{bits}": ("llama", "int4", {"bits": bits, "group_size": 64, "symmetric": False}) for bits in WIDTHS
    },
    **{f"mixed-groups-{bits}": ("llama", "int4", {"bits": bits, "group_size": 128}) for bits in (4, 8)},
    **{f"ragged-{bits}": ("llama-ragged", "int4", {"bits": bits}) for bits in (3, 4, 8)},
    **{
        f"{name}-fp8-{granularity}": (name, "fp8", {"granularity": granularity})
        for name in ("llama-ragged", "llama-wide")
        for granularity in ("tensor", "channel", "block")
    },
    **{
        f"fp8-{granularity}-{how}": ("llama-wide", "fp8", {"granularity": granularity, "activations": how})
        for granularity in ("tensor", "channel")
        for how in ("dynamic", "static")
    },
    # groups of 128 activations divide only the width of down_proj
    "fp8-block-dynamic": ("llama", "fp8", {"granularity": "block", "activations": "dynamic"}),
    **{f"int8-{how}": ("llama-ragged", "int8", {"activations": how}) for how in ("dynamic", "static")},
    **{f"{name}-int8-dynamic": (name, "int8", {"activations": "dynamic"}) for name in ("llama-tied-biased", "t5")},
    **{f"{name}-fp8-dynamic": (name, "fp8", {"activations": "dynamic"}) for name in ("phi3", "gemma3", "falcon")},
    "tied-biased-int4": ("llama-tied-biased", "int4", {}),
    "tied-biased-fp8": ("llama-tied-biased", "fp8", {}),
    "recipe": ("llama", "int4", {"recipe": MIXED}),
    "excluded": ("llama", "int4", {"exclude": ("re:gate_proj", "layers.0.self_attn.q_proj")}),
    **{f"{name}-int4": (name, "int4", {}) for name in ("qwen2", "qwen3", "gemma2", "gemma3", "phi", "phi3")},
    **{f"{name}-int4": (name, "int4", {}) for name in ("gpt-neox", "opt")},
    # their initialisation reads weights that are packed by then, so transformers must decode while it loads
    "t5-int4": ("t5", "int4", {"group_size": 64}),
    "falcon-int4": ("falcon", "int4", {"group_size": 64}),
    "mamba-int4": ("mamba", "int4", {"group_size": 4}),
    **{f"{name}-fp8": (name, "fp8", {}) for name in ("phi3", "t5", "falcon", "mixtral", "qwen2-moe", "deepseek-v3")},
    **{f"{name}-block": (name, "fp8", {"granularity": "block"}) for name in ("mixtral", "deepseek-v3")},
    # 172 is no multiple of 16, so down_proj stays as it is
    **{f"{name}-{fp}": (name, fp, {}) for name in ("llama-ragged", "llama-wide", "phi3", "falcon") for fp in SMALL},
    **{f"{form}-{fp}": ("llama", fp, {"source": form}) for form in ("fp16", "fp32") for fp in SMALL},
    **{f"{name}-mxfp4": (name, "mxfp4", {}) for name in ("mixtral", "qwen3-moe")},
    "small-recipe": (
        "llama",
        "mxfp4",
        {"recipe": "- {match: q_proj, scheme: nvfp4}\n- {match: o_proj, scheme: mxfp8}"},
    ),
    "mixtral-int4": ("mixtral", "int4", {"group_size": 64}),
    "qwen3-moe-int4": ("qwen3-moe", "int4", {"group_size": 32}),
    **{f"{name}-cache": (name, "fp8", {"kv_cache": "fp8"}) for name in ("llama", "qwen3", "phi3", "gemma3")},
    "int4-cache": ("llama-ragged", "int4", {"kv_cache": "fp8"}),
    "recipe-cache": ("llama", "int4", {"recipe": MIXED, "kv_cache": "fp8"}),
}
# experts: transformers decodes them while loading, and leaves activations as they are
DECODED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral-fp8-static": ("mixtral", "fp8", {"activations": "static"}),
    "deepseek-v3-fp8-dynamic": ("deepseek-v3", "fp8", {"activations": "dynamic"}),
}
# beside the others: transformers decodes the first, and the second has no packed weights
CACHES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral-cache": ("mixtral", "fp8", {"kv_cache": "fp8"}),
    "plain-cache": ("llama", "fp8", {"kv_cache": "fp8", "exclude": ("re:.",)}),
}
# what no other loader can read: it must fail, not run on random weights
OWN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "conv1d-int4": ("gpt2", "int4", {}),  # c_proj is square: its shape alone would not tell
    "conv1d-fp8": ("gpt2", "fp8", {}),
    "stacked-int4": ("gpt-oss", "int4", {}),
    "stacked-fp8": ("gpt-oss", "fp8", {}),
    "llama4-int4": ("llama4", "int4", {}),
    "experts-int8-dynamic": ("mixtral", "int8", {"activations": "dynamic"}),
    "experts-int8-static": ("qwen3-moe", "int8", {"activations": "static"}),
    "experts-mixed-groups": ("mixtral", "int4", {}),
    "experts-asymmetric": ("mixtral", "int4", {"group_size": 64, "symmetric": False}),
    "falcon-mixed-groups": ("falcon", "int4", {}),
    **{f"experts-{fp}": ("mixtral", fp, {}) for fp in ("mxfp8", "nvfp4")},
    **{f"conv1d-{fp}": ("gpt2", fp, {}) for fp in SMALL},
    "fp16-small-recipe": ("llama", "mxfp4", {"recipe": "- {match: q_proj, scheme: nvfp4}", "source": "fp16"}),
    "experts-nf4": ("mixtral", "nf4", {}),
    "subclass-nf4": ("falcon", "nf4", {}),  # bitsandbytes takes no subclass of nn.Linear
    "kept-nf4": ("t5", "nf4", {}),  # nor what a model keeps in float32
    "read-nf4": ("mamba", "nf4", {}),  # whose code multiplies with the weight itself
    "asymmetric-mixed-groups": ("llama", "int4", {"symmetric": False}),
}


def weights_of(kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False, **more}


def one_group(layout: str, weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"format": layout, "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, **more}}}


def small_of(bits: int, strategy: str, group_size: int, scale_dtype: str) -> dict[str, Any]:
    return weights_of("float", strategy, num_bits=bits, group_size=group_size, scale_dtype=scale_dtype)


def inputs_of(kind: str, strategy: str, dynamic: bool, **more: Any) -> dict[str, Any]:
    return {"input_activations": weights_of(kind, strategy, **more) | {"dynamic": dynamic}}


# checkpoints that the library writes: name -> (tiny model, fields of its config)
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "int4": ("llama", one_group("pack-quantized", weights_of("int", "group", num_bits=4, group_size=32))),
    "int3": ("llama", one_group("pack-quantized", weights_of("int", "group", num_bits=3, group_size=64))),
    "asymmetric": (
        "llama",
        one_group("pack-quantized", weights_of("int", "group", num_bits=4, group_size=32, symmetric=False)),
    ),
    "fp8-channel": ("llama-wide", one_group("float-quantized", weights_of("float", "channel"))),
    "fp8-tensor": ("llama-tied-biased", one_group("float-quantized", weights_of("float", "tensor"))),
    "fp8-block": (
        "llama-wide",
        one_group("naive-quantized", weights_of("float", "block", block_structure=[128, 128])),
    ),
    "fp8-static": (
        "llama-wide",
        one_group("float-quantized", weights_of("float", "tensor"), **inputs_of("float", "tensor", False)),
    ),
    "fp8-dynamic": (
        "llama",
        one_group("float-quantized", weights_of("float", "channel"), **inputs_of("float", "token", True)),
    ),
    "int8-static": (
        "llama-ragged",
        one_group("int-quantized", weights_of("int", "channel"), **inputs_of("int", "tensor", False)),
    ),
    "int8-dynamic": (
        "llama-tied-biased",
        one_group("int-quantized", weights_of("int", "channel"), **inputs_of("int", "token", True)),
    ),
    "mxfp4": ("llama", one_group("mxfp4-pack-quantized", small_of(4, "group", 32, "torch.uint8"))),
    "mxfp8": ("llama", one_group("mxfp8-quantized", small_of(8, "group", 32, "torch.uint8"))),
    "nvfp4": ("llama-wide", one_group("nvfp4-pack-quantized", small_of(4, "tensor_group", 16, "torch.float8_e4m3fn"))),
    "two-groups": (
        "llama",
        {
            "format": "pack-quantized",
            "config_groups": {
                "group_0": {
                    "targets": ["re:.*(gate|up|down)_proj$"],
                    "weights": weights_of("int", "group", num_bits=4, group_size=64),
                },
                "group_1": {"targets": ["re:.*self_attn.*"], "weights": weights_of("int", "group", group_size=32)},
            },
        },
    ),
}


def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.arange(3, 23)[None]
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: Tensor = model(ids, **extra).logits
    return found


def difference(found: Tensor, reference: Tensor) -> float:
    return float((found.double() - reference.double()).norm() / reference.double().norm())


def quantized(source: Path, out: Path, scheme: str, options: dict[str, Any]) -> Path:
    options = dict(options)
    options = {"method": "rtn", **options} if scheme == "int4" else options
    recipe, exclude = options.pop("recipe", None), options.pop("exclude", ())
    if "source" in options:  # in another dtype
        export(source, out.with_suffix(".source"), options.pop("source"))
        source = out.with_suffix(".source")
    if recipe:
        out.with_suffix(".yaml").write_text(recipe)
    rules = Rules(out.with_suffix(".yaml") if recipe else None, exclude=exclude)
    compress.quantize(source, out, scheme, rules=rules, scoring=None, **options)
    return out


@pytest.fixture(scope="session")  # a worker may come to this module more than once
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all workers: writing what is in it takes half a minute."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "interchange"
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def random_tokens() -> Iterator[None]:
    """The tiny models have no tokenizer: they are calibrated with tokens, not with text."""
    tokens = torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.run.draw", lambda *_: Samples(tokens, "random"))
        yield


@pytest.fixture(scope="module", autouse=True)
def calibrated() -> Iterator[None]:
    with random_tokens():
        yield


@pytest.fixture(scope="session")
def elsewhere(base: Path, tiny_model: Callable[[str], Path]) -> dict[str, dict[str, Any]]:
    """name -> logits and state dict, or error, of every directory in a process without us."""
    with FileLock(base / "lock"):
        if not (base / "found.pt").exists():
            for left in filter(Path.is_dir, base.iterdir()):  # of a worker that failed
                shutil.rmtree(left)
            _load_elsewhere(base, tiny_model)
    found = torch.load(base / "found.pt", weights_only=True)
    return {Path(path).name: result for path, result in found.items()}


def _load_elsewhere(base: Path, tiny_model: Callable[[str], Path]) -> None:
    tasks: list[tuple[str, str, dict[str, Any]]] = []
    for name, (model, scheme, options) in {**LAYOUT, **DECODED, **CACHES, **OWN}.items():
        with random_tokens():
            out = quantized(tiny_model(model), base / name, scheme, options)
        tasks.append((str(out), AutoConfig.from_pretrained(tiny_model(model)).architectures[0], {}))
    for name in THEIRS:
        # its loader cannot place its own zero points other than decoded
        how = {"dequantize": True} if name == "asymmetric" else {}
        tasks.append((str(base / f"their-{name}"), "LlamaForCausalLM", how))
    write = {str(base / f"their-{name}"): (str(tiny_model(model)), how) for name, (model, how) in THEIRS.items()}
    (base / "task.json").write_text(json.dumps({"load": tasks, "write": write, "out": str(base / "found.tmp")}))
    (base / "client.py").write_text(CLIENT)
    command = [sys.executable, str(base / "client.py"), str(base / "task.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=base, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (base / "found.tmp").rename(base / "found.pt")


@pytest.mark.parametrize("name", LAYOUT)
def test_transformers_loads_it_without_us(
    name: str, base: Path, elsewhere: dict[str, dict[str, Any]], running_weights: Running
) -> None:
    config = json.loads((base / name / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    if name in ("t5-int4", "falcon-int4", "mamba-int4") and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("older transformers initialises weights that are packed, though it is told to decode them")
    theirs = elsewhere[name]
    assert "error" not in theirs, theirs["error"]
    ours = compress.load(base / name)
    found = running_weights(ours)
    assert found
    for path, weight in found.items():
        assert torch.equal(weight, theirs["state"][path]), path
    # The weights are the same; a kernel may sum in another order, which bf16 rounds.
    assert difference(logits(ours), theirs["logits"]) < 0.01


@pytest.mark.parametrize("name", [name for name, (_, _, options) in LAYOUT.items() if "activations" in options])
def test_activations_are_quantized_as_the_package_does_it(
    name: str, base: Path, elsewhere: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, theirs = compress.load(base / name), elsewhere[name]["logits"]
    ours = difference(logits(model), theirs)
    for function in ("e4m3", "int8"):
        monkeypatch.setattr(f"compress.kernels.activations.{function}", lambda x, *_: x)
    assert ours < 0.1 * difference(logits(model), theirs)


@pytest.mark.parametrize("name", DECODED)
def test_quantized_activations_of_experts_are_left_out_by_transformers_and_the_card_says_so(
    name: str, base: Path, elsewhere: dict[str, dict[str, Any]], running_weights: Running
) -> None:
    theirs = elsewhere[name]
    assert "error" not in theirs, theirs["error"]
    ours = compress.load(base / name)
    for path, weight in running_weights(ours).items():
        assert torch.equal(weight, theirs["state"][path]), path
    assert 0 < difference(logits(ours), theirs["logits"]) < 0.3
    assert "activations are not quantized" in (base / name / "README.md").read_text()


@pytest.mark.parametrize("name", [name for name, (_, _, options) in LAYOUT.items() if "kv_cache" in options])
def test_keys_and_values_are_rounded_as_the_package_does_it(
    name: str, base: Path, elsewhere: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = elsewhere[name]
    scales = {path: scale for path, scale in theirs["state"].items() if path.endswith(("k_scale", "v_scale"))}
    stored = Checkpoint(base / name)
    assert len(scales) == 4 and all(torch.equal(scale, stored.read(path)) for path, scale in scales.items())
    rounded = difference(logits(compress.load(base / name)), theirs["logits"])
    monkeypatch.setattr("compress.kv_scales.e4m3", lambda x, _: x)
    assert rounded < 0.1 * difference(logits(compress.load(base / name)), theirs["logits"])


def test_where_transformers_decodes_it_leaves_the_scales_of_a_cache_alone_and_the_card_says_so(
    base: Path, elsewhere: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "mixtral-cache"
    theirs = elsewhere[name]
    assert "error" not in theirs, theirs["error"]
    assert "keys and values are not rounded" in (base / name / "README.md").read_text()
    assert "k_scale" not in "".join(theirs["state"])
    monkeypatch.setattr("compress.kv_scales.e4m3", lambda x, _: x)
    assert difference(logits(compress.load(base / name)), theirs["logits"]) < 0.01


def test_a_model_that_is_only_given_scales_loads_elsewhere(base: Path, elsewhere: dict[str, dict[str, Any]]) -> None:
    theirs = elsewhere["plain-cache"]
    assert "error" not in theirs, theirs["error"]
    assert difference(logits(compress.load(base / "plain-cache")), theirs["logits"]) < 0.01


@pytest.mark.parametrize("name", OWN)
def test_a_layout_of_our_own_does_not_load_without_us(
    name: str, base: Path, elsewhere: dict[str, dict[str, Any]]
) -> None:
    config = json.loads((base / name / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compress"
    assert "error" in elsewhere[name]
    assert logits(compress.load(base / name)).isfinite().all()
    assert "stops with an error" in (base / name / "README.md").read_text()


def test_the_card_says_when_the_package_must_decode_while_loading(
    base: Path, elsewhere: dict[str, dict[str, Any]]
) -> None:
    for name in ("asymmetric-4", "mixtral-int4", "falcon-int4"):
        assert "decoded to dense weights while loading" in (base / name / "README.md").read_text()
    assert "decoded when first run" in (base / "symmetric-4" / "README.md").read_text()


def test_a_recipe_writes_one_config_group_for_each_scheme(base: Path, elsewhere: dict[str, dict[str, Any]]) -> None:
    config = json.loads((base / "recipe" / "config.json").read_text())["quantization_config"]
    groups = config["config_groups"].values()
    kinds = {(g["format"], g["weights"]["num_bits"], g["weights"].get("group_size")) for g in groups}
    assert kinds == {
        ("float-quantized", 8, None),
        ("pack-quantized", 8, 32),
        ("pack-quantized", 6, 64),
        ("pack-quantized", 4, 64),
    }
    assert config["format"] == "mixed-precision"
    assert config["ignore"] == ["model.layers.0.self_attn.o_proj"]
    targets = [target for group in groups for target in group["targets"]]
    assert len(targets) == len(set(targets)) == 14 and "lm_head" in targets


@pytest.mark.parametrize("name", THEIRS)
def test_their_checkpoint_runs_on_our_kernels(
    name: str,
    base: Path,
    elsewhere: dict[str, dict[str, Any]],
    tmp_path: Path,
    running_weights: Running,
) -> None:
    path, theirs = base / f"their-{name}", elsewhere[f"their-{name}"]
    assert "error" not in theirs, theirs["error"]
    ours = compress.load(path)
    found = running_weights(ours)
    assert len(found) == 14
    for parameter, weight in found.items():
        assert torch.equal(weight, theirs["state"][parameter]), parameter
    assert difference(logits(ours), theirs["logits"]) < 0.01
    export(path, tmp_path / "plain")
    exported = model_class(ours.config).from_pretrained(tmp_path / "plain")
    for parameter, weight in found.items():
        assert torch.equal(exported.get_parameter(parameter), weight)


def test_their_checkpoint_is_compressed_again(base: Path, elsewhere: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    out = quantized(base / "their-int4", tmp_path / "out", "int8", {"group_size": 32})
    before, after = compress.load(base / "their-int4"), compress.load(out)
    assert difference(logits(after), logits(before)) < 0.05
    ledger = json.loads((out / "compress.json").read_text())["ledger"]
    entry = ledger["model.layers.0.mlp.up_proj.weight"]
    stored = {f"model.layers.0.mlp.up_proj.{part}" for part in ("weight_packed", "weight_scale", "weight_shape")}
    assert entry["action"] == "coded" and set(entry["read"]) == stored
    assert not any("weight_shape" in name for name in ledger)


def test_their_checkpoint_with_a_quantized_cache_is_left_to_their_package() -> None:
    config = {
        "quant_method": "compressed-tensors",
        **one_group("float-quantized", weights_of("float", "channel"), **inputs_of("float", "token", True)),
    }
    assert hf._ours(config)
    assert not hf._ours({**config, "kv_cache_scheme": weights_of("float", "tensor")})
    assert hf._ours({**config, "kv_cache_scheme": None})


def test_importing_us_leaves_their_checkpoints_to_their_package(
    base: Path, elsewhere: dict[str, dict[str, Any]]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base / "their-int4")
    assert not any(isinstance(module, CompressedLinear) for module in model.modules())
    assert torch.equal(logits(model), elsewhere["their-int4"]["logits"])


def test_our_layout_is_read_back_as_it_was_planned(base: Path, elsewhere: dict[str, dict[str, Any]]) -> None:
    stored = list(Checkpoint(base / "recipe").entries)
    config = json.loads((base / "recipe" / "config.json").read_text())["quantization_config"]
    schemes = read(config, stored)
    assert schemes["lm_head"] == Fp8("tensor")
    assert schemes["model.layers.1.self_attn.q_proj"] == Int4(bits=8, group_size=32)
    assert schemes["model.layers.0.self_attn.k_proj"] == Int4(group_size=64)
    assert "model.layers.0.self_attn.o_proj" not in schemes


@pytest.mark.parametrize(
    "group, message",
    [
        ({"input_activations": {"num_bits": 8}, "weights": weights_of("float", "channel")}, "activations quantized in"),
        ({"weights": weights_of("float", "channel"), **inputs_of("float", "tensor", True)}, "activations quantized in"),
        ({"weights": weights_of("int", "group", group_size=128), **inputs_of("int", "token", True)}, "activations qu"),
        ({"weights": weights_of("int", "channel")}, "8-bit int weights per channel are not supported"),
        ({"weights": weights_of("float", "group", num_bits=4)}, "4-bit float weights per group are not supported"),
        ({"format": "int-quantized", "weights": weights_of("int", "group")}, "8-bit int weights per group"),
    ],
)
def test_what_is_not_weight_only_int_or_fp8_is_refused_by_name(group: dict[str, Any], message: str) -> None:
    config = {"config_groups": {"group_0": {"targets": ["Linear"], **group}}}
    with pytest.raises(ValueError, match=message):
        read(config, ["a.weight", "a.weight_scale"])


def test_groups_in_activation_order_and_untargeted_modules_are_refused() -> None:
    config = one_group("pack-quantized", weights_of("int", "group", group_size=32))
    with pytest.raises(ValueError, match="activation order"):
        read(config, ["a.weight_packed", "a.weight_scale", "a.weight_g_idx"])
    config["config_groups"]["group_0"]["targets"] = ["re:.*mlp.*"]
    with pytest.raises(ValueError, match="no config group targets a"):
        read(config, ["a.weight_packed", "a.weight_scale"])


def test_block_sizes_other_than_128_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weight_block_size \[64, 64\] is not supported"):
        read_fp8({"weight_block_size": [64, 64]}, ["a.weight", "a.weight_scale_inv"])
