"""Reading a stream of codes in 32-bit words, low bits first, from within Triton kernels.

A unit is what no code straddles: one word where BITS divides 32, else BITS words of 32 codes.
"""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def words_of(codes, u, words, BITS: tl.constexpr):
    """The words of units u of some rows, a (rows, units) tensor each. codes: (rows, 1) pointers. words: of a row."""
    unit = ()
    COUNT: tl.constexpr = 1 if 32 % BITS == 0 else BITS
    for i in tl.static_range(COUNT):
        at = (u * COUNT + i)[None, :]
        unit += (tl.load(codes + at, mask=at < words, other=0),)
    return unit


@triton.jit
def code_of(unit, i: tl.constexpr, BITS: tl.constexpr):
    """Code i of units of BITS words."""
    bit: tl.constexpr = i * BITS
    code = unit[bit // 32] >> (bit % 32)
    if bit % 32 + BITS > 32:
        code |= unit[bit // 32 + 1] << (32 - bit % 32)
    return code & ((1 << BITS) - 1)


@triton.jit
def joined(parts):
    """parts[i] of all i as one tensor, with i in the last dimensions."""
    half: tl.constexpr = len(parts) // 2
    found = ()
    for i in tl.static_range(half):
        found += (tl.join(parts[i], parts[i + half]),)
    return found
