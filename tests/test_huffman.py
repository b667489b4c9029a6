"""The Huffman coder against all codes there are, a plain Huffman tree, and coders that go through strings of bits."""

import ctypes
import heapq
import itertools
import mmap
import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.formats import huffman
from compress.formats.huffman import CHUNK, LIMIT, PADDING, code_table, padded

QUICK = settings(deadline=None, derandomize=True, database=None, max_examples=60)
COUNTS = [1, 2, 7, 8, 9, CHUNK - 1, CHUNK, CHUNK + 1, 4 * CHUNK, 4 * CHUNK + 1, 5 * CHUNK - 3]
# how often each of the 256 symbols is counted: the code that follows from it
TABLES = {
    "one symbol": [0] * 117 + [9] + [0] * 138,
    "two symbols": [0] * 3 + [5] + [0] * 251 + [1],
    "three symbols": [0] * 120 + [4, 9, 1] + [0] * 133,
    "all alike": [1] * 256,
    "all, steep": [1 + 2 ** max(0, 30 - abs(symbol - 120)) for symbol in range(256)],
    "twenty, steep": [2**symbol if symbol < 20 else 0 for symbol in range(256)],
    "random": np.random.default_rng(5).integers(0, 1000, 256).tolist(),
}


def package_merge(weights: list[int], limit: int) -> list[int]:
    return list(huffman.package_merge(np.array(weights, np.int64), limit).tolist())


def cheapest(weights: list[int], limit: int) -> int:
    """The least sum of weight * length over every choice of lengths that a prefix code can have."""
    choices = itertools.product(range(1, limit + 1), repeat=len(weights))
    possible = (c for c in choices if sum(1 << (limit - length) for length in c) <= 1 << limit)
    return min(sum(weight * length for weight, length in zip(weights, c, strict=True)) for c in possible)


def tree_cost(weights: list[int]) -> int:
    """The sum of weight * length of a Huffman code: that of all nodes which join two others."""
    heap, cost = list(weights), 0
    heapq.heapify(heap)
    while len(heap) > 1:
        joined = heapq.heappop(heap) + heapq.heappop(heap)
        cost += joined
        heapq.heappush(heap, joined)
    return cost


def cost(weights: list[int], lengths: list[int]) -> int:
    return sum(weight * length for weight, length in zip(weights, lengths, strict=True))


def code_strings(table: Any) -> dict[int, str]:
    """symbol -> its code, the first bit first: in the order of the table they share out all strings of 12 bits."""
    start, strings = 0, {}
    for symbol, length in table.tolist():
        strings[symbol] = f"{start >> (LIMIT - length):0{length}b}" if length else ""
        start += 1 << (LIMIT - length)
    assert start == 1 << LIMIT
    return strings


def split_slowly(words: Any) -> tuple[list[int], list[int]]:
    """Symbols and rest, word by word."""
    if words.itemsize == 1:
        return words.tolist(), []
    rest = [((word >> 8) & 0x80) | (word & 0x7F) for word in words.tolist()]
    return [(word >> 7) & 0xFF for word in words.tolist()], rest


def encode_slowly(symbols: list[int], table: Any) -> tuple[list[int], bytes]:
    """The bytes of each chunk, and the codes, through strings of bits."""
    strings, sizes, codes = code_strings(table), [], b""
    for start in range(0, len(symbols), CHUNK):
        bits = "".join(strings[symbol] for symbol in symbols[start : start + CHUNK])
        chunk = b"".join(int(bits[i : i + 8][::-1], 2).to_bytes(1, "little") for i in range(0, len(bits), 8))
        sizes.append(len(chunk))
        codes += chunk
    return sizes, codes + bytes(-len(codes) % 8 + PADDING)


def decode_slowly(table: Any, sizes: list[int], codes: bytes, count: int) -> list[int]:
    """The symbols, by comparing the next bits with every code."""
    symbols = {string: symbol for symbol, string in code_strings(table).items()}
    found: list[int] = []
    for chunk, size in enumerate(sizes):
        bits = "".join(f"{byte:08b}"[::-1] for byte in codes[sum(sizes[:chunk]) : sum(sizes[:chunk]) + size])
        start = 0
        for _ in range(min(CHUNK, count - chunk * CHUNK)):
            end = next(end for end in range(start, len(bits) + 1) if bits[start:end] in symbols)
            found.append(symbols[bits[start:end]])
            start = end
        assert len(bits) - start < 8
    return found


def table_of(name: str) -> Any:
    return code_table(np.array(TABLES[name]))


def random_words(table: Any, count: int, dtype: Any, seed: int = 0) -> Any:
    """Words with the symbols of a table, as often as its lengths are for, and random rest."""
    random_ = np.random.default_rng(seed)
    symbols = random_.choice(table[:, 0], count, p=0.5 ** table[:, 1].astype(float)).astype(dtype)
    if dtype == np.uint8:
        return symbols
    rest = random_.integers(0, 256, count).astype(np.uint16)
    return ((rest & 0x80) << 8) | (symbols << 7) | (rest & 0x7F)


def encode(words: Any, table: Any) -> tuple[Any, Any, Any]:
    """Sizes as they are stored, codes and rest."""
    rest = np.empty(words.size if words.itemsize == 2 else 0, np.uint8)
    sizes = huffman.chunk_bytes(huffman.histogram(words), table)
    return sizes.astype(np.uint16), huffman.encode(words, table, sizes, rest), rest


def decode(table: Any, sizes: Any, codes: Any, rest: Any, count: int) -> Any:
    out = np.empty(count, np.uint16 if rest.size else np.uint8)
    huffman.decode(table, sizes, codes, rest, out)
    return out


# Code lengths


@given(st.lists(st.integers(1, 60), min_size=2, max_size=6), st.integers(3, 5))
@QUICK
def test_no_code_within_the_limit_is_shorter(weights: list[int], limit: int) -> None:
    weights.sort()
    lengths = package_merge(weights, limit)
    assert max(lengths) <= limit
    assert sum(1 << (limit - length) for length in lengths) == 1 << limit
    assert cost(weights, lengths) == cheapest(weights, limit)


@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=256))
@QUICK
def test_where_the_limit_does_not_bind_it_is_a_huffman_code(weights: list[int]) -> None:
    weights.sort()
    lengths = package_merge(weights, 64)  # as deep as 10**6 * 256 lets a tree be, and deeper
    assert cost(weights, lengths) == tree_cost(weights)
    assert lengths == sorted(lengths, reverse=True)


def test_the_limit_binds_where_a_huffman_code_is_deeper() -> None:
    fibonacci = [1, 1]
    while len(fibonacci) < 30:
        fibonacci.append(sum(fibonacci[-2:]))
    assert max(package_merge(fibonacci, 64)) == 29
    lengths = package_merge(fibonacci, LIMIT)
    assert max(lengths) == LIMIT
    assert sum(1 << (LIMIT - length) for length in lengths) == 1 << LIMIT
    assert tree_cost(fibonacci) < cost(fibonacci, lengths) < 1.003 * tree_cost(fibonacci)
    for limit in (3, 4):
        assert cost(fibonacci[:6], package_merge(fibonacci[:6], limit)) == cheapest(fibonacci[:6], limit)


def test_the_lengths_of_few_and_of_equal_weights() -> None:
    assert package_merge([], LIMIT) == []
    assert package_merge([7], LIMIT) == [0]
    assert package_merge([1, 10**9], LIMIT) == [1, 1]
    assert package_merge([1, 1, 2, 4], LIMIT) == [3, 3, 2, 1]
    assert package_merge([1] * 256, LIMIT) == [8] * 256
    assert package_merge([1] * 4, 2) == [2] * 4  # the least limit that has room for four


def test_the_table_is_sorted_by_length_and_symbol() -> None:
    counts = np.zeros(256, np.int64)
    counts[[200, 7, 90, 5]] = 8, 2, 1, 4
    assert code_table(counts).tolist() == [[200, 1], [5, 2], [7, 3], [90, 3]]
    assert code_table(counts).dtype == np.uint8
    counts[[90, 5, 7, 200]] = 3, 3, 3, 3
    assert code_table(counts).tolist() == [[5, 2], [7, 2], [90, 2], [200, 2]]


def test_the_table_of_one_symbol_has_length_0_and_of_none_no_row() -> None:
    assert table_of("one symbol").tolist() == [[117, 0]]
    assert code_table(np.zeros(256, np.int64)).shape == (0, 2)


@given(st.lists(st.sampled_from([0, 0, 1, 2, 3, 50, 10**5, 2**40]), min_size=256, max_size=256))
@QUICK
def test_every_table_is_one_that_is_accepted(counts: list[int]) -> None:
    table = code_table(np.array(counts))
    assert sorted(table[:, 0].tolist()) == [symbol for symbol in range(256) if counts[symbol]]
    if any(counts):
        huffman.check_table(table)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [[5, 1]],  # a symbol alone has length 0
        [[5, 0], [6, 0]],
        [[5, 0], [6, 1]],
        [[5, 1], [6, 2]],  # a code without a symbol
        [[5, 1], [6, 1], [7, 1]],  # more codes than there is room for
        [[6, 1], [5, 1]],  # not sorted by symbol
        [[5, 2], [6, 2], [7, 1]],  # not sorted by length
        [[5, 1], [5, 1]],
        [[5, 1], [6, 2], [6, 2]],
        [[5, 1], [6, 2], [5, 2]],  # sorted, and yet twice the same symbol
        [*([i, i] for i in range(1, 13)), [13, 13], [14, 13]],  # longer than 12
        [[5, 1], [6, 255]],
        [[5, 1], [6, 1], [7, 13]],  # complete without the last one
        [[0, 1], *([i % 256, 9] for i in range(256))],
    ],
    ids=str,
)
def test_a_table_that_is_no_complete_code_is_refused(rows: list[list[int]]) -> None:
    table = np.array(rows, np.uint8).reshape(-1, 2)
    with pytest.raises(ValueError, match="the table of code lengths is damaged"):
        huffman.check_table(table)
    with pytest.raises(ValueError, match="the table of code lengths is damaged"):
        decode(table, np.array([1], np.uint16), np.zeros(8 + PADDING, np.uint8), np.zeros(2, np.uint8), 2)


# The stream


def test_a_stream_by_hand() -> None:
    # Lengths 1, 2, 3, 3 give the codes 0, 10, 110, 111 to 10, 20, 30, 40. So 10 20 30 40 10 is 0 10 110 111 0, and with
    # the first bit lowest and eight to a byte: 01011011 -> 2 + 8 + 16 + 64 + 128 = 218, and 10 -> 1.
    table = np.array([[10, 1], [20, 2], [30, 3], [40, 3]], np.uint8)
    symbols = np.array([10, 20, 30, 40, 10])
    sizes, codes, rest = encode(symbols.astype(np.uint8), table)
    assert (sizes.tolist(), codes.tolist(), rest.size) == ([2], [218, 1] + [0] * 14, 0)
    # Of a 16-bit word, bits 7 to 14 are the symbol; bit 15 and the lowest seven are the rest.
    words = np.array([10 << 7, 1 << 15 | 20 << 7, 30 << 7 | 0x7F, 1 << 15 | 40 << 7 | 1, 10 << 7 | 2], np.uint16)
    sizes, codes, rest = encode(words, table)
    assert (sizes.tolist(), codes.tolist()) == ([2], [218, 1] + [0] * 14)
    assert rest.tolist() == [0, 0x80, 0x7F, 0x81, 2]
    assert decode(table, sizes, codes, rest, 5).tolist() == words.tolist()


def test_each_chunk_starts_a_byte() -> None:
    table = np.array([[1, 1], [2, 1]], np.uint8)
    words = np.full(CHUNK + 3, 1, np.uint8)
    words[[CHUNK - 1, CHUNK]] = 2  # one bit each: the last of the first chunk, and the first of the second
    sizes, codes, _ = encode(words, table)
    assert sizes.tolist() == [CHUNK // 8, 1]
    assert codes.tolist() == [0] * (CHUNK // 8 - 1) + [128, 1] + [0] * 15


def test_one_symbol_takes_no_bits() -> None:
    words = np.full(4 * CHUNK + 5, 117 << 7, np.uint16)
    sizes, codes, rest = encode(words, table_of("one symbol"))
    assert (sizes.tolist(), codes.tolist()) == ([0] * 5, [0] * 8)
    assert np.array_equal(decode(table_of("one symbol"), sizes, codes, rest, words.size), words)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint8])
@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("count", COUNTS)
def test_the_bytes_are_those_of_a_slow_encoder_and_the_words_come_back(count: int, name: str, dtype: Any) -> None:
    table = table_of(name)
    words = random_words(table, count, dtype)
    before = words.copy()
    sizes, codes, rest = encode(words, table)
    symbols, slow_rest = split_slowly(words)
    assert (sizes.tolist(), codes.tobytes()) == encode_slowly(symbols, table)
    assert rest.tolist() == slow_rest
    if count <= CHUNK + 1:
        assert decode_slowly(table, sizes.tolist(), codes.tobytes(), count) == symbols
    assert np.array_equal(decode(table, sizes, codes, rest, count), words)
    assert np.array_equal(words, before)


def test_the_tables_above_reach_both_ends_of_what_a_code_can_be() -> None:
    longest = {name: int(table_of(name)[:, 1].max()) for name in TABLES}
    assert longest["all, steep"] == longest["twenty, steep"] == LIMIT
    assert len(table_of("all, steep")) == len(table_of("all alike")) == 256


@pytest.mark.parametrize("dtype", [np.uint16, np.uint8])
def test_look_ups_of_one_and_of_six_symbols_may_end_a_chunk_anywhere(dtype: Any) -> None:
    table = table_of("twenty, steep")
    frequent, rare = table[0, 0], table[-1, 0]
    assert table[[0, -1], 1].tolist() == [1, LIMIT]
    for single in range(48):  # of these a look-up gives one, of the others six
        words = np.full((4, CHUNK), frequent, dtype)
        words[:, :single] = rare
        words[:, CHUNK - single % 3 :] = rare
        words = words.ravel() << (7 if dtype == np.uint16 else 0)
        assert np.array_equal(decode(table, *encode(words, table), words.size), words), single


def test_words_that_all_have_the_longest_code_fit() -> None:
    table = table_of("all, steep")
    words = np.full(4 * CHUNK + 1, table[-1, 0], np.uint8)
    sizes, codes, rest = encode(words, table)
    assert sizes.tolist() == [CHUNK * LIMIT // 8] * 4 + [2]
    assert np.array_equal(decode(table, sizes, codes, rest, words.size), words)


def test_all_16_bit_words_and_all_bytes_survive() -> None:
    for words in (np.arange(1 << 16, dtype=np.uint16), np.arange(1 << 16).astype(np.uint8)):
        table = code_table(huffman.histogram(words).sum(0))
        assert table[:, 1].tolist() == [8] * 256
        assert np.array_equal(decode(table, *encode(words, table), words.size), words)


@given(st.lists(st.integers(0, 255), min_size=1, max_size=300), st.integers(0, 99))
@QUICK
def test_any_bytes_survive_with_the_code_of_their_counts(values: list[int], seed: int) -> None:
    symbols = np.array(values, np.uint8)
    words = symbols.astype(np.uint16) << 7 | np.random.default_rng(seed).integers(0, 2, len(values)).astype(np.uint16)
    for each in (symbols, words):
        table = code_table(huffman.histogram(each).sum(0))
        sizes, codes, rest = encode(each, table)
        assert (sizes.tolist(), codes.tobytes()) == encode_slowly(values, table)
        assert np.array_equal(decode(table, sizes, codes, rest, each.size), each)


@pytest.mark.parametrize("count", COUNTS)
def test_the_histogram_counts_every_symbol_of_every_chunk(count: int) -> None:
    words = np.random.default_rng(count).integers(0, 1 << 16, count).astype(np.uint16)
    for each in (words, words.astype(np.uint8)):
        symbols = split_slowly(each)[0]
        want = [np.bincount(symbols[i : i + CHUNK], minlength=256).tolist() for i in range(0, count, CHUNK)]
        assert huffman.histogram(each).tolist() == want


def test_no_words_make_no_chunks() -> None:
    none = np.empty(0, np.uint16)
    assert huffman.histogram(none).shape == (0, 256)
    table = np.array([[1, 1], [2, 1]], np.uint8)
    sizes, codes, rest = encode(none, table)
    assert (sizes.size, codes.tolist()) == (0, [0] * 8)
    huffman.decode(table, sizes, codes, rest, none)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint8])
@pytest.mark.parametrize(
    "chunks",
    [[], [0], [5], [8], [1, 3], [2, 3, 4, 5], [5, 6, 7, 8], [0, 2, 3, 6, 8], [1, 2, 3, 4, 6, 7], list(range(9))],
    ids=str,
)
def test_some_chunks_decode_without_the_others(chunks: list[int], dtype: Any) -> None:
    table = table_of("all, steep")
    words = random_words(table, 8 * CHUNK + 100, dtype)
    sizes, codes, rest = encode(words, table)
    out = np.zeros(len(chunks) * CHUNK, dtype)
    huffman.decode(table, sizes, codes, rest, out, words.size, np.array(chunks, np.int64))
    for place, chunk in enumerate(chunks):
        part = words[chunk * CHUNK : (chunk + 1) * CHUNK]
        got = out[place * CHUNK : (place + 1) * CHUNK]
        assert np.array_equal(got[: part.size], part)
        assert not got[part.size :].any()


@pytest.mark.parametrize("dtype", [np.uint16, np.uint8])
def test_threads_do_not_change_a_byte(dtype: Any, on_threads: Any) -> None:
    table = table_of("random")
    words = random_words(table, 13 * CHUNK + 77, dtype)

    def made() -> tuple[bytes, ...]:
        sizes, codes, rest = encode(words, table)
        assert np.array_equal(decode(table, sizes, codes, rest, words.size), words)
        return huffman.histogram(words).tobytes(), sizes.tobytes(), codes.tobytes(), rest.tobytes()

    first, *others = on_threads(made)
    assert all(first == other for other in others)


# Damage


@cache
def whole(name: str, dtype: Any) -> tuple[Any, dict[str, Any]]:
    """Words of more than a group of four chunks, and what they are stored as. Not to be changed."""
    table = table_of(name)
    words = random_words(table, 5 * CHUNK + 321, dtype)
    sizes, codes, rest = encode(words, table)
    return words, {"table": table, "sizes": sizes, "codes": codes, "rest": rest}


def before_a_hole(array: Any) -> Any:
    """A copy that ends where memory can neither be read nor written: to go past it ends the process."""
    if not array.size:
        return array
    size = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + size
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    copy = np.frombuffer(memory, array.dtype, array.size, size - array.nbytes).reshape(array.shape)
    copy[:] = array
    return copy


def decode_between_guards(tensors: dict[str, Any], words: Any) -> tuple[Any, bool]:
    """The words that a damaged stream gives, and whether it was refused. All else must neither be read nor changed."""
    room = before_a_hole(np.full(words.size + 64, 0xA5, words.dtype))
    out, before = room[64:], {name: array.copy() for name, array in tensors.items()}
    tensors = {name: before_a_hole(array) for name, array in tensors.items()}
    refused = False
    try:
        huffman.decode(tensors["table"], tensors["sizes"], tensors["codes"], tensors["rest"], out)
    except ValueError:
        refused = True
    assert (room[:64] == 0xA5).all()
    assert all(np.array_equal(array, before[name]) for name, array in tensors.items())
    return out, refused


CASES = [("all, steep", np.uint16), ("all, steep", np.uint8), ("two symbols", np.uint16), ("one symbol", np.uint8)]


@pytest.mark.parametrize("name, dtype", CASES)
def test_a_tensor_cut_off_or_too_long_is_refused(name: str, dtype: Any) -> None:
    words, tensors = whole(name, dtype)
    assert not decode_between_guards(tensors, words)[1]
    for local, array in tensors.items():
        longer = np.concatenate([array, array, array[:1]] if array.size else [np.zeros(3, np.uint8)])
        for size in {0, 1, array.shape[0] // 2, array.shape[0] - 1, array.shape[0] + 1, 2 * array.shape[0]}:
            if 0 <= size <= len(longer) and size != array.shape[0]:
                assert decode_between_guards(tensors | {local: longer[:size]}, words)[1], (local, size)


def gaps(array: Any) -> Any:
    """The same values, every other element of an array."""
    return np.repeat(array, 2, axis=0)[::2]


@pytest.mark.parametrize("name, dtype", CASES)
def test_arrays_of_another_dtype_or_shape_or_with_gaps_are_refused(name: str, dtype: Any) -> None:
    words, tensors = whole(name, dtype)
    for local, array in tensors.items():
        others = [array.astype(other) for other in (np.int8, np.int16, np.int64, np.float32, object, ">u2")]
        others += [gaps(array)] if len(array) > 1 else []
        others += [array[..., None], array[None], np.zeros((), array.dtype)]
        others.append(array.astype(np.uint8 if array.dtype == np.uint16 else np.uint16))
        for other in others:
            with pytest.raises(ValueError, match="damaged"):
                huffman.decode(**(tensors | {local: other}), out=np.empty_like(words))


@pytest.mark.parametrize("name, dtype", CASES)
def test_sizes_below_0_are_refused_though_their_sum_fits(name: str, dtype: Any) -> None:
    words, tensors = whole(name, dtype)
    for far in (1, 2**40, 2**62):
        for change in ([-far, far], [far, -far]):
            for at in (0, 3):
                sizes = tensors["sizes"].astype(np.int64)
                sizes[at : at + 2] += change
                assert sizes.sum() == tensors["sizes"].sum()
                for each in (sizes, sizes.astype(np.uint64), sizes.astype(float)):
                    with pytest.raises(ValueError, match="damaged"):
                        huffman.decode(**(tensors | {"sizes": each}), out=np.empty_like(words))


@pytest.mark.parametrize("name, dtype", CASES[:3])
def test_a_flipped_bit_of_the_codes_harms_no_chunk_but_its_own(name: str, dtype: Any) -> None:
    words, tensors = whole(name, dtype)
    ends = np.cumsum(tensors["sizes"], dtype=np.int64)
    for seed in range(100):
        bit = random.Random(seed).randrange(8 * int(ends[-1]))
        codes = tensors["codes"].copy()
        codes[bit // 8] ^= 1 << bit % 8
        out, _ = decode_between_guards(tensors | {"codes": codes}, words)
        chunk = int(np.searchsorted(ends, bit // 8, "right"))
        inside = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
        fills_up = bit // 8 + 1 in ends  # perhaps: the last byte of a chunk may have bits that belong to no code
        assert fills_up or not np.array_equal(out[inside], words[inside]), seed
        out[inside] = words[inside]
        assert np.array_equal(out, words), seed


@pytest.mark.parametrize("name, dtype", CASES[:3])
def test_damage_is_refused_or_gives_as_many_other_words(name: str, dtype: Any) -> None:
    words, tensors = whole(name, dtype)
    for seed in range(40):
        for damage in damages(tensors, seed):
            if any(not np.array_equal(array, tensors[local]) for local, array in damage.items()):
                out, refused = decode_between_guards(tensors | damage, words)
                assert refused or not np.array_equal(out, words), (seed, damage.keys())


@pytest.mark.parametrize("dtype", [np.uint16, np.uint8])
def test_a_chunk_that_ends_before_or_after_its_last_byte_is_refused(dtype: Any) -> None:
    words, tensors = whole("all, steep", dtype)
    codes, sizes = tensors["codes"], tensors["sizes"]
    assert len(set(sizes.tolist())) == len(sizes)
    moved = np.stack([sizes, sizes])
    moved[:, 1] += np.array([1, 65535], np.uint16)
    moved[:, 2] -= np.array([1, 65535], np.uint16)
    for damage in (
        {"codes": np.where(np.arange(codes.size) < codes.size - PADDING, 255, 0).astype(np.uint8)},  # longest codes
        {"codes": np.zeros_like(codes)},  # shortest codes
        {"codes": np.concatenate([codes[1:], codes[-1:]])},
        {"codes": np.concatenate([codes[:1], codes[:-1]])},
        {"sizes": sizes[::-1].copy()},
        {"sizes": moved[0]},
        {"sizes": moved[1]},
        {"table": table_of("all alike")},
    ):
        assert decode_between_guards(tensors | damage, words)[1]


def damages(tensors: dict[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    """Tensors in place of others, of the same shape or with a table that is complete as well."""
    random_ = np.random.default_rng(seed)
    sizes, total = tensors["sizes"], tensors["codes"].size - PADDING
    noise = np.zeros(total + PADDING, np.uint8)
    noise[:total] = random_.integers(0, 256, total)
    yield {"codes": noise}
    yield {"codes": np.full(total + PADDING, 255 * (seed % 2), np.uint8)}
    yield {"sizes": random_.permutation(sizes)}
    yield {"sizes": random_.permutation(sizes), "codes": noise}
    cuts = np.sort(random_.integers(0, min(total, 65535), len(sizes) - 1))
    yield {"sizes": np.diff(np.concatenate([[0], cuts, [total]])).clip(max=65535).astype(np.uint16)}
    yield {"sizes": np.full(len(sizes), 65535, np.uint16)}
    other = tensors["table"].copy()
    other[:, 0] = random_.choice(256, len(other), replace=False)
    yield {"table": other[np.lexsort((other[:, 0], other[:, 1]))]}
    yield {"table": random_.integers(0, 13, other.shape).astype(np.uint8)}
    for name in TABLES:
        yield {"table": table_of(name)}
        yield {"table": table_of(name), "codes": noise}
    yield {"rest": random_.integers(0, 256, tensors["rest"].size).astype(np.uint8)}


def test_a_damaged_rest_changes_its_own_word_and_no_other() -> None:
    words, tensors = whole("all, steep", np.uint16)
    rest = tensors["rest"].copy()
    rest[CHUNK + 5] ^= 0x81
    out, refused = decode_between_guards(tensors | {"rest": rest}, words)
    assert not refused
    assert np.flatnonzero(out != words).tolist() == [CHUNK + 5]
    assert out[CHUNK + 5] ^ words[CHUNK + 5] == 0x8001


@pytest.mark.parametrize("name", ["two symbols", "three symbols", "all, steep"])
def test_words_that_change_after_they_were_counted_overrun_nothing(name: str) -> None:
    table = table_of(name)
    words = random_words(table, 4 * CHUNK + 9, np.uint16)
    sizes = huffman.chunk_bytes(huffman.histogram(words), table)
    rest = np.empty(words.size, np.uint8)
    unknown = np.full(words.size, 60 << 7, np.uint16)
    if name == "all, steep":  # a code of 12 bits for each word is more than was counted
        with pytest.raises(ValueError):
            huffman.encode(unknown, table, sizes, rest)
    else:
        assert huffman.encode(unknown, table, sizes, rest).tolist() == [0] * padded(sizes.sum())
