"""The Triton kernels in Triton's interpreter: in processes of their own, because TRITON_INTERPRET must be set before
triton is imported, and nothing can be compiled in such a process. Two of them, as starting one takes seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FILES = sorted(Path(__file__).parent.glob("*_interpreted.py"))


@pytest.mark.parametrize("files", [FILES[::2], FILES[1::2]], ids=lambda files: " ".join(path.stem for path in files))
def test_the_kernels_give_what_decode_gives(files: list[Path]) -> None:
    assert files
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=files[0].parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-8000:]
