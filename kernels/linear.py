"""CompressedLinear: the module that stands in for `nn.Linear`, whatever the scheme."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import is_not
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from compress.formats.compiled import copied
from compress.kernels import cpu
from compress.kernels.op import Layout, Packed
from compress.kernels.prepared import Prepared


class RunningScheme(Protocol):
    """What a scheme must do to run. `prepare` makes of the stored tensors what the others take."""

    def prepare(self, tensors: dict[str, Tensor]) -> Any: ...

    def decode(self, tensors: Any) -> Tensor: ...

    def rows(self, tensors: Any, index: Tensor) -> Tensor: ...

    def dtype_of(self, tensors: dict[str, Tensor]) -> torch.dtype: ...

    def linear(self, x: Tensor, tensors: Any, bias: Tensor | None = None) -> Tensor: ...

    def dense(self, x: Tensor, tensors: Any, bias: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Stored:
    """A weight as its tensors are stored, for operators: the scheme that knows them is in `_SCHEMES` by its text."""

    tensors: tuple[Tensor, ...]
    names: tuple[str, ...]
    scheme: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    running: ClassVar[Any] = None  # what its layer on a CPU multiplies with: operators are not given it

    @property
    def known(self) -> RunningScheme:
        """Raises RuntimeError where no layer of this scheme was prepared."""
        if self.scheme not in _SCHEMES:
            raise RuntimeError(
                f"{self.scheme}: this was exported by another process; export what `compress export` decodes"
            )
        return _SCHEMES[self.scheme]

    def decode(self) -> Tensor:
        return self.known.decode(self._named)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """As the layer that has these tensors multiplies uncompiled."""
        y = cpu.multiply(x, self.running, bias, lambda x: self.known.dense(x, self._named))
        return self.known.dense(x, self._named, bias) if y is None else y

    @property
    def _named(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.tensors, strict=True))


_SCHEMES: dict[str, RunningScheme] = {}
STORED = Layout("stored", Stored, Stored.decode, lambda x, weight, bias: weight.linear(x, bias))


_NOT_PREPARED = "a compressed layer is not prepared; run it once, then give it to torch.compile"
_NOT_TRACED = "torch.export and torch.jit.trace take no packed weights; export what `compress export` decodes"


class CompressedModule(nn.Module):
    """The packed tensors of one weight, as buffers, and the scheme that knows what they mean."""

    def __init__(self, scheme: RunningScheme, shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> None:
        """shape: of the weight. tensors: by local name, on any device, "meta" before loading."""
        super().__init__()
        self.shape = torch.Size(shape)
        self.replace(scheme, tensors)

    def replace(self, scheme: RunningScheme, tensors: Mapping[str, Tensor]) -> None:
        """Puts other tensors of the same weight, with the scheme that knows them, in the place of these."""
        self._buffers.clear()
        self.scheme, self.local_names = scheme, tuple(tensors)
        self.is_filled = not any(tensor.is_meta for tensor in tensors.values())
        self._prepared: tuple[list[Tensor], Any, Prepared] | None = None
        for name, tensor in tensors.items():
            self.register_buffer(_attribute(name), tensor)

    def tensors(self) -> dict[str, Tensor]:
        """The packed tensors by local name."""
        return {name: self._buffers[_attribute(name)] for name in self.local_names}  # type: ignore[misc]

    def running(self) -> Any:
        """What the scheme runs on: made of the packed tensors once, as long as these stay the same ones.

        Raises ValueError under torch.jit.trace, and under torch.export where that has put others in their place.
        """
        is_stale = self._prepared is None or any(map(is_not, self._buffers.values(), self._prepared[0]))
        if torch.jit.is_tracing() or (is_stale and torch.compiler.is_exporting()):  # type: ignore[attr-defined]
            raise ValueError(_NOT_TRACED)
        if is_stale:
            self._prepare(self.tensors())
        assert self._prepared is not None
        return self._prepared[2 if torch.compiler.is_compiling() else 1]

    @torch.compiler.disable(reason=_NOT_PREPARED)  # type: ignore[untyped-decorator]
    def _prepare(self, tensors: dict[str, Tensor]) -> None:
        found = self.scheme.prepare(tensors)
        self._prepared = (list(tensors.values()), found, self._traceable(found))

    def _traceable(self, found: Any) -> Prepared:
        """What torch.compile can look into, of what the scheme runs on."""
        if isinstance(found, Prepared):
            return found
        name, dtype = repr(self.scheme), self.scheme.dtype_of(found)
        _SCHEMES[name] = self.scheme
        weight = Stored(tuple(found.values()), tuple(found), name, tuple(self.shape), dtype)
        if isinstance(found, cpu.Prepared):
            object.__setattr__(weight, "running", found)
        packed = Packed(STORED, weight)
        packed.input_scale = found.get("input_scale")
        return packed

    def __getstate__(self) -> dict[str, Any]:
        """For copies and files: without what was made of the packed tensors, which a copy has of its own."""
        return {**self.__dict__, "_prepared": None}

    def fill(self, name: str, tensor: Tensor) -> None:
        """Puts a copy of a loaded tensor where the local tensor `name` lies; one on "meta" is made on the CPU."""
        current = self.tensors()[name]
        device = "cpu" if current.is_meta else current.device
        setattr(self, _attribute(name), copied(tensor, device))
        self._prepared = None

    def decode(self) -> Tensor:
        """The weight, decoded anew at every call; without memory as long as its tensors are not filled.

        A model's own initialisation looks at weights before they are loaded.
        """
        return self.scheme.decode(self.running()) if self.is_filled else torch.empty(self.shape, device="meta")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompressedModule:
        """Moves the packed tensors and never casts them: `model.to(dtype)` is no statement on how they are stored."""
        self._prepared, packed = None, dict(self._buffers)
        moved: dict[str, Tensor | None] = {}
        for name, buffer in packed.items():
            assert buffer is not None
            device = fn(torch.empty(0, dtype=torch.uint8, device=buffer.device)).device
            moved[name] = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
        self._buffers.clear()
        try:
            super()._apply(fn, recurse)
        except BaseException:
            moved = packed  # where there is no room for it, the module stays what it was
            raise
        finally:
            self._buffers.update(moved)
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._prepared = None
        super()._load_from_state_dict(*arguments)


class CompressedLinear(CompressedModule):
    """A linear layer on packed tensors: y = x @ W.T + bias with W = scheme.decode(tensors)."""

    def __init__(
        self,
        scheme: RunningScheme,
        shape: tuple[int, int],
        tensors: Mapping[str, Tensor],
        bias: nn.Parameter | None = None,
    ) -> None:
        """shape: (out_features, in_features). tensors: as in `CompressedModule`."""
        super().__init__(scheme, shape, tensors)
        self.out_features, self.in_features = shape
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """(out_features, in_features): decoded anew at every access."""
        return self.decode()

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise ValueError(f"x is {x.dtype}; compressed layers multiply floating-point numbers")
        return self.scheme.linear(x, self.running(), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme}"


def _attribute(name: str) -> str:
    # `weight` is what other code calls the decoded weight; fp8 stores one of that name.
    return "qweight" if name == "weight" else name


def meta(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor without memory, to be filled when its checkpoint is read."""
    return torch.empty(shape, dtype=dtype, device="meta")
