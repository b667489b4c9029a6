"""Every Triton kernel compiled for GPUs that are not there. Without Triton everything here is skipped."""

import json
import os

import pytest
from compiled_kernels import KERNELS, SHARED_LIMIT, TABLE, resources

pytest.importorskip("triton")

EVERY = [
    pytest.param(name, cc, id=f"{name}, sm_{cc}") for name, kernel in KERNELS.items() for cc in kernel.capabilities
]


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="nothing can be compiled while TRITON_INTERPRET is set")
@pytest.mark.parametrize(("name", "capability"), EVERY)
def test_a_kernel_compiles_to_what_the_table_says(name: str, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # unset, 3.9 warns that 3.10 will change the default
    found = resources(KERNELS[name], capability)
    assert found["shared"] <= SHARED_LIMIT[capability]
    assert found["stack"] == 0  # what does not fit in registers would lie there
    table = json.loads(TABLE.read_text())
    if triton.__version__ != table["triton"]:
        return  # another compiler allocates otherwise
    wanted = table["kernels"][name][str(capability)]
    # Registers are handed out in eights, so a few more cost nothing that matters; many more halve a kernel's warps.
    assert found["registers"] <= wanted["registers"] + 8
    assert found["shared"] == wanted["shared"]


def test_the_table_has_these_kernels_and_no_others() -> None:
    table = json.loads(TABLE.read_text())["kernels"]
    assert {name: set(found) for name, found in table.items()} == {
        name: {str(cc) for cc in kernel.capabilities} for name, kernel in KERNELS.items()
    }
