"""No compiled loop reads outside of the tensors it is given."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the guard is made with Linux's mprotect")


def test_products_and_decoding_read_nothing_beside_what_is_stored() -> None:
    command = [sys.executable, str(Path(__file__).with_name("guarded.py"))]
    environment = {**os.environ, "COMPRESS_CPU_PATH": "fused"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout[-200:], done.stderr[-2000:])
