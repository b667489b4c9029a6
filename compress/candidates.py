"""Candidates: several schemes that are named together, as text."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.registry import make

if TYPE_CHECKING:
    from compress.scheme import Scheme

WIDTHS = ("bits", "mantissa_bits")  # what schemes call the option


@dataclass(frozen=True)
class Candidate:
    """A scheme and its options as text, one of several that are named together."""

    scheme: str
    options: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, scheme: Scheme, known: Collection[str] = ()) -> Candidate:
        """With the options that are not at their defaults, but for those of which it is `known` what they are."""
        fields = {field.name: field.default for field in dataclasses.fields(scheme) if field.name not in known}
        values = {name: getattr(scheme, name) for name in fields}
        return cls(scheme.name, tuple((n, str(value).lower()) for n, value in values.items() if value != fields[n]))

    @property
    def name(self) -> str:
        """Of the directory that it is written to."""
        return "-".join([self.scheme, *(f"{key}={value}" for key, value in self.options)])

    @property
    def text(self) -> str:
        """As `parse` takes it."""
        return ":".join([self.scheme, *(f"{key}={value}" for key, value in self.options)])

    @property
    def arguments(self) -> list[str]:
        """As `compress quantize` takes them."""
        return ["--scheme", self.scheme, *(word for pair in self.options for word in ("--set", "=".join(pair)))]


def parse(text: str, where: str = "--schemes") -> list[Candidate]:
    """ "int4:bits=3,fp8": schemes separated by commas, each with its options behind colons. where: for messages."""
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        scheme, *options = part.split(":")
        for option in options:
            if not re.fullmatch(r"\w+=[\w.+-]+", option):
                raise ValueError(f"{where} {part}: {option!r} is no KEY=VALUE; write for example int4:bits=3")
        pairs = tuple((key, value) for key, _, value in (option.partition("=") for option in options))
        found.append(Candidate(scheme, pairs))
    if not found:
        raise ValueError(f"{where}: none is named; write for example int4,int4:bits=3,fp8")
    if len(set(found)) < len(found):
        raise ValueError(f"{where} {text}: one of them is named twice")
    return found


def candidates(text: str, options: Mapping[str, Any]) -> tuple[Scheme, ...]:
    """The schemes that `text` names, as `parse` reads it; or where it is a single one, every width of that.

    options: of the single one. Raises ValueError for those whose size is not known from a weight's shape, or can be
    chosen later.
    """
    listed = parse(text, "--scheme")
    if len(listed) == 1 and "," in text:
        raise ValueError(f"--scheme {text}: one is listed; name several, or leave out the comma for all its widths")
    if len(listed) > 1 and options:
        raise ValueError(f"{', '.join(options)}: of several schemes each has its own options, for example int4:bits=3")
    if len(listed) > 1:
        found = [make(candidate.scheme, dict(candidate.options)) for candidate in listed]
    else:
        found = _widths(listed[0].scheme, {**dict(listed[0].options), **options})
    for scheme in found:
        if scheme.stacked:
            raise ValueError(
                f"--target-size: {scheme.name} has any size; quantize with it, then `compress trim --size`"
            )
        if scheme.sized_by_data:
            raise ValueError(
                f"--target-size: what {scheme.name} takes depends on the values; name weights for it in a --recipe"
            )
    return tuple(dict.fromkeys(found))


def _widths(name: str, options: Mapping[str, Any]) -> list[Scheme]:
    """The scheme with every number of bits that its other options allow."""
    made = make(name, options)
    option = next((option for option in WIDTHS if hasattr(made, option)), None)
    if option in options:
        raise ValueError(f"--target-size: {option} of {name} is what it chooses; leave it out, or name several schemes")
    found = [] if option is None else list(_valid(made, option))
    if len(set(found)) < 2 and not (made.stacked or made.sized_by_data):
        raise ValueError(f"--target-size: {name} has one width only; name several, for example int4:bits=3,int4,{name}")
    return found or [made]


def _valid(scheme: Scheme, option: str) -> Iterator[Scheme]:
    for bits in range(1, 17):
        try:
            yield dataclasses.replace(scheme, **{option: bits})
        except ValueError:  # no width that it has
            continue
