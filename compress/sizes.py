"""Sizes as people write them."""

from __future__ import annotations

import re


def parse(size: int | str) -> int:
    """Bytes: an integer, or text such as "3.2GiB" (2**30) or "3.2GB" (10**9)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B|B)?\s*", str(size), re.IGNORECASE)
    if not match or not 0 < float(match[1]) < 1e30:
        raise ValueError(f"size {size!r} is not understood; write bytes, or for example 3.2GiB or 3.2GB")
    number, unit, binary = match.groups()
    power = "KMGT".index(unit.upper()) + 1 if unit else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def show(size: int) -> str:
    """show(3_435_973_836) -> "3.20 GiB"."""
    value, units = float(size), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{size} B" if units[0] == "B" else f"{value:.2f} {units[0]}"
