"""Which option to take of each of several sets, so that all fit into a number of bytes and little is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """bytes: what it takes. loss: what it costs, to be added up."""

    bytes: int
    loss: float


def allocate(sets: Sequence[Sequence[Option]], room: int) -> list[int]:
    """The number of an option for each set, together of at most `room` bytes.

    From the smallest of each set, steps along the lower convex hulls of (bytes, loss) are taken as long as they fit,
    those that save most per byte first: without a rest this is the optimum. Then, while one fits, the step to any other
    option that saves most. Never worse than the same number for all sets, where they have that and it fits. The first
    of equals is taken, so the result is determined. Raises ValueError where `room` is less than the smallest take.
    """
    hulls = [_hull(options) for options in sets]
    chosen = [hull[0] for hull in hulls]
    left = room - _bytes(sets, chosen)
    if left < 0:
        raise ValueError(f"{room} bytes are too few; the smallest options take {room - left}")
    steps = [(number, a, b) for number, hull in enumerate(hulls) for a, b in zip(hull, hull[1:], strict=False)]
    for number, a, b in sorted(steps, key=lambda step: -_rate(sets[step[0]][step[1]], sets[step[0]][step[2]])):
        size = sets[number][b].bytes - sets[number][a].bytes
        if chosen[number] == a and size <= left:
            chosen[number], left = b, left - size
    while (step := _best_step(sets, chosen, left)) is not None:
        number, option = step
        left -= sets[number][option].bytes - sets[number][chosen[number]].bytes
        chosen[number] = option
    same = uniform(sets, room)
    return min([chosen, *([] if same is None else [[same] * len(sets)])], key=lambda c: loss(sets, c))


def uniform(sets: Sequence[Sequence[Option]], room: int) -> int | None:
    """The number that loses least where all sets take it; None where none fits."""
    alike = ([number] * len(sets) for number in range(min(map(len, sets), default=0)))
    fitting = [same for same in alike if _bytes(sets, same) <= room]
    return min(fitting, key=lambda same: loss(sets, same))[0] if fitting else None


def loss(sets: Sequence[Sequence[Option]], chosen: Sequence[int]) -> float:
    """Of all sets together."""
    return sum(options[number].loss for options, number in zip(sets, chosen, strict=True))


def _bytes(sets: Sequence[Sequence[Option]], chosen: Sequence[int]) -> int:
    return sum(options[number].bytes for options, number in zip(sets, chosen, strict=True))


def _rate(a: Option, b: Option) -> float:
    """What is saved per byte."""
    return (a.loss - b.loss) / (b.bytes - a.bytes)


def _hull(options: Sequence[Option]) -> list[int]:
    """Numbers from the smallest option on, each larger and better than the one before, at falling rates."""
    hull: list[int] = []
    for number in sorted(range(len(options)), key=lambda n: (options[n].bytes, options[n].loss)):
        option = options[number]
        if hull and option.loss >= options[hull[-1]].loss:
            continue
        while len(hull) > 1 and _rate(options[hull[-1]], option) >= _rate(options[hull[-2]], options[hull[-1]]):
            hull.pop()
        hull.append(number)
    return hull


def _best_step(sets: Sequence[Sequence[Option]], chosen: Sequence[int], left: int) -> tuple[int, int] | None:
    """The set, and its option that saves most in it or any other; None where none that fits saves anything."""
    fitting = [
        (options[now].loss - option.loss, number, place)
        for number, (options, now) in enumerate(zip(sets, chosen, strict=True))
        for place, option in enumerate(options)
        if option.bytes - options[now].bytes <= left and option.loss < options[now].loss
    ]
    return max(fitting, key=lambda step: step[0])[1:] if fitting else None
