"""Every scheme by name. The class is named as text, so that `compress --help` does not import torch."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from compress.scheme import Scheme

SCHEMES = {
    "int4": "compress.int4:Int4",
    "int8": "compress.int8:Int8",
    "fp8": "compress.fp8:Fp8",
    "nf4": "compress.nf4:Nf4",
    "mxfp4": "compress.mx:Mxfp4",
    "mxfp8": "compress.mx:Mxfp8",
    "nvfp4": "compress.nvfp4:Nvfp4",
    "bfp": "compress.bfp:Bfp",
    "kmeans": "compress.kmeans:Kmeans",
    "bitstack": "compress.bitstack:Bitstack",
    "df11": "compress.df11:Df11",
}


def scheme_class(name: str) -> type[Scheme]:
    """scheme_class("int4") -> Int4. Raises ValueError for a name that is not registered."""
    if name not in SCHEMES:
        raise ValueError(f"unknown scheme {name!r}{did_you_mean(name, SCHEMES)}; choose one of {', '.join(SCHEMES)}")
    module, _, cls = SCHEMES[name].partition(":")
    loaded: type[Scheme] = getattr(import_module(module), cls)
    return loaded


def make(name: str, options: Mapping[str, Any] | None = None) -> Scheme:
    """make("int4", {"group_size": "64"}) -> Int4(group_size=64). Text is converted to the option's type."""
    cls, fields = scheme_class(name), _field_types(name)
    parsed = {}
    for key, value in (options or {}).items():
        if key not in fields:
            raise ValueError(
                f"{name} has no option {key!r}{did_you_mean(key, fields)}; its options are {', '.join(fields)}"
            )
        parsed[key] = _parse(f"{name}: {key}", value, fields[key])
    return cls(**parsed)


def describe(name: str) -> dict[str, Any]:
    """A scheme for people: what it is, its options, and with defaults its size on a Gaussian bfloat16 weight."""
    import torch

    cls = scheme_class(name)
    about = (cls.__doc__ or "").strip().split("\n")[0]
    weight = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0)).bfloat16()
    bits = 8 * cls().fit((2048, 2048)).measure(weight) / weight.numel()
    needs = {"lossless": cls.lossless, "needs_calibration": cls().needs_calibration}
    return {"name": name, "about": about, "bits_per_weight": bits, **needs, "options": options(name)}


def options(name: str) -> list[dict[str, Any]]:
    """The options of a scheme: name, type, default, choices (None where any value of the type may be tried)."""
    types = _field_types(name)
    return [
        {
            "name": field.name,
            "type": "str" if get_origin(types[field.name]) is Literal else types[field.name].__name__,
            "default": field.default,
            "choices": list(get_args(types[field.name])) or None,
        }
        for field in dataclasses.fields(scheme_class(name))
    ]


@cache
def _field_types(name: str) -> dict[str, Any]:
    cls = scheme_class(name)
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'int4'?`, or nothing when no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _parse(where: str, value: Any, hint: Any) -> Any:
    if get_origin(hint) is Literal:
        value = str(value)  # 8 is one where "8" is
        if value not in get_args(hint):
            allowed = get_args(hint)
            raise ValueError(f"{where} is {value!r}{did_you_mean(str(value), allowed)}; allowed: {', '.join(allowed)}")
        return value
    if hint is bool:
        known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if str(value).lower() not in known:
            raise ValueError(f"{where} is {value!r}; give true or false")
        return known[str(value).lower()]
    try:
        if isinstance(value, bool) or (isinstance(value, float) and hint is int):  # int() would take either
            raise TypeError
        return hint(value)
    except (TypeError, ValueError):
        raise ValueError(f"{where} is {value!r}; give a value of type {hint.__name__}") from None
