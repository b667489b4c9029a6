"""The Python face of compress; the command line calls the same functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress import hub
from compress.against import Verification
from compress.against import verify as run_verification
from compress.calibrate import Calibration
from compress.eval.evaluate import Evaluation
from compress.eval.evaluate import evaluate as run_evaluation
from compress.eval.gates import Gates
from compress.eval.report import Report
from compress.exporting import export as run_export
from compress.hf import load as load_directory
from compress.kernels.linear import CompressedLinear
from compress.prepare import Forecast, Prepared
from compress.progress import Progress
from compress.recipe import Rules
from compress.registry import make
from compress.run import Options, Scoring, run
from compress.scheme import Scheme, Spec, Tensors
from compress.trimming import trim as run_trim

__all__ = [
    "Calibration",
    "Gates",
    "Options",
    "Rules",
    "Scoring",
    "decode",
    "encode",
    "evaluate",
    "export",
    "linear",
    "load",
    "plan",
    "quantize",
    "trim",
    "verify",
]


def plan(
    model: str | Path, scheme: str = "int4", *, rules: Rules | None = None, kv_cache: str | None = None, **options: Any
) -> Forecast:
    """Predicts every tensor's bytes, from headers; of a lossless scheme from the values, which decide them.

    kv_cache: "fp8" for scales of the KV cache. options: the scheme's, for example group_size=64.

    Raises ValueError for a model that is no checkpoint, and for rules and options that name nothing known.
    """
    return Prepared(model, scheme, options, rules or Rules(), kv_cache).forecast()


def quantize(
    model: str | Path,
    out: str | Path,
    scheme: str = "int4",
    *,
    rules: Rules | None = None,
    kv_cache: str | None = None,
    target_size: int | str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Compresses a checkpoint (directory or hub id) to `out`, scores it, and returns report.json as an object.

    target_size: what all tensors may take, bytes or "3.2GiB": each weight then gets a width of `scheme`, or one of a
    list such as "int4:bits=3,int4,fp8", so that the predicted loss is least (`target.py`).
    kv_cache: "fp8" to measure scales for the KV cache too. options: the scheme's (`bits=3`), or those of the run
    (`seed`, `overwrite`, `shard_size`, `scoring`, `command`: see `Options`). The same call after an interruption goes
    on where that stopped. Raises ValueError for bad input and OSError where files cannot be written; `out` is then as
    it was.
    """
    own = {key: options.pop(key) for key in list(options) if key in Options.__dataclass_fields__}
    named = {"rules": rules, "kv_cache": kv_cache, "target_size": target_size}
    given = {**{key: value for key, value in named.items() if value}, **own, **options}
    own.setdefault("command", f"compress.quantize({str(model)!r}, {str(out)!r}, scheme={scheme!r}{_keywords(given)})")
    prepared = Prepared(model, scheme, options, rules or Rules(), kv_cache, target_size)
    return run(prepared, str(model), Path(out), Options(**own), progress)


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    max_memory: int | str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """The model of a checkpoint (directory or hub id), in eval mode; compressed linears run on our kernels.

    `dtype=torch.float32` computes in that, by default in the stored dtype.
    max_memory: what all weights of a `bitstack` model may take, "3.2GiB" or bytes; `model.resize("2GiB")` changes that
    between forward passes. options: `kv_cache="bfp"` or `"kivi"`, with `kv_bits` and `kv_window`, keeps keys and values
    packed; and those of a scheme, to run with others than it was stored with: `coding="fixed"` of df11 is larger, and
    on a GPU faster.
    """
    return load_directory(hub.local_directory(path), device, max_memory, **options)


def evaluate(model: str | Path, reference: str | Path | None = None, **how: Any) -> Evaluation:
    """Scores a model, compressed or not, on text and tasks; see `compress.eval.evaluate` for the keywords."""
    original = None if reference is None else hub.local_directory(reference)
    return run_evaluation(hub.local_directory(model), original, **how)


def export(
    model: str | Path, out: str | Path, to: str = "bf16", overwrite: bool = False, progress: Progress | None = None
) -> None:
    """Writes a compressed checkpoint (directory or hub id) to `out` as a plain one that anything loads.

    to: bf16, fp16 or fp32; "original" gives the tensors from before a lossless scheme. Raises ValueError for what
    cannot be written so, and for tensors that are damaged.
    """
    run_export(hub.local_directory(model), Path(out), to, overwrite, progress=progress)


def verify(out: str | Path, against: str | Path | None = None) -> Verification:
    """Checks every byte of what was written; against: the original, to decode and compare every tensor with.

    Raises ValueError where `out` was not written by compress.
    """
    return run_verification(Path(out), None if against is None else hub.local_directory(against))


def trim(
    model: str | Path, out: str | Path, size: int | str, overwrite: bool = False, command: str | None = None
) -> int:
    """Writes a copy of a `bitstack` checkpoint whose weight files take `size` ("4GiB", or bytes) at most.

    command: for its model card. Returns the bytes of these files. Raises ValueError for a size that is too small, with
    the least one.
    """
    made = f"compress.trim({str(model)!r}, {str(out)!r}, {size!r})" if command is None else command
    return run_trim(hub.local_directory(model), Path(out), size, overwrite, command=made)


def encode(weight: Tensor, scheme: str = "int4", **options: Any) -> Tensors:
    """weight: (out_features, in_features), bfloat16, float16 or float32; for a lossless scheme of any shape.

    Returns the tensors stored, by local name.
    """
    return _fitted(weight, scheme, options).encode(weight.cpu())


def decode(tensors: Tensors, scheme: str = "int4", **options: Any) -> Tensor:
    """The (out_features, in_features) weight that `encode` made `tensors` of, given the same scheme and options."""
    made = make(scheme, options)
    # as `encode`, which may have taken a smaller group
    if "weight_shape" in tensors:
        rows, columns = tensors["weight_shape"].tolist()
        made = made.fit((rows, columns))
    elif "weight" in tensors:
        made = made.fit(tuple(tensors["weight"].shape))
    try:
        made.check({name: Spec.of(name, tensor) for name, tensor in tensors.items()})
    except ValueError as error:
        wrong = str(error).partition(";")[0].partition(", so ")[0]  # what else there is to do is meant for files
        given = ", ".join(tensors) or "none"
        raise ValueError(
            f"{scheme}: {wrong} (given: {given}); name the scheme and the options that they were encoded with"
        ) from None
    return made.decode(tensors)


def linear(weight: Tensor, scheme: str = "int4", bias: Tensor | None = None, **options: Any) -> CompressedLinear:
    """A module that computes x @ weight.T + bias from the packed weight."""
    fitted = _fitted(weight, scheme, options)
    if weight.dim() != 2:
        raise ValueError(f"weight: a linear needs (out_features, in_features), not {tuple(weight.shape)}")
    parameter = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return CompressedLinear(fitted, (weight.shape[0], weight.shape[1]), fitted.encode(weight.cpu()), parameter)


def _fitted(weight: Tensor, scheme: str, options: dict[str, Any]) -> Scheme:
    if not isinstance(weight, Tensor):
        raise ValueError(f"weight: a tensor is needed, not {type(weight).__name__}")
    made = make(scheme, options)
    if made.lossless:
        return made
    if weight.dim() != 2 or weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            f"weight: a 2-D bfloat16, float16 or float32 tensor is needed, not {weight.dim()}-D {weight.dtype}"
        )
    if not weight.isfinite().all():
        raise ValueError(f"weight: holds NaN or infinity, which {scheme} cannot store")
    return made.fit((weight.shape[0], weight.shape[1])).for_dtype(weight.dtype)


def _keywords(options: dict[str, Any]) -> str:
    return "".join(f", {key}={value!r}" for key, value in options.items())
