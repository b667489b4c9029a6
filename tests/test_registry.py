"""Scheme names and options: every mistake is answered with what would have been right."""

import pytest

from compress import sizes
from compress.int4 import Int4
from compress.registry import SCHEMES, make, options


def test_text_becomes_the_type_of_the_option() -> None:
    made = make("int4", {"bits": "3", "symmetric": "false", "clip": "absmax"})
    assert made == Int4(bits=3, symmetric=False, clip="absmax")


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("in4", {}, "did you mean 'int4'"),
        ("nothing", {}, "choose one of int4"),
        ("int4", {"groupsize": 64}, "did you mean 'group_size'"),
        ("int4", {"bits": "four"}, "give a value of type int"),
        ("int4", {"bits": True}, "give a value of type int"),
        ("int4", {"bits": "12"}, "give 2 to 8"),
        ("int4", {"symmetric": "maybe"}, "give true or false"),
        ("int4", {"clip": "absmix"}, "did you mean 'absmax'"),
        ("fp8", {"granularity": "row"}, "allowed: channel, tensor, block"),
    ],
)
def test_a_mistake_is_answered(name: str, given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(name, given)


def test_options_are_described_with_type_default_and_choices() -> None:
    described = {option["name"]: option for option in options("int4")}
    assert described["bits"] == {"name": "bits", "type": "int", "default": 4, "choices": None}
    assert described["clip"]["choices"] == ["mse", "absmax"]
    assert all(make(name) for name in SCHEMES)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5", 5), (7, 7), ("3.5KB", 3500), ("2 KiB", 2048), ("1GiB", 1 << 30), ("3.2gb", 3_200_000_000), ("10B", 10)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert sizes.parse(text) == size


@pytest.mark.parametrize("text", ["", "big", "5XB", "-3", "1e9", "GiB", "9" * 400])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not understood"):
        sizes.parse(text)


def test_sizes_are_shown() -> None:
    assert [sizes.show(size) for size in (0, 1023, 1536, 5 << 30)] == ["0 B", "1023 B", "1.50 KiB", "5.00 GiB"]
