"""A model that runs one decoder block at a time, from a checkpoint that need not fit into memory.

The model is built without weights. To run block k, the model's own forward pass is called: it makes masks, positions
and whatever else its blocks want; the blocks before k give back what they gave when it was their turn, block k runs,
and there the pass ends. So nothing has to be known of an architecture but where its blocks are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress import sums
from compress.change import Change
from compress.fold import KINDS, Fold, Kind, check, find, is_norm
from compress.formats.files import replacing
from compress.hollow import OUTSIDE, Hollow
from compress.kv_scales import Largest, watch
from compress.observer import Observer
from compress.source import Source
from compress.stats import Stats
from compress.structure import Linear

BATCH_TOKENS = 4096  # that run at once
TRIED_TOKENS = 512  # of the first batch, on which what a block is made of is tried: dozens of passes


class _Stop(Exception):
    """The pass has come as far as it should. args[0]: the block that it would have run next, None for the head."""


class Blocks:
    """The blocks of a model in the order in which they run; each is measured, changed and left behind.

    samples: (n, length) int64 tokens, or batches of them, which may differ in length. linears: the layers that are
    asked for, by module name. folder: where the activations between the blocks lie; they outlive the process, so that
    another can `leave` what was closed. Weights and activations are float32. Raises ValueError for a model whose blocks
    share weights.
    """

    def __init__(
        self,
        source: Source,
        linears: Mapping[str, Linear],
        samples: Tensor | Sequence[Tensor],
        folder: Path,
        device: str = "cpu",
    ) -> None:
        self._folder, self.device = folder, torch.device(device)
        self._hollow = Hollow(source, self.device)
        self.model, self._head, self._blocks = self._hollow.model, self._hollow.head, self._hollow.blocks
        self._batches = _batches(samples) if isinstance(samples, Tensor) else list(samples)
        self._linears: dict[str, dict[str, Linear]] = {block: {} for block in (*self._blocks, OUTSIDE)}
        for module, linear in linears.items():
            self._linears[self._hollow.block_of(linear.path)][module] = linear
        self._check_shared()
        self._last: dict[str, str] = {}  # list of blocks -> the last of them that is done
        self._differentiated = False
        self._places: dict[str, nn.Module] = {}  # module -> what multiplies with its weight
        self._batch, self._outputs = -1, dict[str, Any]()
        self._open_outside()

    @property
    def names(self) -> list[str]:
        """All blocks, whether or not the model comes to them; those of one list in the order in which they run."""
        return list(self._blocks)

    def next(self) -> str | None:
        """The block whose turn it is: the first of those that are not done that the model comes to. None: no more."""
        return self._run(0)

    def linears(self, block: str) -> list[str]:
        """The modules that were asked for in a block, or OUTSIDE of all."""
        return list(self._linears[block])

    def open(self, block: str) -> None:
        """Reads the weights of a block. What is OUTSIDE needs none: the head is looked at before it would run."""
        if block != OUTSIDE:
            self._places |= self._hollow.read(self._hollow.members[block])
        for module, linear in self._linears[block].items():
            if linear.expert is None:
                self._places[module] = self.model.get_submodule(linear.path)

    def stages(self, block: str) -> list[list[str]]:
        """The modules of an open block in the order in which they run, those together that read the same input; and the
        like of all experts. Those that the first batch does not reach come last."""
        stage_of: dict[str, int] = {}
        inputs: list[Tensor] = []  # what each stage read first

        def read(module: str, x: Tensor) -> None:
            alike = (number for number, seen in enumerate(inputs) if seen is x)
            number = stage_of.setdefault(self._kind(block, module), next(alike, len(inputs)))
            inputs.extend([x] if number == len(inputs) else [])

        self._watch(block, 0, self._linears[block], read)
        stages: dict[int, list[str]] = {}
        for module in self._linears[block]:
            stages.setdefault(stage_of.get(self._kind(block, module), len(inputs)), []).append(module)
        return [stages[number] for number in sorted(stages)]

    def sums(self, block: str) -> dict[str, str]:
        """Where the outputs of an open block's modules are added to others (`sums.py`)."""
        if block == OUTSIDE:
            return {}
        layers = {module: self._places[module] for module in self._single(block, self._linears[block])}
        return sums.find(self._blocks[block], layers, lambda: self.output(block))

    def measure(
        self,
        block: str,
        hessians: Container[str] = (),
        samples: Container[str] = (),
        modules: Iterable[str] | None = None,
        beside: Beside | None = None,
    ) -> dict[str, Stats | None]:
        """Runs the samples through an open block, as far as `modules` (all). None: no token came there.

        hessians, samples: the modules that want these. beside: the model as it was; what is missing to it is then
        measured. Raises ValueError for inputs that are not finite.
        """
        observer = Observer()
        modules = list(self._linears[block] if modules is None else modules)
        for batch in range(len(self._batches)):
            inputs: dict[str, Tensor] = {}

            def read(module: str, x: Tensor, inputs: dict[str, Tensor] = inputs) -> None:
                observer.add(module, x, (module in hessians, module in samples))
                inputs[module] = x

            ends = beside.ends(self._single(block, modules)) if beside else {}
            theirs = beside.original._watch(block, batch, (), None, ends) if beside else {}
            ours = self._watch(block, batch, modules, read, ends)
            for module in theirs.keys() & ours.keys():
                if beside and ours[module].shape[:-1].numel() == self._batches[batch].numel():
                    observer.compare(module, inputs[module], ours[module], beside.there(module, theirs[module]))
            observer.end_pass()
        stats = {module: observer.stats(module) for module in modules}
        for module, measured in stats.items():
            if measured is not None and not measured.second_moment.isfinite().all():
                raise ValueError(f"{module}: its inputs hold NaN or infinity on the calibration text; repair the model")
        return stats

    def _watch(
        self,
        block: str,
        batch: int,
        modules: Iterable[str],
        read: Callable[[str, Tensor], None] | None = None,
        ends: Mapping[str, str | None] | None = None,
    ) -> dict[str, Tensor]:
        """One pass through an open block, as far as it takes. read: is told what `modules` are given.

        ends: modules, with the sum that their output is part of; None for the output alone. Returns these by module.
        """
        ends, found, kept = ends or {}, dict[str, Tensor](), list[Any]()
        waiting = {("in", module) for module in modules} | {("out", module) for module in ends}

        def done(what: str, module: str) -> None:
            waiting.discard((what, module))
            if not waiting:
                raise _Stop(None)

        def before(module: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                if read:
                    read(module, args[0])
                done("in", module)

            return hook

        def after(module: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], *output: Tensor) -> None:
                found[module] = (*args[:1], *output)[-1]
                done("out", module)

            return hook

        hooks = [self._places[module].register_forward_pre_hook(before(module)) for module in modules]
        for module, end in ends.items():
            if end is None:
                hooks.append(self._places[module].register_forward_hook(after(module)))
            elif end != sums.OUTPUT:
                hooks.append(self._blocks[block].get_submodule(end).register_forward_pre_hook(after(module)))
        try:
            if waiting:
                self._run(batch, block, kept)
        finally:
            for handle in hooks:
                handle.remove()
        return found | {module: _tensor(kept[0]) for module, end in ends.items() if end == sums.OUTPUT}

    def _kind(self, block: str, module: str) -> str:
        """What a module has in common with its like of other experts."""
        linear = self._linears[block][module]
        return re.sub(r"\.\d+(?=\.|$)", "", linear.path.removeprefix(block)) if linear.expert is None else linear.path

    def _single(self, block: str, modules: Iterable[str]) -> list[str]:
        """Those that are no experts: to an expert come other tokens once layers before it are compressed."""
        return [module for module in modules if self._linears[block][module].expert is None]

    def folds(self, block: str, kinds: Collection[Kind] = KINDS) -> list[Fold]:
        """The folds of an open block: what can move in it without changing what it computes."""
        config = self.model.config.get_text_config()
        head_dim = getattr(config, "head_dim", None) or _quotient(config, "hidden_size", "num_attention_heads")
        return find(self.model, block, head_dim, kinds, lambda: self.output(block))

    def check(self, block: str, fold: Fold, change: Change) -> None:
        """Raises ValueError where the open block computes something else with this change."""
        check(self.model, fold, change, lambda: self.output(block))

    def output(self, block: str) -> Tensor:
        """What an open block, as it is now, makes of the first batch: float32."""
        kept: list[Any] = []
        self._run(0, block, kept)
        return _tensor(kept[0]).float()

    @property
    def batches(self) -> int:
        """How many parts the samples are run in."""
        return len(self._batches)

    def gives(self, block: str, batch: int) -> Tensor:
        """What an open block, as it is now, makes of a batch: float32, differentiable in what is `replaced`."""
        kept: list[Any] = []
        self._differentiated = torch.is_grad_enabled()
        self._run(batch, block, kept)
        self._differentiated = False
        return _tensor(kept[0]).float()

    def given(self, block: str, batch: int) -> Tensor:
        """What a closed block gave for a batch."""
        return _tensor(torch.load(self._file(block, batch), map_location=self.device, weights_only=True)).float()

    @contextmanager
    def replaced(self, products: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
        """Other products in the place of those with the weights of an open block's modules."""
        places = {module: self._places[module] for module in products}
        for module, place in places.items():
            place.forward = _adding(products[module], getattr(place, "bias", None))
        try:
            yield
        finally:
            for place in places.values():
                del place.forward

    def stored(self, parameter: str) -> str | None:
        """The tensor of the checkpoint that a parameter of the model is."""
        return self._hollow.stored(parameter)

    def is_norm(self, fold: Fold) -> bool:
        """Whether the producer of a fold is a norm, and no linear layer."""
        return is_norm(self.model, fold)

    def put(self, parameter: str, tensor: Tensor) -> None:
        """Replaces a parameter of an open block."""
        self._hollow.put(parameter, tensor)

    def set(self, module: str, weight: Tensor) -> None:
        """weight: (out_features, in_features), what stands for the layer's own from now on."""
        place = self._places[module]
        weight = self._upright(module, weight).contiguous()
        place.weight = nn.Parameter(weight.to(self.device, torch.float32), requires_grad=False)

    def _weight(self, module: str) -> Tensor:
        weight = self._places[module].weight
        assert isinstance(weight, Tensor)
        return weight

    def _upright(self, module: str, weight: Tensor) -> Tensor:
        """A weight as the model has it, or (out_features, in_features): each made of the other."""
        return weight.T if isinstance(self._places[module], Conv1D) else weight

    def close(self, block: str, attentions: Iterable[str] = ()) -> dict[str, Largest]:
        """Runs the samples through a block as it is now, keeps what it gives, and drops its weights.

        attentions: paths of modules of the block. Returns what they cached meanwhile.
        """
        cached = {path: Largest() for path in attentions}
        hooks = [watch(self.model.get_submodule(path), largest.see) for path, largest in cached.items()]
        for batch in range(len(self._batches)):
            kept: list[Any] = []
            self._run(batch, block, kept)
            with replacing(self._file(block, batch)) as unfinished:
                torch.save(_moved(kept[0], torch.device("cpu"), block), unfinished)
        for hook in hooks:
            hook.remove()
        self.drop(block)
        return cached

    def drop(self, block: str) -> None:
        """Forgets the weights of a block."""
        self._hollow.drop(block)
        for module in self._linears[block]:
            del self._places[module]

    def leave(self, blocks: Iterable[str]) -> None:
        """Blocks that were closed, perhaps by another process: they give what the last of them gave then."""
        for block in blocks:
            path = block.rpartition(".")[0]
            for batch in range(len(self._batches)) if path in self._last else ():
                self._file(self._last[path], batch).unlink(missing_ok=True)
            self._leave(block)

    def _leave(self, block: str) -> None:
        path = block.rpartition(".")[0]
        self._last[path], self._batch = block, -1
        self._blocks[block].forward = self._replaying(path)

    def logits(self) -> Iterator[Tensor]:
        """What the head makes of the last block's output, when all blocks are left: (batch, length, vocabulary)."""
        self._open_head()
        for batch in range(len(self._batches)):
            kept: list[Any] = []
            self._run(batch, OUTSIDE, kept)
            yield kept[0]

    def _open_head(self) -> None:
        if self._head is not None:
            self._head.forward = type(self._head).forward.__get__(self._head)
            self._hollow.read(self._hollow.head_members())

    def _replaying(self, path: str) -> Callable[..., Any]:
        return lambda *_, **__: self._output(self._last[path])

    def _run(self, batch: int, block: str = OUTSIDE, kept: list[Any] | None = None) -> str | None:
        """One pass, which ends behind `block` and puts what it gave into `kept`. Returns the block that stopped it."""
        if batch != self._batch:
            self._batch, self._outputs = batch, {}
        ids = self._batches[batch].to(self.device)
        extra = {"decoder_input_ids": ids} if self.model.config.is_encoder_decoder else {}
        if block != OUTSIDE:
            self._blocks[block].forward = _ending(self._blocks[block], kept)
        try:
            with torch.set_grad_enabled(self._differentiated):
                output = self.model(input_ids=ids, **extra)
            if kept is not None:
                kept.append(output.logits)
        except _Stop as stop:
            reached: str | None = stop.args[0]
            return reached
        except (AssertionError, AttributeError, LookupError, TypeError) as error:
            raise ValueError(
                f"{type(self.model).__name__} cannot be run on text alone, one block after the other ({error!r}); "
                "choose a scheme that needs no calibration, or method=rtn"
            ) from error
        return None

    def _output(self, block: str) -> Any:
        """What a closed block gave for the batch that is run."""
        if block not in self._outputs:
            loaded = torch.load(self._file(block, self._batch), mmap=True, weights_only=True)
            self._outputs[block] = _moved(loaded, self.device, block)
        return self._outputs[block]

    def _file(self, block: str, batch: int) -> Path:
        return self._folder / f"{block}.{batch:05d}.pt"

    def _open_outside(self) -> None:
        heads = set(self._hollow.head_members())
        self._hollow.read([name for name in self._hollow.members[OUTSIDE] if name not in heads])
        for path, module in self.model.named_modules():
            if isinstance(module, nn.Embedding) and self._hollow.block_of(path) == OUTSIDE:
                module.register_forward_hook(lambda _, __, output: output.float())
        for name, block in self._blocks.items():
            block.forward = _stopping(name)
        if self._head is not None:
            self._head.forward = _stopping(None)
        if hasattr(self.model, "set_experts_implementation"):
            self.model.set_experts_implementation("eager")  # the others multiply with a whole 3-D parameter at once

    def _check_shared(self) -> None:
        owners: dict[int, str] = {}
        for name, block in self._blocks.items():
            for parameter in block.parameters():
                first = owners.setdefault(id(parameter), name)
                if first != name:
                    raise ValueError(
                        f"{first} and {name} share weights, which cannot be fitted to both; use method=rtn"
                    )

    def ready(self) -> bool:
        """Whether what the blocks that were left gave is all there."""
        files = [self._file(block, batch) for block in self._last.values() for batch in range(len(self._batches))]
        return all(file.exists() and file.stat().st_size for file in files)


@dataclass(frozen=True)
class Beside:
    """The model as it was, with the same block open. sums: of the block. outputs: of a module, what was done to the
    channels that it makes in the model that is compressed."""

    original: Blocks
    sums: Mapping[str, str]
    outputs: Callable[[str], Change | None]

    def ends(self, modules: Iterable[str]) -> dict[str, str | None]:
        """Where the modules' outputs are compared: in a sum, or None for as they are."""
        return {module: self.sums.get(module) for module in modules}

    def there(self, module: str, output: Tensor) -> Tensor:
        """What should be in the place of a module's output."""
        change = self.outputs(module)
        return output if change is None else change.made(output)


def _batches(samples: Tensor) -> list[Tensor]:
    first, each = (max(1, tokens // samples.shape[1]) for tokens in (TRIED_TOKENS, BATCH_TOKENS))
    return [samples[:first], *samples[first:].split(each)[: len(samples[first:])]]


def _stopping(name: str | None) -> Callable[..., Any]:
    def forward(*_: Any, **__: Any) -> Any:
        raise _Stop(name)

    return forward


def _ending(block: nn.Module, kept: list[Any] | None) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        output = type(block).forward(block, *args, **kwargs)
        if kept is not None:
            kept.append(output)
        raise _Stop(None)

    return forward


def _adding(product: Callable[[Tensor], Tensor], bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    return product if bias is None else lambda x: product(x) + bias


def _tensor(output: Any) -> Tensor:
    tensor: Tensor = output if isinstance(output, Tensor) else output[0]
    return tensor


def _quotient(config: Any, whole: str, parts: str) -> int | None:
    a, b = getattr(config, whole, None), getattr(config, parts, None)
    return a // b if a and b else None


def _moved(value: Any, device: torch.device, block: str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_moved(item, device, block) for item in value)
    if value is None:
        return None
    raise ValueError(f"{block} gives a {type(value).__name__}, which calibration cannot keep; choose method=rtn")
