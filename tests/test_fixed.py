"""The fixed-length coder against the words of its layout, one element at a time."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.formats import fixed
from compress.formats.fixed import BLOCK, BLOCK_BYTES, WINDOW
from compress.formats.huffman import CHUNK

QUICK = settings(deadline=None, derandomize=True, database=None, max_examples=60)
COUNTS = [1, 2, 7, 63, 64, 65, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK - 5, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 300]
BASES = [0, 1, 117, 247, 248]


def word(symbol: int, rest: int = 0) -> int:
    """Bits 7 to 14 are the symbol; bit 15 and the lowest seven are the rest."""
    return (rest & 0x80) << 8 | symbol << 7 | (rest & 0x7F)


def random_words(base: int, count: int, escapes: float, seed: int = 0) -> Any:
    """Words with any rest, whose symbols are one of the eight from base on, or for a share of about `escapes` any."""
    random_ = np.random.default_rng(seed)
    symbols = np.where(
        random_.random(count) < escapes, random_.integers(0, 256, count), base + random_.integers(0, 8, count)
    )
    rest = random_.integers(0, 256, count)
    return ((rest & 0x80) << 8 | symbols << 7 | rest & 0x7F).astype(np.uint16)


def encode_slowly(words: Any, base: int) -> tuple[list[list[int]], list[int], list[int], list[int]]:
    """Codes, counts, escapes and rest, element by element."""
    codes: list[list[int]] = []
    counts: list[int] = []
    escapes: list[int] = []
    for start in range(0, len(words), BLOCK):
        block, count = [0] * 96, 0
        for i, value in enumerate(words[start : start + BLOCK].tolist()):
            symbol = (value >> 7) & 0xFF
            code = symbol - base
            if not 0 <= code <= 7:
                escapes.append(i << 8 | symbol)
                count, code = count + 1, 0
            block[i % 64] |= (code & 3) << 2 * (i // 64)
            block[64 + i % 32] |= (code >> 2) << i // 32
        codes.append(block)
        counts.append(count)
    rest = [(value >> 8) & 0x80 | value & 0x7F for value in words.tolist()]
    return codes, counts, escapes, rest


def decode_slowly(base: int, codes: Any, counts: Any, escapes: Any, rest: Any) -> list[int]:
    """Any element from its own bits alone, and then the escapes."""
    words = []
    for i, low in enumerate(rest.tolist()):
        block, place = codes[i // BLOCK].tolist(), i % BLOCK
        code = block[place % 64] >> 2 * (place // 64) & 3 | (block[64 + place % 32] >> place // 32 & 1) << 2
        words.append(word(base + code, low))
    listed = iter(escapes.tolist())
    for block, count in enumerate(counts.tolist()):
        for _ in range(count):
            escape = next(listed)
            i = block * BLOCK + (escape >> 8)
            words[i] = word(escape & 255, int(rest[i]))
    return words


def encode(words: Any, base: int) -> dict[str, Any]:
    rest = np.empty(words.size, np.uint8)
    codes, counts, escapes = fixed.encode(words, base, rest)
    return {"base": base, "codes": codes, "counts": counts, "escapes": escapes, "rest": rest}


def decode(tensors: dict[str, Any], count: int) -> Any:
    out = np.empty(count, np.uint16)
    fixed.decode(**tensors, out=out)
    return out


# The window


@given(st.lists(st.integers(0, 9), min_size=256, max_size=256))
@QUICK
def test_no_window_covers_more(counts: list[int]) -> None:
    base = fixed.window(np.array(counts))
    sums = [sum(counts[start : start + WINDOW]) for start in range(256 - WINDOW + 1)]
    assert sums[base] == max(sums)
    assert base == sums.index(max(sums))


def test_the_window_reaches_both_ends_of_the_range() -> None:
    counts = np.zeros(256, np.int64)
    assert fixed.window(counts) == 0
    counts[[0, 7]] = 1, 1
    assert fixed.window(counts) == 0
    counts[[248, 255]] = 2**40, 2**40
    assert fixed.window(counts) == 248


# The layout


def test_a_block_by_hand() -> None:
    symbols = [100] * BLOCK  # code 0
    # low two bits: byte l has those of l, l + 64, l + 128, l + 192 from bit 0, 2, 4, 6 on
    symbols[0], symbols[64], symbols[128], symbols[192] = 101, 107, 102, 106  # 1, 7 = 3 + 4, 2, 6 = 2 + 4
    symbols[255] = 103  # 3
    symbols[33], symbols[34] = 99, 108  # one below and one above the window: escapes
    words = np.array([word(symbol) for symbol in symbols], np.uint16)
    tensors = encode(words, 100)
    low, high = [0] * 64, [0] * 32
    low[0] = 1 | 3 << 2 | 2 << 4 | 2 << 6
    low[63] = 3 << 6
    # high bit: byte l has those of l, l + 32, l + 64, ... from bit 0 on
    high[0] = 1 << 2 | 1 << 6  # elements 64 and 192
    assert tensors["codes"].tolist() == [low + high]
    assert tensors["counts"].tolist() == [2]
    assert tensors["escapes"].tolist() == [33 << 8 | 99, 34 << 8 | 108]
    assert tensors["rest"].tolist() == [0] * BLOCK
    assert [tensors[name].dtype for name in ("codes", "counts", "escapes")] == [np.uint8, np.uint16, np.uint16]
    assert decode(tensors, BLOCK).tolist() == words.tolist()


def test_sign_and_mantissa_lie_apart() -> None:
    words = np.array([word(5, 0x80), word(5, 0x7F), word(255, 0xFF), word(0, 1)], np.uint16)
    tensors = encode(words, 5)
    assert tensors["rest"].tolist() == [0x80, 0x7F, 0xFF, 1]
    assert tensors["codes"].tolist() == [[0] * 96]
    assert tensors["escapes"].tolist() == [2 << 8 | 255, 3 << 8]
    assert decode(tensors, 4).tolist() == words.tolist()


@pytest.mark.parametrize("escapes", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("count", COUNTS)
def test_the_tensors_are_those_of_a_slow_encoder_and_the_words_come_back(count: int, base: int, escapes: float) -> None:
    words = random_words(base, count, escapes, seed=count)
    before = words.copy()
    tensors = encode(words, base)
    slow = encode_slowly(words, base)
    assert tuple(tensors[name].tolist() for name in ("codes", "counts", "escapes", "rest")) == slow
    assert tensors["codes"].shape == (-(-count // BLOCK), BLOCK_BYTES)
    if count <= CHUNK + 1:
        assert decode_slowly(**tensors) == words.tolist()
    assert np.array_equal(decode(tensors, count), words)
    assert np.array_equal(words, before)


@pytest.mark.parametrize("base", BASES)
def test_blocks_of_nothing_but_escapes_survive(base: int) -> None:
    outside = [symbol for symbol in range(256) if not base <= symbol < base + WINDOW]
    symbols = np.array([outside[i % len(outside)] for i in range(3 * BLOCK + 9)])
    symbols[BLOCK : 2 * BLOCK] = base + 3  # between them a block with none
    words = (symbols << 7).astype(np.uint16)
    tensors = encode(words, base)
    assert tensors["counts"].tolist() == [BLOCK, 0, BLOCK, 9]
    assert np.array_equal(decode(tensors, words.size), words)


@pytest.mark.parametrize("base", BASES)
def test_all_16_bit_words_survive(base: int) -> None:
    words = np.arange(1 << 16, dtype=np.uint16)
    assert np.array_equal(decode(encode(words, base), words.size), words)


@given(st.lists(st.integers(0, 65535), max_size=600), st.integers(0, 256 - WINDOW))
@QUICK
def test_any_words_survive(values: list[int], base: int) -> None:
    words = np.array(values, np.uint16)
    assert np.array_equal(decode(encode(words, base), words.size), words)


def test_codes_past_the_last_word_are_0() -> None:
    words = np.full(BLOCK + 1, word(107), np.uint16)
    codes = encode(words, 100)["codes"]
    assert codes[0].tolist() == [255] * 96
    assert codes[1].tolist() == [3] + [0] * 63 + [1] + [0] * 31


def test_no_words_make_no_blocks() -> None:
    tensors = encode(np.empty(0, np.uint16), 9)
    assert tensors["codes"].shape == (0, BLOCK_BYTES)
    assert tensors["counts"].size == tensors["escapes"].size == decode(tensors, 0).size == 0


@pytest.mark.parametrize("chunks", [[], [0], [4], [1, 3], [0, 1, 2, 3, 4], [2, 4]], ids=str)
def test_some_chunks_decode_without_the_others(chunks: list[int]) -> None:
    words = random_words(117, 4 * CHUNK + 300, 0.05)
    out = np.zeros(len(chunks) * CHUNK, np.uint16)
    fixed.decode(**encode(words, 117), out=out, count=words.size, chunks=np.array(chunks, np.int64))
    for place, chunk in enumerate(chunks):
        part = words[chunk * CHUNK : (chunk + 1) * CHUNK]
        got = out[place * CHUNK : (place + 1) * CHUNK]
        assert np.array_equal(got[: part.size], part)
        assert not got[part.size :].any()


def test_threads_do_not_change_a_byte(on_threads: Any) -> None:
    words = random_words(117, 13 * CHUNK + 77, 0.05)

    def made() -> list[bytes]:
        tensors = encode(words, 117)
        assert np.array_equal(decode(tensors, words.size), words)
        return [tensors[name].tobytes() for name in ("codes", "counts", "escapes", "rest")]

    first, *others = on_threads(made)
    assert all(first == other for other in others)


# Damage


def decode_between_guards(tensors: dict[str, Any], count: int) -> tuple[Any, bool]:
    """The words that damaged tensors give, and whether they were refused; what lies around must not change."""
    room = np.full(count + 128, 0xA5A5, np.uint16)
    out, refused = room[64:-64], False
    before = {name: np.copy(value) for name, value in tensors.items()}
    try:
        fixed.decode(**tensors, out=out)
    except ValueError:
        refused = True
    assert (room[:64] == 0xA5A5).all() and (room[-64:] == 0xA5A5).all()
    assert all(np.array_equal(value, before[name]) for name, value in tensors.items())
    return out, refused


WORDS = random_words(117, CHUNK + 3 * BLOCK + 100, 0.02)


def test_a_tensor_cut_off_or_too_long_is_refused() -> None:
    tensors = encode(WORDS, 117)
    assert not decode_between_guards(tensors, WORDS.size)[1]
    for local in ("codes", "counts", "escapes", "rest"):
        array = tensors[local]
        for size in (0, 1, len(array) // 2, len(array) - 1, len(array) + 1, 2 * len(array)):
            other = np.concatenate([array, np.full_like(array, 1)])[:size]  # a block more has an escape more
            assert decode_between_guards(tensors | {local: other}, WORDS.size)[1], (local, size)
    assert decode_between_guards(tensors | {"codes": tensors["codes"][:, :-1]}, WORDS.size)[1]
    for base in (249, 255):
        assert decode_between_guards(tensors | {"base": base}, WORDS.size)[1]


def test_arrays_of_another_dtype_or_shape_or_with_gaps_are_refused() -> None:
    tensors = encode(WORDS, 117)
    for local in ("codes", "counts", "escapes", "rest"):
        array = tensors[local]
        others = [array.astype(other) for other in (np.int8, np.int16, np.int64, np.float32, object, ">u2")]
        others += [np.repeat(array, 2, axis=0)[::2], array[..., None], array[None], array.ravel()[:1].reshape(())]
        others.append(array.astype(np.uint8 if array.dtype == np.uint16 else np.uint16))
        for other in others:
            with pytest.raises(ValueError, match="damaged"):
                decode(tensors | {local: other}, WORDS.size)
    for base in (-1, -(2**40), 256, 2**40):
        with pytest.raises(ValueError, match="damaged"):
            decode(tensors | {"base": base}, WORDS.size)


def test_counts_below_0_are_refused_though_their_sum_fits() -> None:
    tensors = encode(WORDS, 117)
    for far in (300, 2**40, 2**62):
        for change in ([-far, far], [far, -far]):
            counts = tensors["counts"].astype(np.int64)
            counts[5:7] += change
            assert counts.sum() == tensors["escapes"].size
            for each in (counts, counts.astype(np.uint64), counts.astype(float)):
                with pytest.raises(ValueError, match="damaged"):
                    decode(tensors | {"counts": each}, WORDS.size)


def test_a_flipped_bit_changes_one_word() -> None:
    tensors = encode(WORDS, 117)
    for seed in range(200):
        random_ = np.random.default_rng(seed)
        block, byte, bit = (int(random_.integers(0, most)) for most in (CHUNK // BLOCK, BLOCK_BYTES, 8))
        i = block * BLOCK + (byte + 64 * (bit // 2) if byte < 64 else byte - 64 + 32 * bit)
        codes = tensors["codes"].copy()
        codes[block, byte] ^= 1 << bit
        out, refused = decode_between_guards(tensors | {"codes": codes}, WORDS.size)
        assert not refused
        escaped = not 117 <= int(WORDS[i]) >> 7 & 0xFF < 125  # its code does not count
        assert np.flatnonzero(out != WORDS).tolist() == ([] if escaped else [i]), seed


def test_damage_is_refused_or_gives_as_many_other_words() -> None:
    tensors = encode(WORDS, 117)
    for seed in range(100):
        for damage in damages(tensors, seed):
            out, refused = decode_between_guards(tensors | damage, WORDS.size)
            assert refused or not np.array_equal(out, WORDS), (seed, damage.keys())


def damages(tensors: dict[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    """Tensors in place of others, of the same shape and, for some of the counts, with the same sum."""
    random_ = np.random.default_rng(seed)
    counts, escapes = tensors["counts"], tensors["escapes"]
    yield {"base": int(random_.integers(0, 117))}
    yield {"codes": random_.integers(0, 256, tensors["codes"].shape).astype(np.uint8)}
    yield {"rest": random_.integers(0, 256, tensors["rest"].shape).astype(np.uint8)}
    yield {"escapes": random_.integers(0, 65536, escapes.shape).astype(np.uint16)}
    yield {"escapes": np.full(escapes.shape, 255 << 8, np.uint16)}  # past the end of the last, shorter block
    yield {"counts": random_.permutation(counts)}
    cuts = np.sort(random_.integers(0, escapes.size, len(counts) - 1))
    yield {"counts": np.diff(np.concatenate([[0], cuts, [escapes.size]])).astype(np.uint16)}
    everything = np.zeros_like(counts)
    everything[random_.integers(0, len(counts))] = escapes.size  # more than a block has words
    yield {"counts": everything}
    yield {"counts": random_.integers(0, 65536, counts.shape).astype(np.uint16)}
