"""Loading compressed checkpoints into transformers models, on our kernels.

Importing this module registers `quant_method: compress` with transformers, and takes over the compressed-tensors
checkpoints that we wrote; those of others still go to the compressed-tensors package. An import does nothing else.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled
from transformers.utils.quantization_config import CompressedTensorsConfig, QuantizationConfigMixin

from compress import planning
from compress.formats.checkpoint import Checkpoint, weight_files
from compress.kernels.experts import CompressedExperts
from compress.kernels.linear import CompressedLinear, meta
from compress.scheme import Spec
from compress.structure import Linear, Structure, read_config

METHOD = "compress"


@register_quantization_config(METHOD)
class CompressConfig(QuantizationConfigMixin):
    """A `quantization_config` that we can run; `fields` is what config.json says, and what is saved again."""

    def __init__(self, **fields: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.fields: dict[str, Any] = fields.get("run", {"quant_method": METHOD, **fields})

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.fields)


class _OurCompressedTensors(CompressedTensorsConfig):
    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        if METHOD in config_dict:
            return CompressConfig.from_dict({"run": config_dict}, return_unused_kwargs, **kwargs)
        return CompressedTensorsConfig.from_dict(config_dict, return_unused_kwargs, **kwargs)


AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"] = _OurCompressedTensors


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
        self._checkpoint = Checkpoint(Path(checkpoint_files[0]).parent)
        specs = {name: Spec(entry.dtype, entry.shape) for name, entry in self._checkpoint.entries.items()}
        modules = planning.from_config(self.quantization_config.fields, specs)
        self._locals = planning.local_tensors(specs, modules)
        self._loaded = _replace(model, modules, self._locals, specs)
        self._tripwires = {p.source: specs[p.source] for p in modules.values() if specs.get(p.source) == _TRIPWIRE}
        ours = {name for names in self._locals.values() for name in names.values()} | self._tripwires.keys()
        _ignore_when_loading(model, Structure(model, ()), ours)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        for name, linear in self._loaded.items():
            for local, stored in self._locals[name].items():
                linear.fill(local, self._checkpoint.read(stored))  # on the device that transformers chose
                self._checkpoint.release(stored)
            linear._non_persistent_buffers_set.clear()
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes: packed tensors under the names that the checkpoint has for them."""
        prefixes = {id(linear): name for name, linear in self._loaded.items()}
        owners = {path: prefixes[id(m)] for path, m in model.named_modules() if id(m) in prefixes}
        state = {}
        for key, tensor in model.state_dict().items():
            path, _, leaf = key.rpartition(".")
            local = "weight" if leaf == "qweight" else leaf
            stored = self._locals[owners[path]].get(local, key) if path in owners else key
            state[stored] = tensor
        for name in self._tripwires:
            state[name] = torch.empty(0, dtype=torch.uint8)
        return state, {}

    def is_serializable(self, **_: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


_TRIPWIRE = Spec(torch.uint8, (0,))


def _replace(
    model: PreTrainedModel,
    modules: Mapping[str, planning.Packed],
    tensors: Mapping[str, Mapping[str, str]],
    specs: Mapping[str, Spec],
) -> dict[str, CompressedLinear]:
    """Swaps the model's modules for compressed ones without memory; returns them by stored name."""
    structure = Structure(model, dict.fromkeys(packed.source for packed in modules.values()))
    experts: dict[str, list[Linear]] = {}
    loaded = {}
    for name, packed in modules.items():
        linear = structure.linears.get(name)
        if linear is None:
            raise ValueError(f"config.json compresses {name}, which this model does not have")
        local_specs = {local: specs[stored] for local, stored in tensors[name].items()}
        shape = packed.scheme.original(local_specs).shape
        bias = getattr(model.get_submodule(linear.path), "bias", None) if linear.expert is None else None
        buffers = {local: meta(spec.dtype, spec.shape) for local, spec in local_specs.items()}
        loaded[name] = CompressedLinear(packed.scheme, (shape[0], shape[1]), buffers, bias)
        # Filled by us: transformers must neither look for these in the files nor report them missing.
        loaded[name]._non_persistent_buffers_set.update(loaded[name]._buffers)
        if linear.expert is None:
            model.set_submodule(linear.path, loaded[name])
        else:
            experts.setdefault(linear.path, []).append(linear)
    for path, parts in experts.items():
        _replace_experts(model, path, parts, loaded)
    if experts and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others multiply with the whole 3-D parameter at once
    return loaded


def _replace_experts(
    model: PreTrainedModel, path: str, linears: list[Linear], loaded: Mapping[str, CompressedLinear]
) -> None:
    owner_path, _, attribute = path.rpartition(".")
    owner = model.get_submodule(owner_path)
    count = owner._parameters[attribute].shape[0]  # type: ignore[union-attr]
    rows: list[list[CompressedLinear]] = [[] for _ in range(count)]
    for linear in sorted(linears, key=lambda linear: linear.part):
        assert linear.expert is not None
        rows[linear.expert].append(loaded[linear.module])
    delattr(owner, attribute)
    setattr(owner, attribute, CompressedExperts(rows, linears[0].transposed))


def _ignore_when_loading(model: PreTrainedModel, structure: Structure, names: set[str]) -> None:
    targets = names | {structure.target(name)[0] for name in names}
    # Numbers as one pattern: transformers searches all of them for every tensor of the checkpoint.
    patterns = {"^" + re.sub(r"\d+", r"\\d+", re.escape(name)) + "$" for name in targets}
    model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | patterns


def check_device(device: str | torch.device | None) -> None:
    """Raises ValueError for a device that this machine or this torch does not have."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0].split(":")[0]
        raise ValueError(f"device {device} cannot be used here: {reason}; cpu always can") from None


def load(path: str | Path, device: str | torch.device | None = None) -> PreTrainedModel:
    """The model of a checkpoint directory, in eval mode and its stored dtype; compressed ones run on our kernels.

    Raises ValueError where the directory is no checkpoint or compressed in a way unknown to us and to transformers.
    """
    path = Path(path)
    check_device(device)
    weight_files(path)  # transformers would open a pickle where there is no safetensors file
    config = read_config(path)
    quantization = getattr(config, "quantization_config", None)
    if quantization and _ours(quantization):
        config.quantization_config = {"quant_method": METHOD, "run": quantization}
    with _no_progress_bar():
        model: PreTrainedModel = model_class(config).from_pretrained(
            path, config=config, dtype="auto", use_safetensors=True, trust_remote_code=False
        )
    if device is not None:
        torch.nn.Module.to(model, device)
    model.eval()
    return model


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
    """Whether our kernels run it; compressed-tensors with quantized activations, say, are left to that package."""
    try:
        planning.from_config(quantization, ())
    except (AttributeError, KeyError, TypeError, ValueError):
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
