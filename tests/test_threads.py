"""Loops over rows on several threads: every row once, whoever runs them; failures are heard of."""

import os
import threading
from typing import Any

import numpy as np
import pytest
import torch

from compress.formats import threads
from compress.formats.compiled import jit
from compress.formats.threads import in_threads

ROWS = 1003


@jit
def _add(start, stop, x, step, more, out):  # type: ignore[no-untyped-def]
    for row in range(start, stop):
        out[row] += x[row] + step + more[0][row] + more[1]


@jit
def _fail(start, stop, out):  # type: ignore[no-untyped-def]
    for row in range(start, stop):
        if row == 700:
            raise ValueError
        out[row] = 1


@jit
def _give(start, stop):  # type: ignore[no-untyped-def]
    return stop - start


@pytest.fixture(params=["torch", "python"])
def several(request: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """On three threads, of torch and of Python."""
    if request.param == "python":
        monkeypatch.setattr(threads, "_openmp", lambda: 0)
    elif not threads._openmp():
        pytest.skip("torch has no OpenMP of GNU's kind here")
    monkeypatch.setattr(threads, "_SIZE", 0)
    monkeypatch.setattr(threads, "_PYTHON_SIZE", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 12, 13, ROWS])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_row_is_done_once(rows: int, dtype: Any, several: str) -> None:
    x, more, out = np.arange(ROWS, dtype=dtype), np.full(ROWS, 5, np.int64), np.zeros(ROWS, dtype)
    in_threads(_add, rows, 1, x, dtype(0.5), (more, 2), out)
    assert np.array_equal(out[:rows], x[:rows] + 7.5) and not out[rows:].any()


def test_views_are_read_as_such(several: str) -> None:
    """A loop is compiled for where its arrays lie: rows apart, read-only."""
    x, out = np.arange(2 * ROWS, dtype=np.float32)[::2], np.zeros(ROWS, np.float32)
    x.flags.writeable = False
    in_threads(_add, ROWS, 1, x, np.float32(1), (np.zeros(ROWS, np.int64), 0), out)
    assert np.array_equal(out, x + 1)


def test_a_part_that_fails_fails_the_loop(several: str) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        in_threads(_fail, ROWS, 1, np.zeros(ROWS, np.float32))


def test_what_may_be_of_several_types_is_refused(several: str) -> None:
    if several == "torch":
        for value in (np.memmap, _add, slice(1)):
            with pytest.raises(TypeError, match="loops are not given"):
                in_threads(_add, ROWS, 1, value)


def test_loops_of_one_factory_have_names_of_their_own() -> None:
    """Machine code is found by name, also that which another process has left in the cache."""

    def made(add: Any) -> Any:
        @jit
        def loop(start, stop, out):  # type: ignore[no-untyped-def]
            for row in range(start, stop):
                out[row] = add

        return loop

    names = []
    for add in (1, 2, (3, 4)[1]):
        loop, out = made(add), np.zeros(4, np.int64)
        loop(0, 4, out)
        assert out.tolist() == [add] * 4
        names.append(next(iter(loop.overloads.values())).fndesc.qualname)
    assert len(set(names)) == 3 and names[0] == made(1).__qualname__
    with pytest.raises(TypeError, match="encloses more than numbers"):
        made(_add)


def test_a_loop_that_returns_something_is_refused(several: str) -> None:
    if several == "torch":
        with pytest.raises(TypeError, match="_give returns something"):
            in_threads(_give, ROWS, 1)


def test_many_threads_run_loops_at_once(several: str) -> None:
    def work(found: list[bool]) -> None:
        torch.set_num_threads(2)
        for number in range(50):
            out = np.zeros(ROWS, np.float32)
            in_threads(_add, ROWS, 1, out, np.float32(number), (np.zeros(ROWS, np.int64), 1), out)
            found.append(bool((out == number + 1).all()))

    found: list[bool] = []
    workers = [threading.Thread(target=work, args=(found,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == [True] * 150


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_forked_child_still_runs_them(several: str) -> None:
    """OpenMP's threads are not there in a child."""
    out = np.zeros(ROWS, np.float32)
    arguments = (np.zeros(ROWS, np.float32), np.float32(1), (np.zeros(ROWS, np.int64), 0), out)
    in_threads(_add, ROWS, 1, *arguments)
    child = os.fork()
    if child == 0:
        in_threads(_add, ROWS, 1, *arguments)
        os._exit(0 if (out == 2).all() else 1)
    assert os.waitpid(child, 0)[1] == 0
