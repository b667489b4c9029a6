"""Which modules of a model run the packed weights of a checkpoint, and the filling of them.

Linears and experts get modules of ours; an embedding keeps its module, with a packed weight in the place of its
parameter; what else is packed (norms, biases, convolutions) is decoded when it is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress import planning
from compress.formats.compiled import copied
from compress.kernels.experts import CompressedExperts
from compress.kernels.linear import CompressedLinear, CompressedModule, meta
from compress.kernels.weight import CompressedWeight
from compress.planning import Packed
from compress.scheme import Spec, Tensors
from compress.store import Decoded, Store
from compress.structure import Linear, Structure


@dataclass(frozen=True)
class Weight:
    """One packed weight of a checkpoint. names: local name -> name in the store."""

    packed: Packed
    store: Store
    names: Mapping[str, str]

    def specs(self) -> dict[str, Spec]:
        return {local: self.store.specs[name] for local, name in self.names.items()}

    def files(self) -> list[str]:
        """The tensors of the checkpoint's files that it is made of."""
        return [stored for name in self.names.values() for stored in self.store.backing[name]]

    def with_blocks(self, count: int) -> Weight:
        """The same weight with so many of its blocks, where it is stacked; another as it is."""
        scheme = self.packed.scheme
        return replace(self, names={n: stored for n, stored in self.names.items() if scheme.block_of(n) < count})

    def read(self) -> Tensors:
        return {local: self.store.read(name) for local, name in self.names.items()}

    def buffers(self) -> Tensors:
        """Its tensors without memory."""
        return {local: meta(spec.dtype, spec.shape) for local, spec in self.specs().items()}


def packed_weights(files: Store, quantization: Mapping[str, Any], dtype: str) -> dict[str, Weight]:
    """module -> Weight of all that a `quantization_config` describes. Raises ValueError for what we cannot run."""
    weights = _read(files, quantization)
    base = quantization.get("base")
    if base is None:
        return weights
    # What another packed before us: its tensors are decoded by ours when they are loaded, and stay packed by theirs.
    below = Decoded(files, quantization, dtype)
    try:
        planning.from_config(base, below.specs)
    except ValueError as error:
        raise ValueError(f"before it was coded without loss, {error}; export it --to original, and load that") from None
    inner = _read(below, base)
    inside = {name for weight in inner.values() for name in weight.names.values()}
    return {**{module: w for module, w in weights.items() if w.packed.source not in inside}, **inner}


def _read(store: Store, quantization: Mapping[str, Any]) -> dict[str, Weight]:
    modules = planning.from_config(quantization, store.specs)
    names = planning.local_tensors(store.specs, modules)
    return {module: Weight(packed, store, names[module]) for module, packed in modules.items()}


class Placement:
    """The modules of `model` that its packed weights run in, without memory until `fill`."""

    def __init__(self, model: PreTrainedModel, weights: Mapping[str, Weight]) -> None:
        self._weights, self._model = weights, model
        self._kept: dict[str, torch.dtype] = model._get_dtype_plan(model.dtype)
        self.loaded: dict[str, CompressedModule] = {}
        self.dense: dict[str, list[str]] = {}  # module -> the parameters or buffers of the model that it is
        self._buffers: set[str] = set()  # those of them that are no parameters
        self._untied: set[str] = set()
        self.unused: set[str] = set()  # stored, and no part of the model
        self._structure = Structure(model, dict.fromkeys(weight.packed.source for weight in weights.values()))
        for module in weights:
            if module in self._structure.linears:
                self._place_linear(module, self._structure.linears[module])
        self._place_experts()
        for module in weights:  # after the linears, which take their biases along
            if module not in self._structure.linears:
                self._place_other(module)
        self._keep_untied()
        if any(isinstance(loaded, CompressedWeight) for loaded in self.loaded.values()):
            model.resize_token_embeddings = _cannot_resize  # type: ignore[method-assign]
        for loaded in self.loaded.values():
            # Filled by us: transformers must neither look for these in the files nor report them missing.
            loaded._non_persistent_buffers_set.update(loaded._buffers)

    def fill(self, options: Mapping[str, Any]) -> None:
        """Reads the packed tensors to where transformers has put the modules.

        options: of schemes that recode; what they packed is coded anew with them. Raises ValueError for damaged ones.
        """
        for module, loaded in self.loaded.items():
            weight = self._weights[module]
            if options and weight.packed.scheme.recodes:
                device = next(iter(loaded.tensors().values())).device
                with _named(module):
                    scheme, tensors = weight.packed.scheme.recode(weight.read(), **options)
                place = "cpu" if device.type == "meta" else device
                loaded.replace(scheme, {name: copied(tensor, place) for name, tensor in tensors.items()})
            else:
                for local, tensor in weight.read().items():
                    loaded.fill(local, tensor)
            for name in weight.names.values():
                weight.store.release(name)
            loaded._non_persistent_buffers_set.clear()
            loaded.is_filled = True
        for module, targets in self.dense.items():
            self._fill_dense(module, targets)

    def _place_linear(self, module: str, linear: Linear) -> None:
        if linear.expert is not None:
            self.loaded[module] = self._linear(module, None)
            return
        target = f"{linear.path}.weight"
        shape = self._structure.parameters[target].shape
        self._check_shape(module, tuple(shape[::-1] if linear.transposed else shape))
        if partners := self._untie(target):
            self._place_weight(module, [target, *partners])
            return
        bias = getattr(self._model.get_submodule(linear.path), "bias", None)
        self.loaded[module] = self._linear(module, bias)
        self._model.set_submodule(linear.path, self.loaded[module])

    def _place_other(self, module: str) -> None:
        weight = self._weights[module]
        target, _ = self._structure.target(weight.packed.source)
        tensor = self._structure.parameters.get(target)
        if tensor is None:
            if not weight.packed.scheme.lossless:
                raise ValueError(f"config.json compresses {module}, which this model does not have")
            self.unused.add(module)  # transformers ignores it in an uncompressed checkpoint too
            return
        self._check_shape(module, tuple(tensor.shape))
        targets = [target, *self._untie(target)]
        owner, leaf = self._owner(target)
        if isinstance(owner, nn.Embedding) and leaf == "weight":
            self._place_weight(module, targets)
            return
        for name in targets:
            owner, leaf = self._owner(name)
            if owner._parameters.pop(leaf, None) is None:
                self._buffers.add(name)
            # A buffer that is not saved is none that transformers looks for in the files.
            owner.register_buffer(leaf, meta(self._dtype(name, tensor), tuple(tensor.shape)), persistent=False)
        self.dense[module] = targets

    def _place_weight(self, module: str, parameters: list[str]) -> None:
        weight = self._weights[module]
        tensor = self._structure.parameters[parameters[0]]
        dtype = self._dtype(parameters[0], tensor)
        scheme = weight.packed.scheme
        self.loaded[module] = CompressedWeight(scheme, tuple(tensor.shape), dtype, weight.buffers())
        for name in parameters:
            owner, leaf = self._owner(name)
            delattr(owner, leaf)
            setattr(owner, leaf, self.loaded[module])

    def _linear(self, module: str, bias: nn.Parameter | None) -> CompressedLinear:
        weight = self._weights[module]
        rows, columns = weight.packed.scheme.original(weight.specs()).shape
        return CompressedLinear(weight.packed.scheme, (rows, columns), weight.buffers(), bias)

    def _place_experts(self) -> None:
        parts: dict[str, list[Linear]] = {}
        for module in self._weights:
            linear = self._structure.linears.get(module)
            if linear is not None and linear.expert is not None:
                parts.setdefault(linear.path, []).append(linear)
        for path, linears in parts.items():
            parameter = self._structure.parameters[path]
            rows: list[list[CompressedLinear]] = [[] for _ in range(parameter.shape[0])]
            for linear in sorted(linears, key=lambda linear: linear.part):
                loaded = self.loaded[linear.module]
                assert linear.expert is not None and isinstance(loaded, CompressedLinear)
                rows[linear.expert].append(loaded)
            experts = CompressedExperts(rows, linears[0].transposed)
            if experts.shape != parameter.shape:
                raise ValueError(f"{path}: {tuple(experts.shape)} is stored, config.json has {tuple(parameter.shape)}")
            owner, leaf = self._owner(path)
            delattr(owner, leaf)
            setattr(owner, leaf, experts)
        if parts and hasattr(self._model, "set_experts_implementation"):
            # The others multiply with the whole 3-D parameter at once.
            self._model.set_experts_implementation("eager")

    def _fill_dense(self, module: str, targets: list[str]) -> None:
        weight = self._weights[module]
        with _named(module):
            decoded = weight.packed.scheme.decode(weight.read())
        shared: Tensor | None = None
        for name in targets:
            owner, leaf = self._owner(name)
            place = owner._buffers.pop(leaf)
            assert place is not None
            owner._non_persistent_buffers_set.discard(leaf)
            if shared is None:
                tensor = decoded.to("cpu" if place.is_meta else place.device, place.dtype, copy=True)
                shared = tensor if name in self._buffers else nn.Parameter(tensor, requires_grad=False)
            if isinstance(shared, nn.Parameter):
                owner.register_parameter(leaf, shared)
            else:
                owner.register_buffer(leaf, shared)

    def _check_shape(self, module: str, wanted: tuple[int, ...]) -> None:
        weight = self._weights[module]
        found = weight.packed.scheme.original(weight.specs()).shape
        if found != wanted:
            raise ValueError(
                f"{module}: {found} is stored, and by config.json it is {wanted}; they do not belong together"
            )

    def _dtype(self, name: str, tensor: Tensor) -> torch.dtype:
        """What transformers would load a parameter in: some are kept in float32 whatever the model's dtype."""
        return next((dtype for pattern, dtype in self._kept.items() if re.search(pattern, name)), tensor.dtype)

    def _untie(self, name: str) -> list[str]:
        """The other parameters that share the memory of one; from now on it is for us to keep them so."""
        tied: dict[str, str] = self._model.all_tied_weights_keys
        groups = {name, *(a for a, b in tied.items() if b == name), *((tied[name],) if name in tied else ())}
        groups |= {a for a, b in tied.items() if b in groups}
        for member in groups:
            tied.pop(member, None)
        self._untied |= groups if len(groups) > 1 else set()
        return sorted(groups - {name})

    def _keep_untied(self) -> None:
        """Also where the model works out again what is tied: `tie_weights` would look for parameters."""
        if self._untied:
            kept = partial(_without, self._model.get_expanded_tied_weights_keys, frozenset(self._untied))
            self._model.get_expanded_tied_weights_keys = kept  # type: ignore[method-assign]

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self._model.get_submodule(path), leaf


def _without(expanded: Callable[..., dict[str, str]], ours: frozenset[str], all_submodels: bool = False) -> Any:
    """For `partial`, which can be pickled. expanded: what else says which parameters are tied."""
    return {a: b for a, b in expanded(all_submodels=all_submodels).items() if a not in ours}


def _cannot_resize(*_: Any, **__: Any) -> Any:
    raise ValueError("packed embeddings cannot be resized; resize the original, and compress that")


@contextmanager
def _named(module: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{module}: {error}") from None
