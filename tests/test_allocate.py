"""Which option of each set: by hand, and beside every choice there is."""

import random
from itertools import product

import pytest

from compress.allocate import Option, allocate, loss


def options(*pairs: tuple[int, float]) -> list[Option]:
    return [Option(*pair) for pair in pairs]


def test_steps_that_save_most_per_byte_come_first() -> None:
    a, b = options((1, 8.0), (2, 4.0), (3, 3.0)), options((2, 5.0), (4, 1.0), (6, 0.0))
    found = {room: allocate([a, b], room) for room in range(3, 11)}
    # 4 saved for a byte, then 4 for two, then 1 for one, then 1 for two
    assert [found[room] for room in (3, 4, 6, 7, 9, 10)] == [[0, 0], [1, 0], [1, 1], [2, 1], [2, 2], [2, 2]]
    assert found[5] == [2, 0]  # what is left takes the step that fits
    assert found[8] == [2, 1]


def test_an_option_above_the_hull_fills_what_is_left() -> None:
    assert allocate([options((0, 10.0), (4, 9.0), (10, 0.0))], 9) == [1]
    assert allocate([options((0, 10.0), (4, 9.0), (10, 0.0))], 10) == [2]


def test_what_is_larger_and_no_better_is_not_taken() -> None:
    assert allocate([options((1, 1.0), (2, 1.0), (3, 2.0))], 100) == [0]
    assert allocate([options((1, 3.0), (1, 1.0), (1, 2.0))], 1) == [1]
    assert allocate([], 0) == []


def test_equals_go_to_the_first() -> None:
    same = options((1, 2.0), (2, 1.0))
    assert allocate([same, same, same], 5) == [1, 1, 0]


def test_too_little_room_is_refused_with_the_least() -> None:
    with pytest.raises(ValueError, match="smallest options take 3"):
        allocate([options((1, 1.0), (5, 0.0)), options((2, 1.0))], 2)


def test_beside_every_choice() -> None:
    missed = []
    for seed in range(500):
        draw = random.Random(seed)
        count = draw.randint(2, 4)
        sets = [
            [Option(draw.randint(1, 20), float(draw.choice([draw.random(), draw.randint(0, 3)]))) for _ in range(count)]
            for _ in range(draw.randint(1, 4))
        ]
        least, most = (sum(pick(option.bytes for option in one) for one in sets) for pick in (min, max))
        room = draw.randint(least, most + 2)

        def size(chosen: tuple[int, ...], sets: list[list[Option]] = sets) -> int:
            return sum(one[number].bytes for one, number in zip(sets, chosen, strict=True))

        found = allocate(sets, room)
        fitting = [chosen for chosen in product(range(count), repeat=len(sets)) if size(chosen) <= room]
        assert tuple(found) in fitting and found == allocate(sets, room)
        alike = [loss(sets, chosen) for chosen in fitting if len(set(chosen)) == 1]
        assert loss(sets, found) <= min(alike, default=float("inf"))
        best = min(loss(sets, chosen) for chosen in fitting)
        missed.append(loss(sets, found) - best)
        if room >= most:
            assert missed[-1] < 1e-9
    assert sum(gap < 1e-9 for gap in missed) > 450  # greedy, but nearly always the best there is
