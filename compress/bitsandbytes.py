"""The plan in bitsandbytes' words: `quantization_config` for nf4, written and read, and the names of its tensors."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from compress.nf4 import Nf4, State
from compress.scheme import Scheme, Spec

METHOD = "bitsandbytes"
_STATE = "weight.quant_state.bitsandbytes__nf4"
# local name -> name in the module
NAMES = {
    **{local: f"weight.{local}" for local in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")},
    "quant_state": _STATE,
}


def write(schemes: Iterable[Scheme], skipped: Iterable[str], dtype: torch.dtype) -> dict[str, Any]:
    """The `quantization_config` of nf4 weights. skipped: what stays as it is, of `replaced`. dtype: to compute in."""
    forms = [scheme.interchange or {} for scheme in schemes]
    return {
        **forms[0],
        # block size and double quantization are stored with each weight; this is for those who quantize anew
        "bnb_4bit_use_double_quant": any(form["bnb_4bit_use_double_quant"] for form in forms),
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "llm_int8_skip_modules": list(skipped),
        "llm_int8_threshold": 6.0,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        # Ours: `import compress.hf` runs such a checkpoint on our kernels. Others ignore the key.
        "compress": {"version": 1},
    }


def read(config: Mapping[str, Any], stored: Mapping[str, Spec]) -> dict[str, Scheme]:
    """module -> Scheme for an nf4 checkpoint of bitsandbytes, whoever wrote it. Raises ValueError for fp4 and int8."""
    kind = config.get("bnb_4bit_quant_type", "fp4") if config.get("load_in_4bit") else "int8"
    if kind != "nf4":
        raise ValueError(
            f"quantization_config: {kind} of bitsandbytes is not supported, only nf4; load it with transformers, call "
            "`dequantize()` and save that"
        )
    storage = config.get("bnb_4bit_quant_storage", "uint8")
    if storage != "uint8":
        raise ValueError(f"quantization_config: bnb_4bit_quant_storage {storage} is not supported, only uint8")
    schemes: dict[str, Scheme] = {}
    for name, spec in stored.items():
        if not name.endswith(f".{_STATE}"):
            continue
        module = name.removesuffix(f".{_STATE}")
        try:
            state = State.unpack(spec.text or b"")
        except ValueError as error:
            raise ValueError(f"{module}: {error}") from None
        schemes[module] = Nf4(state.block_size, state.offset is not None)
    return schemes


def replaced(model: PreTrainedModel, skipped: Collection[str] = ()) -> list[str]:
    """The modules that transformers replaces by bitsandbytes' own, where `llm_int8_skip_modules` is `skipped`.

    None of those that a model keeps in float32 (T5's `wo`), and no subclass (Falcon's linear).
    """
    kept = [*skipped, *(model._keep_in_fp32_modules or ())]
    return [
        path
        for path, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D) and should_convert_module(path, kept)
    ]


def holds(model: PreTrainedModel, taken: Collection[str]) -> bool:
    """Whether a model runs with the modules `taken`, and no others, replaced by bitsandbytes' own."""
    skipped = [path for path in replaced(model) if path not in taken]
    return set(replaced(model, skipped)) == set(taken) and not any(_is_read(model, path) for path in taken)


def _is_read(model: PreTrainedModel, path: str) -> bool:
    """Whether the code around a module takes its weight for a dense one, as Mamba's does."""
    owner, _, leaf = path.rpartition(".")
    try:
        code = inspect.getsource(type(model.get_submodule(owner)))
    except (OSError, TypeError):  # made at run time
        return False
    return re.search(rf"self\.{leaf}\.weight(?!\.(dtype|device)\b)\b", code) is not None
