"""What compiled products are made of: vectors of LLVM's own, as wide as the machine's, in bodies of numba intrinsics.

All of it is LLVM's portable form, but for two instructions that it does not find by itself: products of neighbours,
which x86 has at every width and elsewhere are made of parts, and tables in registers (`has_tables`).
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numba.core.registry import cpu_target

i1, i8, i16, i32, i64, f32 = (*map(ir.IntType, (1, 8, 16, 32, 64)), ir.FloatType())
AHEAD = 4096  # bytes: so far before they are needed, codes are asked for; the machine's own prefetching ends at a page
_MADD = {16: ("avx2", "llvm.x86.avx2.pmadd.wd"), 32: ("avx512bw", "llvm.x86.avx512.pmaddw.d.512")}
_SHUFFLE = {
    8: ("avx2", "llvm.x86.ssse3.pshuf.b.128"),
    16: ("avx2", "llvm.x86.avx2.pshuf.b"),
    32: ("avx512bw", "llvm.x86.avx512.pshuf.b.512"),
}


@cache
def features() -> frozenset[str]:
    """What the processor that numba compiles for has: "avx2" and so on."""
    text: str = cpu_target.target_context.codegen().magic_tuple()[2]
    return frozenset(name[1:] for name in text.split(",") if name.startswith("+"))


def lanes() -> int:
    """16-bit numbers in a vector. 16 also where vectors are shorter: the compiler cuts them."""
    return 32 if "avx512bw" in features() else 16


def has_tables() -> bool:
    """Whether vectors of bytes can be looked up in a table of 16."""
    return _SHUFFLE[lanes()][0] in features()


def has_long_tables() -> bool:
    """Whether vectors of 16-bit numbers can be looked up in a table of 64, and longer ones."""
    return "avx512bw" in features()


def has_float_tables() -> bool:
    """Whether vectors of float32 can be looked up in a table of 16, and longer ones."""
    return "avx512f" in features()


def has_wide_tables() -> bool:
    """Whether vectors of bytes can be looked up in a table of 64, and every four of them be added up."""
    return {"avx512vbmi", "avx512vnni"} <= features()


def has_bit_fields() -> bool:
    """Whether a vector of bytes is made of bits that begin anywhere."""
    return "avx512vbmi" in features()


def vector(kind: ir.Type, count: int) -> ir.VectorType:
    return ir.VectorType(kind, count)


def constant(kind: ir.VectorType, values: Any) -> ir.Constant:
    """values: a number for all lanes, or one for each."""
    return ir.Constant(kind, list(values) if hasattr(values, "__iter__") else [values] * kind.count)


def integer(value: int) -> ir.Constant:
    return ir.Constant(i64, value)


def load(builder: Any, base: Any, kind: ir.Type, offset: Any) -> Any:
    """What lies `offset` bytes behind a pointer, aligned or not."""
    return builder.load(builder.bitcast(_at(builder, base, offset), kind.as_pointer()), align=1)


def prefetch(builder: Any, base: Any, offset: Any) -> None:
    """Asks for the cache line `offset` bytes behind a pointer, into the second cache: that waits for more lines at a
    time than the first. Nothing happens where no memory is."""
    kind = ir.FunctionType(ir.VoidType(), [i8.as_pointer(), i32, i32, i32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [_at(builder, base, offset), *(ir.Constant(i32, value) for value in (0, 2, 1))])


def shuffle(builder: Any, values: Any, order: Any) -> Any:
    """values[order], where order is known when it is compiled."""
    order = list(order)
    nothing = ir.Constant(values.type, ir.Undefined)
    return builder.shuffle_vector(values, nothing, constant(vector(i32, len(order)), order))


def join(builder: Any, parts: list[Any]) -> Any:
    """Vectors, one behind the other; as many as a power of two."""
    while len(parts) > 1:
        order = constant(vector(i32, 2 * parts[0].type.count), range(2 * parts[0].type.count))
        parts = [builder.shuffle_vector(*pair, order) for pair in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def splat(builder: Any, value: Any, count: int) -> Any:
    """A number in every lane."""
    one = ir.Constant(vector(value.type, 1), ir.Undefined)
    return shuffle(builder, builder.insert_element(one, value, ir.Constant(i32, 0)), [0] * count)


def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c in float32, rounded once."""
    kind = a.type
    name = f"llvm.fma.v{kind.count}f32"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), name)
    return builder.call(function, [a, b, c])


def madd(builder: Any, a: Any, b: Any) -> Any:
    """Products of 16-bit integers, neighbours added: int32 in half as many lanes."""
    count = a.type.count
    wide = vector(i32, count // 2)
    needed, name = _MADD.get(count, ("", ""))
    if needed in features():
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(wide, [a.type] * 2), name)
        return builder.call(function, [a, b])
    parts = [[builder.sext(shuffle(builder, v, range(odd, count, 2)), wide) for v in (a, b)] for odd in (0, 1)]
    return builder.add(*(builder.mul(*part) for part in parts))


def has_dots() -> bool:
    """Whether products of bfloat16 are added up in float32."""
    return "avx512bf16" in features()


def dot(builder: Any, total: Any, a: Any, b: Any) -> Any:
    """total + products of bfloat16. total: 16 float32. a, b: 16 pairs, as int32. Subnormal numbers count as zero where
    this `has_dots`."""
    kind, pairs = vector(f32, 16), vector(i32, 16)
    if not has_dots():
        for part in (0, 1):
            first, second = (_wide_half(builder, value, part) for value in (a, b))
            total = fma(builder, first, second, total)
        return total
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind, pairs, pairs]), name)
    return builder.call(function, [total, a, b])


def _wide_half(builder: Any, pairs: Any, part: int) -> Any:
    """The first (part 0) or second bfloat16 of each pair in float32."""
    upper = constant(pairs.type, 0xFFFF0000)
    bits = builder.and_(pairs, upper) if part else builder.shl(pairs, constant(pairs.type, 16))
    return builder.bitcast(bits, vector(f32, pairs.type.count))


def look_up(builder: Any, table: Any, index: Any) -> Any:
    """table: bytes, 16 and again 16. index: bytes below 16. Every index looks into the 16 bytes of its own place."""
    name = _SHUFFLE[table.type.count // 2][1]
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(table.type, [table.type] * 2), name)
    return builder.call(function, [table, index])


def look_up_words(builder: Any, parts: list[Any], index: Any) -> Any:
    """table[index], where `has_long_tables`. parts: of a table, 1, 2, 4 or 8 of 32 words each; or one of 16. index: as
    many words as a part has, each below that of the table."""
    return _look_up_parts(builder, parts, index, "hi", 64)


def look_up_floats(builder: Any, parts: list[Any], index: Any) -> Any:
    """table[index], where `has_float_tables`. parts: of a table, 1, 2, 4 and so on of 16 float32. index: 16 int32."""
    return _look_up_parts(builder, parts, index, "ps" if len(parts) > 1 else "sf", 32)


def _look_up_parts(builder: Any, parts: list[Any], index: Any, name: str, bit: int) -> Any:
    """bit: of an index, the lowest that two parts together have not."""
    kind, where = parts[0].type, index.type
    bits = 16 * kind.count if name == "hi" else 32 * kind.count
    if len(parts) == 1:
        looking = ir.FunctionType(kind, [kind, where])
        look = cgutils.get_or_insert_function(builder.module, looking, f"llvm.x86.avx512.permvar.{name}.{bits}")
        return builder.call(look, [parts[0], index])
    looking = ir.FunctionType(kind, [kind, where, kind])
    look = cgutils.get_or_insert_function(builder.module, looking, f"llvm.x86.avx512.vpermi2var.{name}.{bits}")
    found = [builder.call(look, [a, index, b]) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    while len(found) > 1:
        chosen = builder.icmp_unsigned("!=", builder.and_(index, constant(where, bit)), constant(where, 0))
        found = [builder.select(chosen, b, a) for a, b in zip(found[::2], found[1::2], strict=True)]
        bit *= 2
    return found[0]


def bfloat16(builder: Any, parts: list[Any]) -> Any:
    """float32 rounded to nearest, ties to even, where `has_dots`: words. parts: one or two vectors of 16. Subnormal
    numbers become zero."""
    kind, words = parts[0].type, vector(i16, 16 * len(parts))
    name = f"llvm.x86.avx512bf16.cvtne{len(parts) if len(parts) > 1 else ''}ps2bf16.512"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(words, [kind] * len(parts)), name)
    return builder.call(function, parts[::-1])  # the instruction takes the higher half first


def bit_fields(builder: Any, source: Any, control: Any) -> Any:
    """64 bytes, each the 8 bits of its octet of bytes that begin at a bit, where `has_bit_fields`. source: 64 bytes.
    control: 64 bytes, the bit where each begins."""
    bytes_ = source.type
    function = ir.FunctionType(bytes_, [bytes_] * 2)
    select = cgutils.get_or_insert_function(builder.module, function, "llvm.x86.avx512.pmultishift.qb.512")
    return builder.call(select, [control, source])


def look_up_bytes(builder: Any, table: Any, index: Any) -> Any:
    """table[index] of 64 bytes, where `has_bit_fields`. index: bytes below 64."""
    bytes_ = table.type
    looking = ir.FunctionType(bytes_, [bytes_] * 2)
    look = cgutils.get_or_insert_function(builder.module, looking, "llvm.x86.avx512.permvar.qi.512")
    return builder.call(look, [table, index])


def add_fours(builder: Any, sums: Any, tables: list[Any], indices: list[Any]) -> Any:
    """sums: 16 int32, to each of which are added four neighbours of what the first and of what the second index looks
    up. tables: two of 64 uint8 below 128. indices: two of 64 uint8 below 64. Where `has_wide_tables`."""
    kind = sums.type
    adding = ir.FunctionType(kind, [kind] * 3)
    add = cgutils.get_or_insert_function(builder.module, adding, "llvm.x86.avx512.vpdpbusd.512")
    both = builder.add(*(look_up_bytes(builder, *pair) for pair in zip(tables, indices, strict=True)))
    return builder.call(add, [sums, builder.bitcast(both, kind), constant(kind, 0x01010101)])


def total(builder: Any, values: Any) -> Any:
    """The sum of all lanes, halves first."""
    while values.type.count > 1:
        half = values.type.count // 2
        low, high = (shuffle(builder, values, range(start, start + half)) for start in (0, half))
        values = builder.fadd(low, high)
    return builder.extract_element(values, ir.Constant(i32, 0))


def _at(builder: Any, base: Any, offset: Any) -> Any:
    return builder.gep(builder.bitcast(base, i8.as_pointer()), [offset])


def data(context: Any, builder: Any, array: Any, kind: Any) -> Any:
    """Where the numbers of one of numba's arrays lie."""
    return context.make_array(kind)(context, builder, array).data
