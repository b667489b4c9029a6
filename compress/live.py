"""A loaded model whose stacked weights grow and shrink in place, between forward passes, with the memory at hand."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from compress import sizes
from compress.formats.checkpoint import Checkpoint
from compress.formats.compiled import copied
from compress.kernels.linear import CompressedModule
from compress.placement import Weight
from compress.stack import first_blocks


@dataclass
class _Stacked:
    """One stacked weight of the model. count: its blocks in memory."""

    loaded: CompressedModule
    weight: Weight
    count: int
    _measured: dict[str, list[int]] = field(default_factory=dict)

    @property
    def sizes(self) -> list[int]:
        """Bytes in memory with 1, 2, ... blocks, where it lies now."""
        device = next(iter(self.loaded.tensors().values())).device.type
        if device not in self._measured:
            self._measured[device] = _sizes(self.weight, device)
        return self._measured[device]

    def resize(self, count: int) -> None:
        """Drops its last blocks, or reads the next ones."""
        scheme, kept = self.weight.packed.scheme, self.loaded.tensors()
        device = next(iter(kept.values())).device
        for local, name in self.weight.names.items():
            if self.count <= scheme.block_of(local) < count:
                kept[local] = copied(self.weight.store.read(name), device)
                self.weight.store.release(name)
        self.loaded.replace(scheme, first_blocks(scheme, kept, count))
        self.count = count


class Live:
    """The stacked weights of a model. While it lives, `resize` and forward passes take turns."""

    def __init__(
        self,
        model: PreTrainedModel,
        checkpoint: Checkpoint,
        weights: Mapping[str, Weight],
        loaded: Mapping[str, CompressedModule],
    ) -> None:
        """weights, loaded: by module, where the model runs what is in memory now. checkpoint: where the blocks lie."""
        self._model, self._stacked = model, {}
        for module, weight in weights.items():
            if module in loaded and weight.packed.scheme.stacked:
                count = 1 + max(map(weight.packed.scheme.block_of, loaded[module].tensors()))
                self._stacked[module] = _Stacked(loaded[module], weight, count)
        self._order = _order(checkpoint, {module: stacked.weight for module, stacked in self._stacked.items()})
        self.__setstate__({})
        model.register_forward_pre_hook(self._enter)
        model.register_forward_hook(self._leave, always_call=True)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_turn", "_running")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy of the model takes turns of its own."""
        self.__dict__.update(state)
        self._turn = threading.Condition()
        self._running: dict[int | None, int] = {}  # thread -> passes that it is in; None: blocks are exchanged

    @property
    def bytes(self) -> int:
        """What the model's weights take now, everything counted."""
        return self._fixed() + sum(stacked.sizes[stacked.count - 1] for stacked in self._stacked.values())

    def resize(self, size: int | str) -> int:
        """Holds as many blocks as fit into `size` ("3.2GiB", or bytes), in the order of the checkpoint.

        Returns the bytes that the weights then take, embeddings, head and norms counted in. Waits for forward passes
        to end, and they for it. Raises ValueError for a size below the first block of every weight, naming that, and
        from within a forward pass.
        """
        budget = sizes.parse(size)
        with self._alone():
            least = self._fixed() + sum(stacked.sizes[0] for stacked in self._stacked.values())
            if budget < least:
                raise ValueError(
                    f"max_memory {size} is too small: with one block of each weight the model takes {least} bytes "
                    f"({sizes.show(least)}); give that or more, or a smaller model"
                )
            self._hold(self._fitting(budget - least))
            return self.bytes

    def hold(self, counts: Mapping[str, int]) -> None:
        """Holds so many blocks of each stacked weight, whatever their order in the checkpoint."""
        with self._alone():
            self._hold(counts)

    def _hold(self, counts: Mapping[str, int]) -> None:
        """`hold`, while no thread runs the model."""
        for shrinks in (True, False):  # what is given up first makes room for what is read
            for module, stacked in self._stacked.items():
                if counts[module] != stacked.count and (counts[module] < stacked.count) == shrinks:
                    stacked.resize(counts[module])
            if shrinks:
                _give_back()

    def _fitting(self, room: int) -> dict[str, int]:
        """Blocks of each module, where the later ones may take `room` bytes in all."""
        counts = dict.fromkeys(self._stacked, 1)
        for module in self._order:
            more = self._stacked[module].sizes
            room -= more[counts[module]] - more[counts[module] - 1]
            if room < 0:
                break
            counts[module] += 1
        return counts

    def _fixed(self) -> int:
        """Bytes of everything but the stacked weights; what is shared counts once."""
        ours = {id(tensor) for stacked in self._stacked.values() for tensor in stacked.loaded.tensors().values()}
        every = (*self._model.parameters(), *self._model.buffers())
        storages = [tensor.untyped_storage() for tensor in every if id(tensor) not in ours]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def _enter(self, *_: Any) -> None:
        thread = threading.get_ident()
        with self._turn:
            if thread not in self._running:
                self._turn.wait_for(lambda: None not in self._running)
            self._running[thread] = self._running.get(thread, 0) + 1

    def _leave(self, *_: Any) -> None:
        thread = threading.get_ident()
        with self._turn:
            left = self._running.get(thread, 0) - 1
            if left > 0:
                self._running[thread] = left
            else:
                self._running.pop(thread, None)
            self._turn.notify_all()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While no thread is in a forward pass, and none begins one."""
        with self._turn:
            if threading.get_ident() in self._running:
                raise ValueError("resize was called from within a forward pass; call it between two of them")
            self._turn.wait_for(lambda: None not in self._running)
            self._running[None] = 1
            self._turn.wait_for(lambda: len(self._running) == 1)
        try:
            yield
        finally:
            with self._turn:
                del self._running[None]
                self._turn.notify_all()


def _sizes(weight: Weight, device: str) -> list[int]:
    scheme, specs = weight.packed.scheme, weight.specs()
    counts = range(1, 2 + max(map(scheme.block_of, specs)))
    held = [{name: spec for name, spec in specs.items() if scheme.block_of(name) < count} for count in counts]
    return [sum(spec.bytes for spec in some.values()) + scheme.prepared_bytes(some, device) for some in held]


def _order(checkpoint: Checkpoint, weights: Mapping[str, Weight]) -> list[str]:
    """The modules whose next block it is, in the order of the files."""
    places = {name: place for place, name in enumerate(checkpoint.entries)}
    found = []
    for module, weight in weights.items():
        scheme, reached = weight.packed.scheme, 0
        for block in range(1, 1 + max(map(scheme.block_of, weight.names))):
            # Another writer may have put them into another order; of one weight they stay in theirs.
            stored = [weight.names[local] for local in weight.names if scheme.block_of(local) == block]
            backing = [name for local in stored for name in weight.store.backing[local]]
            reached = max(reached, *(places.get(name, 0) for name in backing))
            found.append((reached, module))
    return [module for _, module in sorted(found, key=lambda item: item[0])]


def _give_back() -> None:
    """Returns freed memory to the system, which allocators would keep for later."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
