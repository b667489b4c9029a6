"""Loading compressed checkpoints into transformers models, on our kernels.

Importing this module registers `quant_method: compress` with transformers, and takes over the compressed-tensors
and bitsandbytes checkpoints that we wrote; those of others still go to these packages. An import does nothing else.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled
from transformers.utils.quantization_config import BitsAndBytesConfig, CompressedTensorsConfig, QuantizationConfigMixin

from compress import dfloat11, kv_scales, planning, sizes
from compress import kv_cache as packed_cache
from compress.devices import check_device
from compress.formats.checkpoint import Checkpoint, weight_files
from compress.live import Live
from compress.placement import Placement, packed_weights
from compress.registry import make, scheme_class
from compress.source import Source
from compress.store import Files
from compress.structure import Structure, read_config

METHOD = "compress"
_DTYPES = ("auto", "bfloat16", "float16", "float32", torch.bfloat16, torch.float16, torch.float32)


@register_quantization_config(METHOD)
class CompressConfig(QuantizationConfigMixin):
    """A `quantization_config` that we can run; `fields` is what config.json says, and what is saved again.

    options: of a lossless scheme, to run with instead of those it was stored with. most_blocks: of a stacked weight
    that are loaded; None for all.
    """

    def __init__(self, options: Mapping[str, Any] | None = None, most_blocks: int | None = None, **fields: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.options, self.most_blocks = options or {}, most_blocks
        self.fields: dict[str, Any] = fields.get("run", {"quant_method": METHOD, **fields})

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.fields)


class _OurCompressedTensors(CompressedTensorsConfig):
    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        theirs = CompressConfig if METHOD in config_dict else CompressedTensorsConfig
        return theirs.from_dict(_to_run(config_dict), return_unused_kwargs, **kwargs)


class _OurBitsAndBytes(BitsAndBytesConfig):
    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        theirs = CompressConfig if METHOD in config_dict else BitsAndBytesConfig
        return theirs.from_dict(_to_run(config_dict), return_unused_kwargs, **kwargs)


def _to_run(config: dict[str, Any]) -> dict[str, Any]:
    return {"run": config} if METHOD in config else config


AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"] = _OurCompressedTensors
AUTO_QUANTIZATION_CONFIG_MAPPING["bitsandbytes_4bit"] = _OurBitsAndBytes


@register_quantizer(METHOD)
class CompressQuantizer(HfQuantizer):
    """Puts CompressedLinear in the place of planned linears, and fills them from the checkpoint's files itself.

    The packed tensors stay out of transformers' own loader, whose conversion rules are for dense weights.
    """

    requires_calibration = True
    quantization_config: CompressConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        if not checkpoint_files:
            raise ValueError("a compressed model is loaded from safetensors files, not from a state dict")
        fields = self.quantization_config.fields
        checkpoint = Checkpoint(Path(checkpoint_files[0]).parent)
        self._weights = packed_weights(Files(checkpoint), fields, str(model.config.dtype).removeprefix("torch."))
        most = self.quantization_config.most_blocks
        loaded = {m: w if most is None else w.with_blocks(most) for m, w in self._weights.items()}
        self._place, self._checkpoint = Placement(model, loaded), checkpoint
        if self._place.unused:  # nor will they be in what is saved
            self.quantization_config.fields = planning.restricted(fields, lambda m: m not in self._place.unused)
            self._weights = {m: weight for m, weight in self._weights.items() if m not in self._place.unused}
        kv_scales.round_in(model, fields)
        sources = {weight.packed.source for weight in self._weights.values()}
        specs = Files(checkpoint).specs
        self._tripwires = [name for name in sources if specs.get(name) == planning.TRIPWIRE]
        ours = {name for weight in self._weights.values() for name in weight.files()} | set(self._tripwires)
        _ignore_when_loading(model, Structure(model, ()), ours)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        self._place.fill(self.quantization_config.options)  # on the device that transformers chose
        if any(weight.packed.scheme.stacked for weight in self._weights.values()):
            setattr(model, "resize", Live(model, self._checkpoint, self._weights, self._place.loaded).resize)  # noqa: B010
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes: packed tensors under the names that the checkpoint has for them."""
        prefixes = {id(module): name for name, module in self._place.loaded.items()}
        modules = model.named_modules(remove_duplicate=False)  # a tied weight has several names
        owners = {path: prefixes[id(module)] for path, module in modules if id(module) in prefixes}
        state = {}
        for key, tensor in model.state_dict().items():
            path, _, leaf = key.rpartition(".")
            local = "weight" if leaf == "qweight" else leaf
            if path in owners and leaf != "bias":
                key = self._weights[owners[path]].names.get(local, f"{owners[path]}.{leaf}")
            state[key] = tensor
        for module, targets in self._place.dense.items():  # decoded when they were loaded
            weight = self._weights[module]
            dense = [state.pop(name) for name in targets if name in state]
            dtype = weight.packed.scheme.original(weight.specs()).dtype
            for local, tensor in weight.packed.scheme.encode(dense[0].detach().cpu().to(dtype)).items():
                on_disk = "qweight" if local == "weight" else local
                state[weight.names.get(local, f"{module}.{on_disk}")] = tensor
        for name in self._tripwires:
            state[name] = torch.empty(0, dtype=torch.uint8)
        return state, {}

    def is_serializable(self, **_: Any) -> bool:
        if "base" not in self.quantization_config.fields:
            return True
        logging.getLogger(__name__).warning(
            "packed tensors that were coded without loss were decoded at loading and cannot be saved as they were; "
            "copy the directory, or run `compress export --to original`"
        )
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def _ignore_when_loading(model: PreTrainedModel, structure: Structure, names: set[str]) -> None:
    targets = names | {structure.target(name)[0] for name in names}
    # Numbers as one pattern: transformers searches all of them for every tensor of the checkpoint.
    patterns = {"^" + re.sub(r"\d+", r"\\d+", re.escape(name)) + "$" for name in targets}
    model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | patterns


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    max_memory: int | str | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    kv_cache: str | None = None,
    kv_bits: int | None = None,
    kv_window: int | None = None,
    **options: Any,
) -> PreTrainedModel:
    """The model of a checkpoint directory, in eval mode; compressed ones run on our kernels.

    dtype: that the model computes in; auto: the stored one.
    max_memory: what all weights of a `bitstack` model may take, "3.2GiB" or bytes; `model.resize` changes it later.
    kv_cache: `bfp` or `kivi`, to keep keys and values packed. options: of the scheme that it is stored with,
    to be run with others (`coding="fixed"`, `bits=3`). Raises ValueError where the directory is no checkpoint or
    compressed in a way unknown to us and to transformers, and for a max_memory that its first blocks do not fit into.
    """
    if kv_cache is None and (kv_bits, kv_window) != (None, None):
        raise ValueError("kv_bits, kv_window: of which cache? pass kv_cache='bfp' or kv_cache='kivi'")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: {dtype!r} is not one of auto, bfloat16, float16, float32")
    path = Path(path)
    check_device(device)
    weight_files(path)  # transformers would open a pickle where there is no safetensors file
    config = read_config(path)
    quantization = getattr(config, "quantization_config", None)
    if quantization and quantization.get("quant_method") == METHOD:
        Source(path, foreign="base" not in quantization)  # says what is wrong with config.json or the headers
    if options:
        _check_options(path, quantization, options)
    if max_memory is not None:
        _check_stacked(path, quantization)
        sizes.parse(max_memory)
    if quantization and _ours(quantization):
        most = None if max_memory is None else 1
        run = {"run": quantization, "options": options, "most_blocks": most}
        config.quantization_config = {"quant_method": METHOD, **run}
    if hasattr(config, dfloat11.KEY):
        model = _load_dfloat11(path, config, dtype)
    else:
        with _no_progress_bar():
            model = model_class(config).from_pretrained(
                path, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
    if device is not None:
        torch.nn.Module.to(model, device)
    if max_memory is not None:
        model.resize(max_memory)  # type: ignore[operator]
    model.eval()
    if kv_cache is not None:
        packed_cache.use(model, kv_cache, kv_bits, kv_window)
    return model


def _load_dfloat11(path: Path, config: PretrainedConfig, dtype: torch.dtype | str) -> PreTrainedModel:
    """A checkpoint in DFloat11's own layout, decoded: transformers would load random weights."""
    source = Source(path)
    delattr(config, dfloat11.KEY)
    state = {name: source.read(name) for name in source.specs}
    with _no_progress_bar():
        model: PreTrainedModel = model_class(config).from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    if (path / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model


def _check_stacked(path: Path, quantization: Mapping[str, Any] | None) -> None:
    schemes = [fields["scheme"] for fields in (quantization or {}).get("schemes", ())]
    if not any(scheme_class(name).stacked for name in schemes):
        raise ValueError(f"{path}: max_memory decides how much of a bitstack checkpoint is loaded, and this is none")


def _check_options(path: Path, quantization: Mapping[str, Any] | None, options: Mapping[str, Any]) -> None:
    named = [dict(fields) for fields in (quantization or {}).get("schemes", ())]
    schemes = [make(fields.pop("scheme"), fields) for fields in named]
    recoding = [scheme.name for scheme in schemes if scheme.recodes]
    if not recoding:
        raise ValueError(
            f"{path}: loading takes no {', '.join(options)}. It takes dtype, device, max_memory, kv_cache, kv_bits and "
            "kv_window; and options of what can be decoded otherwise: df11, and kmeans with nested=true"
        )
    for name in recoding:
        make(name, options)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers shows a bar of its own, on whatever stderr is."""
    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()


def _ours(quantization: Mapping[str, Any]) -> bool:
    """Whether our kernels run it; compressed-tensors with 4-bit activations, say, are left to that package."""
    if METHOD not in quantization and quantization.get("kv_cache_scheme"):
        return False  # the package quantizes the cache, and we do not
    try:
        planning.from_config(quantization, {})
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return False
    return True


def model_class(config: PretrainedConfig) -> Any:
    """The transformers class that the config names."""
    names = config.architectures or [""]
    cls = getattr(transformers, names[0], None)
    if cls is None:
        raise ValueError(
            f"config.json: architecture {names[0]!r} is unknown to transformers {transformers.__version__}"
        )
    return cls
