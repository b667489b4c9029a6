"""Items of the `builtin_cloze` task: a passage and four continuations, all cut from one text."""

from collections.abc import Callable
from dataclasses import dataclass

ITEMS = 128
CHOICES = 4
# Characters of passage and continuation; both shrink together until the longest item fits the context.
_PASSAGE, _CONTINUATION = 160, 48
_SHRINK = 3 / 4
_SHORTEST = 4


@dataclass(frozen=True)
class Item:
    """A passage, four continuations with their leading spaces, and which of them is the true one."""

    passage: str
    choices: tuple[str, ...]
    label: int


def items(text: str, context: int, count_tokens: Callable[[str], int]) -> list[Item]:
    """Up to 128 items evenly spaced over the text, each at most `context` tokens long.

    The three wrong choices are the true continuations of three other items, so that a choice's own likelihood says
    nothing about the label. White space is collapsed to single spaces first. The same text gives the same items.
    """
    text = " ".join(text.split())
    passage, continuation = _PASSAGE, _CONTINUATION
    while True:
        pairs = _pairs(text, passage, continuation)
        found = [_item(pairs, i) for i in range(len(pairs))]
        if all(count_tokens(f"{item.passage}{choice}") <= context for item in found for choice in item.choices):
            return found
        passage, continuation = int(passage * _SHRINK), int(continuation * _SHRINK)
        if continuation < _SHORTEST:
            raise ValueError(f"task builtin_cloze: a context of {context} tokens is too short for any item")


def _pairs(text: str, passage: int, continuation: int) -> list[tuple[str, str]]:
    """(passage, true continuation) by distinct continuation; cut at spaces where there are any."""
    count = min(ITEMS, len(text) // (passage + continuation))
    pairs: dict[str, str] = {}
    for i in range(count):
        start = i * len(text) // count
        if start:
            start = text.find(" ", start, start + passage // 2) + 1 or start
        middle = _cut(text, start, start + passage)
        end = _cut(text, middle, middle + continuation)
        if end > middle:
            pairs.setdefault(text[middle:end], text[start:middle])
    if len(pairs) < CHOICES:
        raise ValueError(
            f"task builtin_cloze: {len(text)} characters of text are too few for {CHOICES} different continuations; "
            "pass a longer text or other tasks"
        )
    return [(before, after) for after, before in pairs.items()]


def _cut(text: str, start: int, end: int) -> int:
    """The last space in (start, end], or end itself in text without spaces."""
    return end if (space := text.rfind(" ", start + 1, end + 1)) < 0 else space


def _item(pairs: list[tuple[str, str]], i: int) -> Item:
    """Item i: its own continuation and those a quarter, a half and three quarters of the list further on."""
    others = [(i + len(pairs) * k // CHOICES) % len(pairs) for k in range(CHOICES)]
    label = i % CHOICES
    order = others[CHOICES - label :] + others[: CHOICES - label]
    return Item(pairs[i][0], tuple(pairs[j][1] for j in order), label)
