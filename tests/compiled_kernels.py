"""What the Triton kernels are compiled as, for GPUs that are not there; and the table of what that takes.

`python tests/compiled_kernels.py` writes benchmarks/results/kernels.json: registers, stack and shared memory by target,
of all kernels, and for Hopper what the loop of a product takes. Tests compile those of CHOSEN, and what has changed.
`python tests/compiled_kernels.py loops` prints these loops by the weight.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parents[1] / "benchmarks/results/kernels.json"
CAPABILITIES = (80, 90, 100)
AMD = {"gfx942": 64, "gfx1100": 32}  # MI300 and RDNA 3: the lanes of a warp
# What the GPU reads (A100: 163 KiB; H100, H200 and B200: 227 KiB; AMD's: 64 KiB) of shared memory for one program.
SHARED_LIMIT = {"80": 163 << 10, "90": 227 << 10, "100": 227 << 10, **dict.fromkeys(AMD, 64 << 10)}
# One for few tokens of each file: compiled for RDNA 3 too, and where tests do not compile all, compiled by them.
CHOSEN = ("gemv, K split", "lookup, 4 bits, 1 token", "bfp, 4 bits, 1 token", "bitstack, 16 tokens", "int4, 1 token")


@dataclass(frozen=True)
class Kernel:
    """A kernel as its file launches it.

    GEMV kernels are compiled for every capability, the others for Hopper, and nearly all for the MI300.

    types: of arguments by name; "i32*" for numbers that are multiples of 16. constants: of the others, dtypes by name.
    """

    file: str
    function: str
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    capabilities: Collection[int] = (90,)


_WORDS = {"sign_mantissa": "*u32", "codes": "*u32", "constants": "*u32"}
_BYTES = {"sign_mantissa": "*u8", "codes": "*u8", "constants": "*u32"}
_ESCAPES = {"row_start": "*i32", "escapes": "*u32"}
_SIZES = {"N": "i32*", "K": "i32*"}
_SPLIT = {"SPLIT": "i32"}
_ANY = {"N": "i32", "K": "i32"}
_TOKEN = {"x": "*u64", "x_values": "*bf16", **_SIZES}
_TOKENS = {"x": "*bf16", "partial": "*fp32", "M": "i32", **_SIZES, **_SPLIT}
_FINISH = {
    "partial": "*fp32",
    "xt": "*bf16",
    **_ESCAPES,
    "constants": "*u32",
    "y": "*bf16",
    "M": "i32",
    "N": "i32*",
    **_SPLIT,
}
_STREAM = {"codes": "*u64", "lookup": "*u16", "groups": "*i64", "segments": "*u16", "words": "i32"}
_GROUPED = {"SEGMENT": 128, "GROUP": 32}


def _df11(function: str, types: dict[str, str], constants: dict[str, Any], warps: int = 4, stages: int = 3) -> Kernel:
    which = CAPABILITIES if function in ("gemv", "decode_fixed", "decode_huffman") else (90,)
    return Kernel("df11_kernels", function, types, constants, warps, stages, which)


DF11 = {
    "decode_fixed": _df11(
        "decode_fixed",
        {**_WORDS, **_ESCAPES, "out": "*i16", "out_quads": "*u64", **_SIZES},
        {"ROWS": 1, "LANES": 128, "ALIGNED": True},
    ),
    "decode_fixed, any K": _df11(
        "decode_fixed",
        {**_BYTES, **_ESCAPES, "out": "*i16", "out_quads": "*i16", **_ANY},
        {"ROWS": 4, "LANES": 128, "ALIGNED": False},
    ),
    "decode_huffman": _df11(
        "decode_huffman",
        {**_STREAM, "sign_mantissa": "*u32", "constants": "*u32", "out": "*u64", "count": "i32", "quads": "i32"},
        {"LANES": 128, **_GROUPED, "WIDE": True},
    ),
    "scan": _df11(
        "scan",
        {**_STREAM, "starts": "*i64", "ends": "*i64", "chunks": "i32", "rest": "i32", "steps": "i32"},
        {"LANES": 32, "CHUNK": 1 << 14, **_GROUPED},
        1,
    ),
    "gemv": _df11(
        "gemv",
        {**_WORDS, **_ESCAPES, **_TOKEN, "y": "*bf16"},
        {"bias": None, "X": "bf16", "ROWS": 4, "LANES": 128, "SPLIT": 1, "EVEN": True},
    ),
    "gemv, K split": _df11(
        "gemv",
        {**_WORDS, **_ESCAPES, **_TOKEN, "y": "*fp32"},
        {"bias": None, "X": "bf16", "ROWS": 1, "LANES": 128, "SPLIT": 4, "EVEN": False},
    ),
    "matmul, 16 tokens": _df11(
        "matmul",
        {**_WORDS, **_TOKENS},
        {"DOT": "bf16", "BLOCK_M": 16, "BLOCK_N": 64, "ALIGNED": True},
    ),
    "matmul, 128 tokens": _df11(
        "matmul",
        {**_WORDS, **_TOKENS},
        {"DOT": "bf16", "BLOCK_M": 128, "BLOCK_N": 64, "ALIGNED": True},
        8,
        2,
    ),
    "matmul, any K": _df11(
        "matmul",
        {**_BYTES, **_TOKENS, **_ANY},
        {"DOT": "bf16", "BLOCK_M": 16, "BLOCK_N": 64, "ALIGNED": False},
    ),
    "finish": _df11("finish", _FINISH, {"bias": None, "BLOCK_M": 16, "BLOCK_N": 4, "ESCAPES": 16}),
}

_TILES = {**_SIZES, "words": "i32", "planes": "i32", "blocks": "i32", "ROWS": "i32"}
_LOOKUP = {"indices": "*u32", "tables": "*bf16", "scales": "*bf16", "selector": "*u8"}


def _lookup(bits: int, block_m: int, planes: bool = False, columns: int = 1) -> Kernel:
    sizes = {"BLOCK_N": 8, "BLOCK_K": 128} if block_m == 1 else {"BLOCK_N": 64, "BLOCK_K": 64}
    sizes |= {"BLOCK_K": min(sizes["BLOCK_K"], columns)} if columns > 1 else {}
    sizes |= {"BLOCK_N": 4096 // sizes["BLOCK_K"]} if 32 % bits and not planes else {}
    how = {"BITS": bits, "PLANES": planes, "COLUMNS": columns, "SCALED": columns > 1, "SWAPPED": False, "DOT": "bf16"}
    types = {**_LOOKUP, **_SPLIT, "x": "*bf16", "partial": "*fp32", "M": "i32", **_TILES}
    which = CAPABILITIES if block_m == 1 and bits in (3, 4) and not planes else (90,)
    return Kernel("lookup_kernels", "product", types, {**how, "BLOCK_M": block_m, **sizes}, capabilities=which)


def _lookup_decode(bits: int) -> Kernel:
    how = {
        "BITS": bits,
        "PLANES": False,
        "COLUMNS": 1,
        "SCALED": False,
        "SWAPPED": False,
        "BLOCK_N": 32 if 32 % bits else 16,
        "BLOCK_K": 128,
    }
    return Kernel("lookup_kernels", "decode", {**_LOOKUP, "out": "*bf16", **_TILES}, how)


LOOKUP = {
    "lookup decode, 3 bits": _lookup_decode(3),
    "lookup decode, 4 bits": _lookup_decode(4),
    "lookup decode, 6 bits": _lookup_decode(6),
    "lookup decode, 8 bits": _lookup_decode(8),
    **{f"lookup, {bits} bits, 1 token": _lookup(bits, 1) for bits in range(2, 9)},
    "lookup, 3 planes, 1 token": _lookup(3, 1, planes=True),
    **{f"lookup, {bits} bits, 16 tokens": _lookup(bits, 16) for bits in (3, 4, 6, 8)},
    "lookup, 3 planes, 16 tokens": _lookup(3, 16, planes=True),
    **{f"lookup, {bits} bits, 64 tokens": _lookup(bits, 64) for bits in (4, 7)},
    **{f"lookup, {bits} bits in scaled blocks, 1 token": _lookup(bits, 1, columns=128) for bits in (3, 4, 6)},
    "lookup, 3 bits in scaled blocks, 16 tokens": _lookup(3, 16, columns=128),
    "lookup, 3 bits in scaled blocks of 32, 1 token": _lookup(3, 1, columns=32),
    "lookup, 3 bits in scaled blocks of 32, 64 tokens": _lookup(3, 64, columns=32),
}


def _permuted(bits: int, tile: tuple[int, int, int]) -> Kernel:
    """tile: tokens, rows and columns of a program."""
    types = {"indices": "*u32", "tables": "*u32", "x": "*bf16", "partial": "*fp32", "M": "i32", **_SIZES}
    types |= {"words": "i32*", "ROWS": "i32", **_SPLIT}
    how = {"BITS": bits, "NATIVE": True, **dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), tile, strict=True))}
    which = CAPABILITIES if tile[0] == 8 else (90,)
    return Kernel("permuted_kernels", "product", types, how, tile[1] // 16, 3, which)


PERMUTED = {
    **{f"permuted, {bits} bits, 1 token": _permuted(bits, (8, 64, 128)) for bits in (2, 3, 4)},
    **{f"permuted, {bits} bits, 16 tokens": _permuted(bits, (16, 64, 128)) for bits in (2, 3, 4)},
    **{f"permuted, {bits} bits, 64 tokens": _permuted(bits, (64, 128, 128)) for bits in (3, 4)},
}


def _bfp(bits: int, size: int, tokens: int = 16, dtype: str = "bf16", number: str = "i32*") -> Kernel:
    types = {"mantissas": "*u8", "exponents": "*u8", "x": f"*{dtype}", "partial": "*fp32", **_SPLIT}
    types |= dict.fromkeys(("M", "N", "K", "row_bytes", "blocks"), number)
    how = {"BITS": bits, "BLOCK": size, "DOT": dtype, "BLOCK_M": tokens, "BLOCK_N": 64}
    return Kernel("bfp_kernels", "matmul", types, how, *((4, 3) if tokens <= 16 else (8, 2)))


_BFP_DECODE = {"mantissas": "*u8", "exponents": "*u8", "out": "*bf16", **_SIZES, "row_bytes": "i32", "blocks": "i32"}
BFP = {
    "bfp decode, 4 bits": Kernel(
        "bfp_kernels", "decode", _BFP_DECODE, {"BITS": 4, "BLOCK": 32, "BLOCK_N": 8, "BLOCK_K": 512}
    ),
    "bfp, 2 bits, float16": _bfp(2, 32, dtype="fp16"),
    "bfp, 4 bits, float16": _bfp(4, 32, dtype="fp16"),
    "bfp, 4 bits, any K": _bfp(4, 32, number="i32"),
    "bfp, 4 bits in blocks of 16, 128 tokens, float16": _bfp(4, 16, 128, "fp16"),
    "bfp, 5 bits, 128 tokens, float16": _bfp(5, 32, 128, "fp16"),
    "bfp, 8 bits in blocks of 128, 128 tokens, float16": _bfp(8, 128, 128, "fp16"),
    "bfp, 6 bits, float32": _bfp(6, 32, dtype="fp32"),
}


def _bitstack(dtype: str, tokens: int) -> Kernel:
    types = {"planes": "*i64", "u": "*bf16", "v": "*bf16", "levels": "*fp32", "x": f"*{dtype}", "partial": "*fp32"}
    types |= {**_SIZES, **_SPLIT, **dict.fromkeys(("M", "COUNT", "RANK"), "i32")}
    how = {"FLOOR": 1 / 16, "DOT": dtype, "BLOCK_M": tokens, "BLOCK_N": 32, "R": 16}
    how["BLOCK_K"] = 128 if dtype == "bf16" else 64
    return Kernel(
        "bitstack_kernels", "matmul", types, how, 4, 2, CAPABILITIES if dtype == "bf16" and tokens == 16 else (90,)
    )


def _bitstack_decode() -> Kernel:
    types = {"planes": "*i64", "u": "*bf16", "v": "*bf16", "levels": "*fp32", "out": "*bf16"}
    types |= {**_SIZES, "COUNT": "i32", "RANK": "i32"}
    how = {"FLOOR": 1 / 16, "LARGEST": (2 - 2**-7) * 2.0**127, "BLOCK_N": 8, "BLOCK_K": 1024}
    return Kernel("bitstack_kernels", "decode", types, how)


def _signs(count: int, tokens: int) -> Kernel:
    types = {"planes": "*i64", "u": "*bf16", "v": "*bf16", "levels": "*fp32", "x": "*bf16", "partial": "*fp32"}
    types |= {**_SIZES, **_SPLIT, "M": "i32", "RANK": "i32*"}
    how = {"COUNT": count, "RANKS": 1, "FLOOR": 1 / 16, "NATIVE": True}
    how |= {"BLOCK_M": tokens, "BLOCK_N": 64, "BLOCK_K": 128}
    return Kernel("signs_kernels", "product", types, how, 4, 4, CAPABILITIES if tokens == 8 else (90,))


SIGNS = {
    **{f"bitstack, {count} blocks, 1 token": _signs(count, 8) for count in (1, 2, 3)},
    "bitstack, 2 blocks, 16 tokens": _signs(2, 16),
    "bitstack, 3 blocks, 32 tokens": _signs(3, 32),
}
BITSTACK = {
    "bitstack decode": _bitstack_decode(),
    "bitstack, 16 tokens": _bitstack("bf16", 16),
    "bitstack, 64 tokens": _bitstack("bf16", 64),
    "bitstack, float32": _bitstack("fp32", 16),
}

_SCALED = {"codes": "*u32", "words": "i32*", "blocks": "i32*", "ROWS": "i32", "N": "i32*", "K": "i32*"}


def _groups(
    form: str, bits: int, group: int, where: str, tile: tuple[int, int, int], scales: str = "float", **more: Any
) -> Kernel:
    """tile: tokens, rows and columns of a program. more: zeros, dtype, stage and warps."""
    dtype = more.get("dtype", "bf16")
    types = {**_SCALED, "scales": "*bf16" if scales == "float" else "*u8", "x": f"*{dtype}", "y": "*fp32"}
    types |= {"M": "i32", "factor": "fp32", **_SPLIT}
    constants: dict[str, Any] = {"bias": None, "zeros": None, "FORM": form, "BITS": bits, "GROUP": group}
    constants |= {"SCALES": scales, "WHERE": where, "DOT": dtype}
    constants |= dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), tile, strict=True))
    if more.get("zeros"):
        types["zeros"] = "*u8"
        del constants["zeros"]
    which = more.get("capabilities", (90,))
    return Kernel("groups_kernels", "product", types, constants, 8 if tile[0] > 64 else 4, 3, which)


def _groups_decode(form: str, bits: int, scales: str) -> Kernel:
    types = {**_SCALED, "scales": "*bf16" if scales == "float" else "*u8", "out": "*bf16", "GROUP": "i32"}
    how = {"FORM": form, "BITS": bits, "SCALES": scales, "BLOCK_N": 8, "BLOCK_K": 512, "zeros": None}
    return Kernel("groups_kernels", "decode", types, how)


GROUPS = {
    "groups decode, 3 bits": _groups_decode("int", 3, "float"),
    "groups decode, mxfp8": _groups_decode("e4m3", 8, "e8m0"),
    "int4, 1 token": _groups("int", 4, 128, "sums", (8, 128, 128), capabilities=CAPABILITIES),
    "int4, 16 tokens": _groups("int", 4, 128, "sums", (16, 128, 128)),
    "int4, 128 tokens": _groups("int", 4, 128, "sums", (128, 64, 128)),
    "int4, float32": _groups("int", 4, 128, "sums", (16, 64, 32), dtype="fp32"),
    "int4 with zeros, 1 token": _groups("int", 4, 128, "sums", (8, 128, 128), zeros=True),
    "int4 in groups of 32, 1 token": _groups("int", 4, 32, "codes", (8, 128, 128)),
    "int2, 1 token": _groups("int", 2, 128, "sums", (8, 128, 128)),
    "int3, 1 token": _groups("int", 3, 128, "sums", (8, 128, 128)),
    "int8, 1 token": _groups("int", 8, 128, "sums", (8, 128, 128), capabilities=CAPABILITIES),
    "fp8, 1 token": _groups("e4m3", 8, 4096, "rows", (8, 128, 128), capabilities=CAPABILITIES),
    "mxfp4, 1 token": _groups("e2m1", 4, 32, "codes", (8, 128, 128), "e8m0", capabilities=CAPABILITIES),
    "mxfp8, 1 token": _groups("e4m3", 8, 32, "codes", (8, 128, 64), "e8m0"),
    "nvfp4, 1 token": _groups("e2m1", 4, 16, "codes", (8, 128, 128), "e4m3", capabilities=CAPABILITIES),
    "bfp, 2 bits, 1 token": _groups("int", 2, 32, "codes", (8, 128, 128), "shared"),
    "bfp, 3 bits, 1 token": _groups("int", 3, 32, "codes", (8, 128, 128), "shared"),
    "bfp, 4 bits, 1 token": _groups("int", 4, 32, "codes", (8, 128, 128), "shared", capabilities=CAPABILITIES),
    "bfp, 8 bits, 1 token": _groups("int", 8, 32, "codes", (8, 128, 64), "shared"),
    "bfp, 4 bits, 16 tokens": _groups("int", 4, 32, "codes", (16, 128, 128), "shared"),
    "bfp, 4 bits in blocks of 128, 1 token": _groups("int", 4, 128, "sums", (8, 128, 128), "shared"),
    "bfp, 4 bits, 128 tokens": _groups("int", 4, 32, "codes", (128, 64, 64), "shared"),
    "nvfp4, 128 tokens": _groups("e2m1", 4, 16, "codes", (128, 64, 64), "e4m3"),
    "sums": Kernel(
        "sums",
        "_finish",
        {"partial": "*fp32", "y": "*bf16", "count": "i32*", "N": "i32*", **_SPLIT},
        {"bias": None, "BLOCK": 1024},
    ),
}

KERNELS: dict[str, Kernel] = {**DF11, **LOOKUP, **PERMUTED, **BFP, **BITSTACK, **SIGNS, **GROUPS}


def targets(name: str) -> list[str]:
    """Compute capabilities of NVIDIA's GPUs, and names of AMD's."""
    if name in PERMUTED or name in SIGNS:  # with instructions of NVIDIA's
        return [*map(str, KERNELS[name].capabilities)]
    return [*map(str, KERNELS[name].capabilities), "gfx942", *(["gfx1100"] if name in CHOSEN else [])]


def on_amd(kernel: Kernel) -> Kernel:
    """As its file launches it where torch is for ROCm."""
    constants = dict(kernel.constants)
    if (kernel.file, kernel.function) == ("groups_kernels", "product"):
        constants |= {"BLOCK_M": max(16, constants["BLOCK_M"]), "BLOCK_N": 64}
    warps = 2 if constants.get("LANES") == 128 else kernel.warps
    return replace(kernel, constants=constants, warps=warps, stages=kernel.stages - 1)


def function_of(kernel: Kernel) -> Any:
    return getattr(import_module(f"compress.kernels.{kernel.file}"), kernel.function)


def source_of(kernel: Kernel) -> str:
    """Of what it is compiled, in short: of the code that Triton knows it by, with all that it calls, and how."""
    return hashlib.sha256(f"{function_of(kernel).cache_key} {kernel}".encode()).hexdigest()[:16]


def compiled(kernel: Kernel, target: str) -> Any:
    """What Triton makes of it."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if target in AMD:
        kernel, gpu = on_amd(kernel), GPUTarget("hip", target, AMD[target])
    else:
        gpu = GPUTarget("cuda", int(target), 32)
    function = function_of(kernel)
    dtypes = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
    constants = {key: dtypes.get(value, value) for key, value in kernel.constants.items()}
    signature = {name: kernel.types.get(name, "constexpr").rstrip("*") for name in function.arg_names}
    aligned = [name for name, kind in kernel.types.items() if kind.startswith("*") or kind.endswith("*")]
    attributes = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    if target in AMD:  # tensors of less than 2 GiB are read through buffer instructions
        for name in (name for name, kind in kernel.types.items() if kind.startswith("*")):
            attributes[(function.arg_names.index(name),)].append(["tt.pointer_range", 32])
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": kernel.warps, "num_stages": kernel.stages}
    return triton.compile(source, target=gpu, options=options)


def resources(kernel: Kernel, target: str) -> dict[str, Any]:
    """Registers of a thread, bytes of its stack (what does not fit in registers) and of a program's shared memory; of
    products for Hopper also the `loop` (see `_loop`)."""
    import triton

    found = compiled(kernel, target)
    if target in AMD:
        return {**_of_amd(found.asm["amdgcn"]), "shared": found.metadata.shared}
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        command = [tool, "-res-usage", "-sass", file.name]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", shown)
    assert numbers, shown
    used = {"registers": int(numbers[1]), "stack": int(numbers[2]), "shared": found.metadata.shared}
    return {**used, "loop": _loop(shown)} if target == "90" and weights(kernel) else used


def weights(kernel: Kernel) -> int:
    """Of a product, those that a thread has in a step of its loop; 0 of other kernels."""
    if kernel.function not in ("product", "matmul", "gemv"):
        return 0
    how = kernel.constants
    if kernel.function == "gemv":
        return 16 * how["ROWS"]
    columns = how.get("BLOCK_K") or how.get("BLOCK") or (256 if how["ALIGNED"] else 32)
    return how["BLOCK_N"] * columns // (32 * kernel.warps)


_COUNTED = {"loads": ("LDG", "LDGSTS"), "shared": ("LDS", "LDSM"), "shuffles": ("SHFL",)}


def _loop(sass: str) -> dict[str, int]:
    """Instructions of a warp in the longest loop, loops within it run through once; and how many of them are loads from
    memory or the L1 cache, from shared memory, and shuffles. A loop ends with a branch backwards."""
    found = re.findall(r"/\*([0-9a-f]{4,5})\*/ +(?:@!?U?P\w+ +)?([A-Z0-9]\w*)([^;]*);", sass)
    names = {int(at, 16): name for at, name, _ in found}
    jumps = ((int(at, 16), re.search(r"0x([0-9a-f]+)", rest)) for at, name, rest in found if name == "BRA")
    loops = [(int(to[1], 16), at) for at, to in jumps if to and int(to[1], 16) < at]
    first, last = max(loops, key=lambda loop: loop[1] - loop[0])
    loop = [name for at, name in names.items() if first <= at <= last]
    return {"instructions": len(loop), **{key: sum(map(loop.count, which)) for key, which in _COUNTED.items()}}


def _of_amd(assembly: str) -> dict[str, int]:
    """Its vector registers, how many of them are spilled, and bytes of a thread's stack."""
    keys = {"registers": "vgpr_count", "spilled": "vgpr_spill_count", "stack": "private_segment_fixed_size"}
    found = {name: re.search(rf"^ *\.{key}: +(\d+)$", assembly, re.MULTILINE) for name, key in keys.items()}
    return {name: int(match[1]) for name, match in found.items() if match}


def write_table() -> None:
    import triton

    kernels = {name: {target: resources(k, target) for target in targets(name)} for name, k in KERNELS.items()}
    sources = {name: source_of(kernel) for name, kernel in KERNELS.items()}
    table = {"triton": triton.__version__, "sources": sources, "kernels": kernels}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")


def print_loops() -> None:
    """Of the table: registers, and what the loops take, by the weight that a thread has in a step."""
    print(f"{'':46}registers instructions loads shared shuffles")
    for name, by_target in json.loads(TABLE.read_text())["kernels"].items():
        if loop := by_target.get("90", {}).get("loop"):
            each = (f"{loop[key] / weights(KERNELS[name]):12.2f}" for key in ("instructions", *_COUNTED))
            print(f"{name:46}{by_target['90']['registers']:9}", *each)


if __name__ == "__main__":
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"
    print_loops() if sys.argv[1:] == ["loops"] else write_table()
