"""Triton kernels compiled for GPUs that are not there. Without Triton everything here is skipped."""

import json
import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from compiled_kernels import (
    CHOSEN,
    KERNELS,
    LOOKUP,
    PERMUTED,
    SHARED_LIMIT,
    TABLE,
    _loop,
    on_amd,
    resources,
    source_of,
    targets,
    weights,
)

pytest.importorskip("triton")

# For Hopper what has changed, and a few for all targets: a change that matters to the other targets changes what is
# compiled for Hopper too, and then the whole table is written anew.
COMPILED = [(name, target) for name in KERNELS for target in targets(name) if target == "90" or name in CHOSEN]


def table() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(TABLE.read_text())
    return found


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="nothing can be compiled while TRITON_INTERPRET is set")
@pytest.mark.parametrize(("name", "target"), COMPILED)
def test_a_kernel_compiles_to_what_the_table_says(name: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    known = table()["triton"] == triton.__version__
    if name not in CHOSEN and known and source_of(KERNELS[name]) == table()["sources"][name]:
        return  # it is what the table was written of
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # unset, 3.9 warns that 3.10 will change the default
    found = resources(KERNELS[name], target)
    check_fits(found, target)
    if not known:
        return  # another compiler allocates otherwise
    wanted = table()["kernels"][name][target]
    # Registers are handed out in eights, so a few more cost nothing that matters; many more halve a kernel's warps.
    assert found["registers"] <= wanted["registers"] + 8
    assert found["shared"] == wanted["shared"]
    for key, count in wanted.get("loop", {}).items():
        assert found["loop"][key] <= count + 8


def test_the_longest_loop_is_counted_without_what_surrounds_it() -> None:
    """An inner loop counts once; a branch forwards and the one to itself that ends every kernel are none."""
    lines = ["LDG R0, [R2.64]", "@!P0 BRA 0x0060", "LDS.64 R4, [R6]", "@P1 LDGSTS.E [R1], [R2.64]", "SHFL.BFLY R1, R1"]
    lines += ["@P2 BRA 0x0030", "@P1 BRA `(.L_x_1), 0x0020", "EXIT", "BRA 0x0080"]
    sass = "\n".join(f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(lines))
    assert _loop(sass) == {"instructions": 5, "loads": 1, "shared": 1, "shuffles": 1}


def check_fits(found: dict[str, int], target: str) -> None:
    assert found["shared"] <= SHARED_LIMIT[target]
    assert found["stack"] == 0  # what does not fit in registers would lie there
    assert found.get("spilled", 0) == 0  # which AMD counts


def test_every_kernel_of_the_table_fits_its_gpu() -> None:
    for found in table()["kernels"].values():
        for target, used in found.items():
            check_fits(used, target)


def test_a_kernel_is_known_by_its_code_and_by_how_it_is_compiled() -> None:
    kernel = KERNELS["gemv"]
    others = [replace(kernel, warps=8), replace(kernel, function="decode_fixed"), replace(kernel, types={})]
    assert len({source_of(each) for each in (kernel, *others)}) == 4
    assert source_of(replace(kernel)) == source_of(kernel)


def test_the_table_has_these_kernels_and_no_others() -> None:
    found = {name: set(by_target) for name, by_target in table()["kernels"].items()}
    assert found == {name: set(targets(name)) for name in KERNELS}


@pytest.mark.parametrize("tokens", [1, 16, 128])
def test_amd_s_gpus_are_given_the_tiles_that_are_compiled(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.kernels import groups, groups_triton, prepared

    monkeypatch.setattr(prepared, "ROCM", True)
    scales = torch.ones(8, 2, dtype=torch.bfloat16)
    weight = groups.pack(torch.zeros(8, 32, dtype=torch.int32), scales, (8, 256), torch.bfloat16, 4, (1, 128)).weight
    where, tile = groups_triton._tiles(weight, tokens, narrow=True)
    kernel = on_amd(KERNELS[f"int4, {tokens} token{'s' if tokens > 1 else ''}"])
    assert {"WHERE": where, **tile}.items() <= kernel.constants.items()
    assert prepared.stages(3) == kernel.stages


@pytest.mark.parametrize("name", [name for name, kernel in LOOKUP.items() if kernel.constants.get("BLOCK_M")])
def test_codebooks_are_launched_with_the_tiles_that_are_compiled(name: str) -> None:
    from compress.kernels import lookup, lookup_triton

    how = LOOKUP[name].constants
    bits, columns = how["BITS"], how["COLUMNS"]
    indices = torch.zeros((bits, 8, 8) if how["PLANES"] else (8, 8 * bits), dtype=torch.int32)
    scales = torch.ones(8, 256 // columns) if how["SCALED"] else None
    weight = lookup.pack(indices, torch.zeros(8, 1 << bits), (8, 256), 1, columns, torch.bfloat16, scales).weight
    tile = lookup_triton._tile(weight, *((8, 128) if how["BLOCK_M"] == 1 else (64, 64)))
    assert tile == (how["BLOCK_N"], how["BLOCK_K"])


@pytest.mark.parametrize("name", PERMUTED)
def test_permuted_codebooks_are_launched_with_the_tiles_that_are_compiled(name: str) -> None:
    from compress.kernels import lookup_triton

    tile = lookup_triton._permuted_tile(int(name.split()[-2]))
    assert tile.items() <= PERMUTED[name].constants.items()


@pytest.mark.parametrize("name", [name for name in PERMUTED if name.endswith(("1 token", "16 tokens"))])
def test_permuted_codebooks_are_looked_up_in_registers(name: str) -> None:
    """A program loads its codes and x, and no level."""
    loop = table()["kernels"][name]["90"]["loop"]
    assert max(loop["loads"], loop["shared"]) + loop["shuffles"] < weights(KERNELS[name]) / 4
