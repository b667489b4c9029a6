"""kill -9 at every point at which a run changes the disk; then the same command again, to the same bytes.

This file is also the process that is killed: it imports the libraries once, and forks a child for each command.
"""

import contextlib
import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from compress.job import Job

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}  # the audit events; `open` for writing is the other one
MEASURED = {"seconds", "peak_rss_bytes", "sha256", "tokens_per_second"}


class Server:
    """Runs commands in forked children of one process, killed on the way where that is asked for."""

    def __init__(self, warm: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, __file__, str(warm)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, *command: object, watch: Path, kill_at: int = 0, tear: bool = False) -> dict[str, Any]:
        """watch: only changes below it count. kill_at: dies before that change, from 1. tear: dies at that fsync, with
        half of the file lost. Returns code, stderr, killed, and the changes."""
        request = {"command": [str(part) for part in command], "watch": str(watch), "kill_at": kill_at, "tear": tear}
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(shutil.copytree(tiny_model("one-layer"), tmp_path_factory.mktemp("source") / "model"))
    (path / "README.md").write_text("# A model\n")
    return path


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    server = Server(model)
    yield server
    server.close()


def contents(directory: Path) -> dict[str, Any]:
    """Every file: its bytes, or for report.json what is not measured."""
    found: dict[str, Any] = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            found[path.relative_to(directory).as_posix()] = path.read_bytes()
    if "report.json" in found:
        found["report.json"] = _unmeasured(json.loads(found["report.json"]))
    return found


def _unmeasured(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unmeasured(item) for key, item in value.items() if key not in MEASURED}
    if isinstance(value, list):
        return [_unmeasured(item) for item in value]
    return value


def stamps(directory: Path) -> dict[Path, tuple[bytes, int]]:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.rglob("*") if path.is_file()}


def quantize(model: Path, out: Path, *options: str) -> list[object]:
    return ["quantize", model, "-o", out, "--scheme", "fp8", "--no-eval", "--shard-size", "8KB", *options]


@pytest.fixture(scope="module")
def uninterrupted(server: Server, model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The output's place, which is the same in every test since the card names it, and what belongs there."""
    out = tmp_path_factory.mktemp("result") / "out"
    done = server.run(*quantize(model, out), watch=out.parent)
    assert done["code"] == 0, done["stderr"]
    expected = contents(out)
    assert sum(name.endswith(".safetensors") for name in expected) >= 3
    shutil.rmtree(out)
    return out, expected


def test_killed_before_any_change_of_the_disk(
    server: Server, model: Path, uninterrupted: tuple[Path, dict[str, Any]]
) -> None:
    out, expected = uninterrupted
    before = stamps(model)
    point = 0
    while True:
        point += 1
        first = server.run(*quantize(model, out), watch=out.parent, kill_at=point)
        if not first["killed"]:
            break
        where = (point, first["changes"][-1])
        # The output is either not there or whole.
        assert not out.exists() or contents(out) == expected, where
        again = server.run(*quantize(model, out), watch=out.parent)
        # In the last removals the run is over: the command finds its own output there.
        assert again["code"] == 0 or (again["code"] == 2 and "exists" in again["stderr"]), (where, again["stderr"])
        assert contents(out) == expected, where
        assert [path.name for path in out.parent.iterdir()] == ["out"], where
        shutil.rmtree(out)
    assert point > 40 and first["code"] == 0
    assert stamps(model) == before
    shutil.rmtree(out)


def test_killed_with_half_a_file_on_disk(
    server: Server, model: Path, uninterrupted: tuple[Path, dict[str, Any]]
) -> None:
    out, expected = uninterrupted
    for point in range(1, 100, 3):
        first = server.run(*quantize(model, out), watch=out.parent, kill_at=point, tear=True)
        if not first["killed"]:
            break
        assert server.run(*quantize(model, out), watch=out.parent)["code"] == 0
        assert contents(out) == expected, point
        shutil.rmtree(out)
    assert point > 10
    shutil.rmtree(out)


def test_killed_again_and_again(server: Server, model: Path, uninterrupted: tuple[Path, dict[str, Any]]) -> None:
    out, expected = uninterrupted
    for patience in range(10, 200, 3):
        if not server.run(*quantize(model, out), watch=out.parent, kill_at=patience)["killed"]:
            break
    assert contents(out) == expected
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    shutil.rmtree(out)


def test_killed_while_an_old_output_is_replaced(
    server: Server, model: Path, uninterrupted: tuple[Path, dict[str, Any]]
) -> None:
    out, _ = uninterrupted
    old = {"config.json": b"{}", "model.safetensors": b"the old weights", "sub/file": b"old too"}
    command = quantize(model, out, "--overwrite")
    _write(out, old)
    whole = server.run(*command, watch=out.parent)
    expected, total = contents(out), len(whole["changes"])
    last = [i for i, change in enumerate(whole["changes"], 1) if "done.json" in change][0]
    for point in [1, 2, 5, 20, *range(last - 1, total + 1)]:
        shutil.rmtree(out)
        _write(out, old)
        first = server.run(*command, watch=out.parent, kill_at=point)
        assert first["killed"]
        where = (point, first["changes"][-1])
        there = contents(out) if out.exists() else contents(out.with_name("out.partial") / "replaced")
        assert there in (old, expected), where
        assert server.run(*command, watch=out.parent)["code"] == 0, where
        assert contents(out) == expected, where
        assert [path.name for path in out.parent.iterdir()] == ["out"], where
    shutil.rmtree(out)


def test_another_command_gives_back_the_output_that_was_being_replaced(
    server: Server, model: Path, uninterrupted: tuple[Path, dict[str, Any]]
) -> None:
    out, _ = uninterrupted
    old = {"config.json": b"{}", "model.safetensors": b"the old weights"}
    _write(out, old)
    command = quantize(model, out, "--overwrite")
    changes = server.run(*command, watch=out.parent)["changes"]
    moved = [i for i, change in enumerate(changes, 1) if change.startswith("os.rename") and "checkpoint" in change][-1]
    shutil.rmtree(out)
    _write(out, old)
    assert server.run(*command, watch=out.parent, kill_at=moved)["killed"]
    assert not out.exists()
    other = server.run(*quantize(model, out, "--seed", "1"), watch=out.parent)
    assert other["code"] == 2 and "--overwrite" in other["stderr"]
    assert contents(out) == old
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    shutil.rmtree(out)


def test_another_command_starts_afresh(server: Server, model: Path, uninterrupted: tuple[Path, dict[str, Any]]) -> None:
    out, expected = uninterrupted
    whole = server.run(*quantize(model, out, "--set", "granularity=tensor"), watch=out.parent)
    assert whole["code"] == 0, whole["stderr"]
    other = contents(out)
    assert other != expected
    for point in range(8, len(whole["changes"]), 9):
        shutil.rmtree(out)
        assert server.run(*quantize(model, out), watch=out.parent, kill_at=point)["killed"]
        done = server.run(*quantize(model, out, "--set", "granularity=tensor"), watch=out.parent)
        if done["code"] == 0:
            assert contents(out) == other, point
        else:  # the first command had finished but for its tidying up
            assert contents(out) == expected and "exists" in done["stderr"], point
    shutil.rmtree(out)


def test_a_run_whose_sizes_depend_on_the_values_goes_on_too(server: Server, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = quantize(model, out, "--scheme", "df11")
    whole = server.run(*command, watch=tmp_path)
    assert whole["code"] == 0, whole["stderr"]
    expected = contents(out)
    for point in range(5, len(whole["changes"]), 7):
        shutil.rmtree(out)
        assert server.run(*command, watch=tmp_path, kill_at=point)["killed"]
        again = server.run(*command, watch=tmp_path)
        assert again["code"] == 0 or "exists" in again["stderr"], (point, again["stderr"])
        assert contents(out) == expected, point


def test_killed_around_the_scoring(server: Server, llama_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--tasks", "", "--limit", "1", "--window", "16")
    command = ["quantize", llama_dir, "-o", out, "--scheme", "fp8", *options]
    whole = server.run(*command, watch=tmp_path)
    assert whole["code"] == 0, whole["stderr"]
    expected, changes = contents(out), whole["changes"]
    noted = [i for i, change in enumerate(changes, 1) if "evaluation.json" in change]
    for point in (noted[0], noted[1] + 1):  # scored but not noted; noted
        shutil.rmtree(out)
        assert server.run(*command, watch=tmp_path, kill_at=point)["killed"]
        again = server.run(*command, watch=tmp_path)
        assert again["code"] == 0, again["stderr"]
        assert contents(out) == expected


def test_export_killed_before_any_change_of_the_disk(server: Server, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "plain"
    command = ["export", model, "--to", "fp32", "-o", out]
    whole = server.run(*command, watch=tmp_path)
    assert whole["code"] == 0, whole["stderr"]
    expected = contents(out)
    for point in range(1, len(whole["changes"]) + 1, 2):
        shutil.rmtree(out)
        assert server.run(*command, watch=tmp_path, kill_at=point)["killed"]
        again = server.run(*command, watch=tmp_path)
        assert again["code"] == 0 or "exists" in again["stderr"], point
        assert contents(out) == expected, point
        assert [path.name for path in tmp_path.iterdir()] == ["plain"], point


def test_two_runs_at_once(server: Server, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Job(out, {"another": "command"}):
        second = server.run(*quantize(model, out), watch=tmp_path)
        assert second["code"] == 2
        assert second["stderr"].startswith("Error: another run is writing") and second["stderr"].count("\n") == 1


def _write(directory: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _serve(warm: str) -> None:
    """Answers requests on stdin, one line each. The first run loads what no child then has to."""
    import torch

    from compress.cli import main

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stderr(io.StringIO()):
        main([*map(str, quantize(Path(warm), Path(scratch) / "out"))], standalone_mode=False)
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        folder = Path(request["watch"]).parent
        log, trace = folder / "stderr.txt", folder / "changes.txt"
        child = os.fork()
        if child == 0:
            _child(request, main, log, trace)
        _, status = os.waitpid(child, 0)
        answer = {
            "code": os.waitstatus_to_exitcode(status),
            "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
            "stderr": log.read_text(),
            "changes": trace.read_text().splitlines(),
        }
        print(json.dumps(answer), flush=True)
    os._exit(0)  # a frozen heap is not taken down in order


def _child(request: dict[str, Any], main: Any, log: Path, trace: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    _watch(request, os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
    sys.argv = ["compress", *request["command"]]
    try:
        main(request["command"])
    except SystemExit as exit:
        sys.stderr.flush()
        os._exit(exit.code if isinstance(exit.code, int) else 1)
    os._exit(0)


def _watch(request: dict[str, Any], trace: int) -> None:
    """Writes down every change of the disk before it is made, and kills this process before the one asked for."""
    count = 0

    def change(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        if (event != "open" and event not in CHANGES) or not _below(arguments, request["watch"]):
            return
        count += 1
        os.write(trace, f"{event} {arguments[:2]}\n".encode())
        if count == request["kill_at"]:
            os.kill(os.getpid(), signal.SIGKILL)

    def torn(descriptor: int) -> None:
        nonlocal count
        count += 1
        os.write(trace, b"fsync\n")
        if count == request["kill_at"]:
            with contextlib.suppress(OSError):  # a directory, or a file that was complete before
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = torn if request["tear"] else lambda descriptor: None  # what is written outlasts a kill without it
    if not request["tear"]:
        sys.addaudithook(change)


def _below(arguments: tuple[Any, ...], folder: str) -> bool:
    """Removal of a tree names its files without their folder; a child of this file does nothing else by such names."""
    path = arguments[0]
    return isinstance(path, str | Path) and (str(path).startswith(folder) or not os.path.isabs(path))


if __name__ == "__main__":
    _serve(sys.argv[1])
