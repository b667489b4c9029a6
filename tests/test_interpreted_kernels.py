"""The Triton kernels in Triton's interpreter: each file in a process of its own, because TRITON_INTERPRET must be set
before triton is imported, and nothing can be compiled in such a process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FILES = sorted(path.name for path in Path(__file__).parent.glob("*_interpreted.py"))


@pytest.mark.parametrize("file", FILES)
def test_the_kernels_give_what_decode_gives(file: str) -> None:
    path = Path(__file__).parent / file
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=path.parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-8000:]
