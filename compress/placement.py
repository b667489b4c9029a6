"""Which modules of a model run the packed weights of a checkpoint, and the filling of them.

Linears and experts get modules of ours; an embedding keeps its module, with a packed weight in the place of its
parameter; what else is packed (norms, biases, convolutions) is decoded when it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from compress import planning
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
        inner = _read(below, base)
    except ValueError as error:
        raise ValueError(f"before it was coded without loss, {error}; export it --to original, and load that") from None
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
        self.loaded: dict[str, CompressedModule] = {}
        self.dense: dict[str, str] = {}  # module -> parameter or buffer of the model
        self._kinds: dict[str, type[nn.Parameter] | None] = {}
        self._structure = Structure(model, dict.fromkeys(weight.packed.source for weight in weights.values()))
        experts: dict[str, list[Linear]] = {}
        for module in weights:
            linear = self._structure.linears.get(module)
            if linear is None:
                self._place_other(module)
            elif linear.expert is not None:
                self.loaded[module] = self._linear(module, None)
                experts.setdefault(linear.path, []).append(linear)
            elif partners := self._untie(f"{linear.path}.weight"):
                self._place_weight(module, [f"{linear.path}.weight", *partners])
            else:
                self.loaded[module] = self._linear(module, getattr(model.get_submodule(linear.path), "bias", None))
                model.set_submodule(linear.path, self.loaded[module])
        for path, parts in experts.items():
            self._place_experts(path, parts)
        if experts and hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # the others multiply with the whole 3-D parameter at once
        for loaded in self.loaded.values():
            # Filled by us: transformers must neither look for these in the files nor report them missing.
            loaded._non_persistent_buffers_set.update(loaded._buffers)

    def fill(self, options: Mapping[str, Any]) -> None:
        """Reads the packed tensors to where transformers has put the modules.

        options: of lossless schemes; what they packed is coded anew with them.
        """
        for module, loaded in self.loaded.items():
            weight = self._weights[module]
            if options and weight.packed.scheme.lossless:
                device = next(iter(loaded.tensors().values())).device
                scheme, tensors = weight.packed.scheme.recode(weight.read(), **options)
                loaded.replace(
                    scheme, {name: t.to("cpu" if device.type == "meta" else device) for name, t in tensors.items()}
                )
            else:
                for local, tensor in weight.read().items():
                    loaded.fill(local, tensor)
            for name in weight.names.values():
                weight.store.release(name)
            loaded._non_persistent_buffers_set.clear()
            loaded.is_filled = True
        for module, target in self.dense.items():
            self._fill_dense(module, target)

    def _place_other(self, module: str) -> None:
        weight = self._weights[module]
        target, _ = self._structure.target(weight.packed.source)
        tensor = self._structure.parameters.get(target)
        if tensor is None:
            if not weight.packed.scheme.lossless:
                raise ValueError(f"config.json compresses {module}, which this model does not have")
            return  # transformers ignores it in an uncompressed checkpoint too
        owner, leaf = self._owner(target)
        if isinstance(owner, nn.Embedding) and leaf == "weight":
            self._place_weight(module, [target, *self._untie(target)])
            return
        for name in (target, *self._untie(target)):
            owner, leaf = self._owner(name)
            self._kinds[target] = nn.Parameter if leaf in owner._parameters else None
            owner._parameters.pop(leaf, None)
            # A buffer that is not saved is none that transformers looks for in the files.
            owner.register_buffer(leaf, meta(tensor.dtype, tuple(tensor.shape)), persistent=False)
        self.dense[module] = target

    def _place_weight(self, module: str, parameters: list[str]) -> None:
        weight = self._weights[module]
        tensor = self._structure.parameters[parameters[0]]
        self.loaded[module] = CompressedWeight(
            weight.packed.scheme, tuple(tensor.shape), tensor.dtype, weight.buffers()
        )
        for name in parameters:
            owner, leaf = self._owner(name)
            delattr(owner, leaf)
            setattr(owner, leaf, self.loaded[module])

    def _linear(self, module: str, bias: nn.Parameter | None) -> CompressedLinear:
        weight = self._weights[module]
        rows, columns = weight.packed.scheme.original(weight.specs()).shape
        return CompressedLinear(weight.packed.scheme, (rows, columns), weight.buffers(), bias)

    def _place_experts(self, path: str, linears: list[Linear]) -> None:
        owner, leaf = self._owner(path)
        rows: list[list[CompressedLinear]] = [[] for _ in range(self._structure.parameters[path].shape[0])]
        for linear in sorted(linears, key=lambda linear: linear.part):
            loaded = self.loaded[linear.module]
            assert linear.expert is not None and isinstance(loaded, CompressedLinear)
            rows[linear.expert].append(loaded)
        delattr(owner, leaf)
        setattr(owner, leaf, CompressedExperts(rows, linears[0].transposed))

    def _fill_dense(self, module: str, target: str) -> None:
        weight = self._weights[module]
        try:
            decoded = weight.packed.scheme.decode(weight.read())
        except ValueError as error:
            raise ValueError(f"{module}: {error}") from None
        owner, leaf = self._owner(target)
        place = owner._buffers.pop(leaf)
        assert place is not None
        owner._non_persistent_buffers_set.discard(leaf)
        tensor = decoded.to("cpu" if place.is_meta else place.device, place.dtype, copy=True)
        if self._kinds[target] is None:
            owner.register_buffer(leaf, tensor)
        else:
            owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))

    def _untie(self, name: str) -> list[str]:
        """The other parameters that share the memory of one; from now on it is for us to keep them so."""
        tied: dict[str, str] = self._model.all_tied_weights_keys
        groups = {name, *(a for a, b in tied.items() if b == name), *((tied[name],) if name in tied else ())}
        groups |= {a for a, b in tied.items() if b in groups}
        for member in groups:
            tied.pop(member, None)
        return sorted(groups - {name})

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self._model.get_submodule(path), leaf
