"""A model without weights, into which those of a checkpoint are read, a block at a time, and dropped again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.kernels.experts import CompressedExperts
from compress.source import Source
from compress.structure import Structure, build, read_config

OUTSIDE = ""  # the name of what belongs to no block


class Hollow:
    """model: on the meta device but for what was read, in float32 on `device`. blocks: by name, in their order.
    members: of each block, and of what is OUTSIDE, the names of parameters and buffers."""

    def __init__(self, source: Source, device: torch.device) -> None:
        self._source, self._device = source, device
        self.model = _build(source)
        self.head = self.model.get_output_embeddings()
        self.blocks = decoder_blocks(self.model)
        self._structure = Structure(self.model, source.specs)
        placed = filter(self._structure.is_placed, source.specs)
        self._stored = {self._structure.target(name)[0]: name for name in placed}
        self.members: dict[str, list[str]] = {block: [] for block in (*self.blocks, OUTSIDE)}
        for name in self.model.state_dict():
            self.members[self.block_of(name)].append(name)

    def stored(self, parameter: str) -> str | None:
        """The tensor of the checkpoint that a parameter of the model is."""
        return self._stored.get(parameter)

    def block_of(self, name: str) -> str:
        """The block that a parameter or module belongs to."""
        return next((block for block in self.blocks if name == block or name.startswith(f"{block}.")), OUTSIDE)

    def head_members(self) -> list[str]:
        """The members that are the head's own."""
        path = next((path for path, module in self.model.named_modules() if module is self.head), None)
        return [] if path is None else [name for name in self.members[OUTSIDE] if name.startswith(f"{path}.")]

    def read(self, names: Iterable[str]) -> dict[str, nn.Module]:
        """Reads parameters and buffers. Returns the layers that stand for experts among them, by module."""
        experts: dict[str, nn.Module] = {}
        tied = self._structure.tied()
        tied = {**{b: a for a, b in tied.items()}, **tied}
        stacks = {linear.path for linear in self._structure.linears.values() if linear.expert is not None}
        for name in names:
            stored = self._stored.get(name) or self._stored.get(tied.get(name, ""))
            owner, leaf = self._owner(name)
            if name in stacks:
                experts |= self._place_experts(name)
            elif stored is not None:
                tensor = self._source.read(stored)
                # An embedding is used row by row: it stays as it is mapped from the file.
                is_rows = isinstance(owner, nn.Embedding) and self.block_of(name) == OUTSIDE
                _put(owner, leaf, tensor if is_rows and self._device.type == "cpu" else self._cast(tensor))
            elif leaf in owner._parameters:
                raise ValueError(
                    f"{name}: no tensor of the checkpoint has this name, or transformers makes it of several, which "
                    "calibration cannot follow; choose method=rtn"
                )

        return experts

    def drop(self, block: str) -> None:
        """Forgets the weights of a block."""
        self.blocks[block].to("meta")
        for stored in {self._stored[name] for name in self.members[block] if name in self._stored}:
            self._source.release(stored)

    def put(self, parameter: str, tensor: Tensor) -> None:
        """Replaces a parameter."""
        _put(*self._owner(parameter), self._cast(tensor))

    def _place_experts(self, path: str) -> dict[str, nn.Module]:
        parts = [linear for linear in self._structure.linears.values() if linear.path == path]
        owner, leaf = self._owner(path)
        places: dict[str, nn.Module] = {}
        experts: list[list[nn.Linear]] = [[] for _ in range(self._structure.parameters[path].shape[0])]
        for linear in sorted(parts, key=lambda linear: linear.part):
            weight = self._source.read(linear.source, linear.index)
            weight = weight.T if linear.transposed else weight
            place = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            place.weight = nn.Parameter(self._cast(weight).contiguous(), requires_grad=False)
            assert linear.expert is not None
            experts[linear.expert].append(place)
            places[linear.module] = place
        delattr(owner, leaf)
        setattr(owner, leaf, _Experts(experts, parts[0].transposed))
        return places

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, torch.float32 if tensor.is_floating_point() else tensor.dtype)

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self.model.get_submodule(path), leaf


class _Experts(CompressedExperts):
    """Experts whose layers are called one by one also where a model multiplies with all of them at once (Llama 4)."""

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.bmm and isinstance(args[1], _Experts) and args[1].transposed:
            return torch.stack([args[1][expert].multiply(x) for expert, x in enumerate(args[0])])
        return super().__torch_function__(function, types, args, kwargs)


def _build(source: Source) -> PreTrainedModel:
    config = read_config(source.path)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.use_cache = False
    model = build(config, with_buffers=True)
    model.eval()
    return model


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The members of the outermost lists of modules, by name: the layers of encoders and decoders."""
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outermost = {p: blocks for p, blocks in lists.items() if not any(p.startswith(f"{other}.") for other in lists)}
    return {f"{path}.{i}": block for path, blocks in outermost.items() for i, block in enumerate(blocks)}


def _put(owner: nn.Module, leaf: str, tensor: Tensor) -> None:
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor
