"""The Triton kernels of df11 in Triton's interpreter, on the CPU. Run by
test_interpreted_kernels.py.

The encoders here follow the description of the layout, one element at a time.
"""

import interpreted
import numpy as np
import pytest
import torch
from torch import Tensor

from compress.df11 import Df11
from compress.kernels import df11, df11_triton
from compress.kernels import prepared as prepared_kernels

pytestmark = pytest.mark.filterwarnings(*interpreted.WARNINGS)


def split(words: Tensor) -> tuple[list[int], Tensor]:
    """words: int16. Returns the symbols, flat, and sign_mantissa in the shape of words."""
    bits = words.to(torch.int32) & 0xFFFF
    return ((bits >> 7) & 0xFF).flatten().tolist(), ((bits >> 8) & 0x80 | bits & 0x7F).to(torch.uint8)


def encode_fixed(words: Tensor, base: int) -> dict[str, Tensor]:
    symbols, sign_mantissa = split(words)
    codes = np.zeros((-(-len(symbols) // 256), 96), np.uint8)
    counts, escapes = np.zeros(len(codes), np.uint16), []
    for element, symbol in enumerate(symbols):
        block, at = divmod(element, 256)
        code = symbol - base
        if not 0 <= code <= 7:
            escapes.append(at << 8 | symbol)
            counts[block] += 1
            code = 0
        codes[block, at % 64] |= (code & 3) << (2 * (at // 64))
        codes[block, 64 + at % 32] |= (code >> 2) << (at // 32)
    return {
        "sign_mantissa": sign_mantissa,
        "codes": torch.from_numpy(codes),
        "base": torch.tensor([base], dtype=torch.uint8),
        "escape_counts": torch.from_numpy(counts),
        "escapes": torch.from_numpy(np.array(escapes, np.uint16)),
    }


def canonical(lengths: dict[int, int]) -> dict[int, str]:
    """symbol -> its code, first bit first, in the order of the table."""
    codes, code, previous = {}, 0, 0
    for length, symbol in sorted((length, symbol) for symbol, length in lengths.items()):
        code <<= length - previous
        codes[symbol] = f"{code:0{length}b}" if length else ""
        code, previous = code + 1, length
    return codes


def encode_huffman(symbols: list[int], lengths: dict[int, int], chunk: int) -> dict[str, Tensor]:
    codes, stream, sizes = canonical(lengths), bytearray(), []
    for first in range(0, len(symbols), chunk):
        bits = "".join(codes[symbol] for symbol in symbols[first : first + chunk])
        octets = [bits[i : i + 8] for i in range(0, len(bits), 8)]
        stream += bytes(int(octet[::-1], 2) for octet in octets)
        sizes.append(len(octets))
    return {
        "table": torch.tensor([(symbol, lengths[symbol]) for symbol in codes], dtype=torch.uint8),
        "chunk_bytes": torch.from_numpy(np.array(sizes, np.uint16)),
        "codes": torch.frombuffer(stream + bytes(-len(stream) % 8 + 8), dtype=torch.uint8).clone(),
    }


def best_base(words: Tensor) -> int:
    counts = np.bincount(split(words)[0], minlength=256)
    return max(range(249), key=lambda base: int(counts[base : base + 8].sum()))


def gaussian(*shape: int) -> Tensor:
    return (torch.randn(shape) * 0.02).bfloat16()


def with_odd_values(weight: Tensor) -> Tensor:
    """Zeros, denormals, huge and tiny values among the others, and a row that has nothing but such."""
    odd = torch.tensor([0.0, -0.0, 1e-40, -2e-39, 3.0, -700.0, 2e30, 1e-20]).bfloat16()
    flat = weight.flatten()
    flat[::11] = odd.repeat(-(-flat.numel() // 8))[: flat[::11].numel()]
    weight = flat.view(weight.shape)
    if weight.shape[0] > 1:
        weight[-1] = odd[:4].repeat(-(-weight.shape[1] // 4))[: weight.shape[1]]
    return weight


def assert_is_product(y: Tensor, x: Tensor, weight: Tensor, base: int, bias: Tensor | None = None) -> None:
    """y is x @ weight.T up to roundings.

    Each product may be off by 2**-24 of itself, and an escape's by as much of what the main loop takes it for; a sum of
    K <= 4352 terms adds K of them in the worst order, and less than 16 in practice. Rounding y drops at most 2**-7
    of it (bf16, which the interpreter cuts off).
    """
    exact = x.double() @ weight.double().T
    taken = torch.full_like(weight.double(), 2.0 ** (base - 126))
    scale = x.double().abs() @ weight.double().abs().maximum(taken).T
    if bias is not None:
        exact += bias.double()
        scale += bias.double().abs()
    assert torch.equal(y.isnan(), exact.isnan())
    assert torch.equal(y.isinf(), exact.to(y.dtype).isinf())
    finite = exact.to(y.dtype).isfinite()
    rounding = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 0.0}[y.dtype]
    allowed = 16 * 2**-24 * scale + rounding * exact.abs() + torch.finfo(y.dtype).tiny
    off = (y.double() - exact).abs() <= allowed
    assert off[finite].all()
    assert torch.equal(y.sign()[y.isinf()], exact.sign()[y.isinf()].to(y.dtype))


SHAPES = [(1, 1), (3, 5), (33, 96), (64, 256), (130, 257), (16, 512), (7, 1024)]


@pytest.mark.parametrize("shape", [*SHAPES, (5,), (2, 3, 300), (2, 2304), (40, 256)], ids=str)
def test_fixed_decodes_to_the_same_bits(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    words = gaussian(*shape).view(torch.int16)
    weight = df11_triton.prepare_fixed(encode_fixed(words, best_base(words)), "cpu")
    assert torch.equal(df11_triton.decode_fixed(weight).view(shape), words)


@pytest.mark.parametrize("shape", [(9, 100), (4, 512)], ids=str)
def test_any_bits_with_any_window_decode_to_the_same_bits(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    words = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16)
    for base in (0, 100, 248):
        weight = df11_triton.prepare_fixed(encode_fixed(words, base), "cpu")
        assert torch.equal(df11_triton.decode_fixed(weight), words)


def test_fixed_by_hand() -> None:
    """1.5 is 0x3FC0: sign 0, symbol 127, mantissa 0x40; -0.0 is 0x8000: symbol 0, an escape."""
    tensors = {
        "sign_mantissa": torch.tensor([[0x40, 0x80, 0x80]], dtype=torch.uint8),
        "codes": torch.zeros(1, 96, dtype=torch.uint8),
        "base": torch.tensor([122], dtype=torch.uint8),
        "escape_counts": torch.tensor([1], dtype=torch.uint16),
        "escapes": torch.tensor([1 << 8], dtype=torch.uint16),
    }
    tensors["codes"][0, [0, 2, 64, 66]] = torch.tensor([1, 2, 1, 0], dtype=torch.uint8)  # codes 5, 0, 2
    weight = df11_triton.prepare_fixed(tensors, "cpu")
    assert df11_triton.decode_fixed(weight).view(torch.bfloat16).tolist() == [[1.5, -0.0, -(2.0**-3)]]
    assert df11_triton.linear_fixed(torch.tensor([[2.0, 7.0, 8.0]]), weight).tolist() == [[2.0]]


PRODUCTS = [
    ((1, 1), 65),
    ((3, 5), 1),
    ((33, 96), 3),
    ((20, 256), 1),
    ((70, 257), 17),
    ((16, 512), 64),
    ((7, 1024), 16),
]


@pytest.mark.parametrize(("shape", "tokens"), PRODUCTS, ids=str)
def test_linear_is_the_product_in_float64(shape: tuple[int, int], tokens: int) -> None:
    torch.manual_seed(tokens)
    weight = with_odd_values(gaussian(*shape)) if tokens in (1, 17) else gaussian(*shape)
    words = weight.view(torch.int16)
    prepared = df11_triton.prepare_fixed(encode_fixed(words, best_base(words)), "cpu")
    x = torch.randn(tokens, shape[1]).bfloat16()
    assert_is_product(df11_triton.linear_fixed(x, prepared), x, weight, best_base(words))


@pytest.mark.parametrize(
    ("programs", "shape"), [(1, (7, 512)), (2, (5, 2304)), (512, (1, 4352))], ids=["four rows", "two rows", "K split"]
)
def test_one_token_on_grids_of_any_kind(programs: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows to a program, two, or one with K in two parts."""
    monkeypatch.setattr(df11_triton, "PROGRAMS", programs)
    torch.manual_seed(0)
    weight = with_odd_values(gaussian(*shape))
    words = weight.view(torch.int16)
    prepared = df11_triton.prepare_fixed(encode_fixed(words, best_base(words)), "cpu")
    x, bias = torch.randn(1, shape[1]).bfloat16(), torch.randn(shape[0]).bfloat16()
    assert_is_product(df11_triton.linear_fixed(x, prepared, bias), x, weight, best_base(words), bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(6, 512), (9, 100)], ids=str)
def test_linear_takes_other_dtypes_a_bias_and_more_dimensions(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = gaussian(*shape)
    words = weight.view(torch.int16)
    prepared = df11_triton.prepare_fixed(encode_fixed(words, best_base(words)), "cpu")
    bias = torch.randn(shape[0]).to(dtype)
    for leading in ((1,), (2, 3)):
        x = torch.randn(*leading, shape[1]).to(dtype)
        y = df11_triton.linear_fixed(x, prepared, bias)
        assert y.shape == (*leading, shape[0]) and y.dtype == dtype
        assert_is_product(y.flatten(0, -2), x.flatten(0, -2), weight, best_base(words), bias)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("shape", [(8, 256), (8, 100)], ids=str)
def test_infinities_and_nan_in_the_weight_come_out_as_in_a_product(shape: tuple[int, int], tokens: int) -> None:
    torch.manual_seed(0)
    weight = gaussian(*shape)
    weight[0, 3], weight[1, 4], weight[2, 5] = float("inf"), float("-inf"), float("nan")
    weight[3, 6], weight[3, 70], weight[4, 7] = float("inf"), float("-inf"), 3.38e38
    words = weight.view(torch.int16)
    x = torch.randn(tokens, shape[1])
    x[0, 4] = 0  # times an infinity is NaN
    x[:, 6] = x[:, 70] = 1  # infinity - infinity is NaN
    # With a window from 248 on, infinities have codes and all others are escapes, for which 2**121 and more is taken.
    for base, rows in ((best_base(words), 8), (248, 4)):
        prepared = df11_triton.prepare_fixed(encode_fixed(words, base), "cpu")
        y = df11_triton.linear_fixed(x, prepared)[:, :rows]
        exact = x.double() @ weight[:rows].double().T
        assert torch.equal(y.isnan(), exact.isnan()) and y[0, 1].isnan() and y[:, 3].isnan().all()
        assert torch.equal(y.isinf(), exact.float().isinf())
        assert torch.equal(y.sign()[y.isinf()], exact.sign()[y.isinf()].float())


def test_x_of_zeros_gives_zeros() -> None:
    words = gaussian(5, 512).view(torch.int16)
    prepared = df11_triton.prepare_fixed(encode_fixed(words, best_base(words)), "cpu")
    for tokens in (1, 2):
        y = df11_triton.linear_fixed(torch.zeros(tokens, 512).bfloat16(), prepared, torch.arange(5.0).bfloat16())
        assert torch.equal(y, torch.arange(5.0).bfloat16().expand(tokens, 5))


def test_empty_weights_and_no_tokens() -> None:
    empty = torch.empty(0, 256, dtype=torch.int16)
    prepared = df11_triton.prepare_fixed(encode_fixed(empty, 0), "cpu")
    assert df11_triton.decode_fixed(prepared).shape == (0, 256)
    assert df11_triton.linear_fixed(torch.ones(2, 256), prepared).shape == (2, 0)
    words = gaussian(2, 256).view(torch.int16)
    prepared = df11_triton.prepare_fixed(encode_fixed(words, 110), "cpu")
    assert df11_triton.linear_fixed(torch.ones(0, 256), prepared).shape == (0, 2)


def test_rows_longer_than_16_bits_count() -> None:
    torch.manual_seed(0)
    words = gaussian(1, 66_000).view(torch.int16)
    words[0, -1] = 0
    prepared = df11_triton.prepare_fixed(encode_fixed(words, best_base(words)), "cpu")
    assert prepared.escapes.dtype == torch.int64
    assert torch.equal(df11_triton.decode_fixed(prepared), words)


def test_damaged_fixed_codes_are_refused() -> None:
    tensors = encode_fixed(torch.zeros(2, 256, dtype=torch.int16), 100)
    for name, wrong in (
        ("codes", torch.zeros(1, 96, dtype=torch.uint8)),
        ("base", torch.tensor([249], dtype=torch.uint8)),
        ("escape_counts", torch.tensor([256, 255], dtype=torch.uint16)),
        ("escape_counts", torch.tensor([512], dtype=torch.uint16)),
        ("escapes", torch.zeros(512, dtype=torch.uint16)),
    ):
        with pytest.raises(ValueError, match=name.split("_")[0]):
            df11_triton.prepare_fixed({**tensors, name: wrong}, "cpu")
    short = encode_fixed(torch.zeros(1, 300, dtype=torch.int16), 100)
    last = short["escapes"].to(torch.int32)
    last[-1] += 1 << 8  # one past the end
    with pytest.raises(ValueError, match="past the last element"):
        df11_triton.prepare_fixed({**short, "escapes": last.to(torch.uint16)}, "cpu")
    with pytest.raises(ValueError, match="in_features is 256"):
        df11_triton.linear_fixed(torch.ones(1, 255), df11_triton.prepare_fixed(tensors, "cpu"))


CODES = {
    "long codes": {100 + i: min(i + 1, 12) for i in range(13)},
    "of eight bits": {i: 8 for i in range(256)},
    "of a Gaussian": {120: 2, 121: 2, 119: 2, 118: 3, 117: 4, 116: 5, 115: 6, 114: 7, 0: 8, 255: 8},
    "two": {0: 1, 255: 1},
    "one": {77: 0},
}


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Chunks of 256 symbols: a lane walks through a whole one, and the interpreter takes 4 ms for each step."""
    monkeypatch.setattr(df11_triton, "CHUNK", 256)
    monkeypatch.setattr(df11_triton, "SEGMENT", 32)
    monkeypatch.setattr(df11_triton, "GROUP", 4)
    return 256


@pytest.mark.parametrize("name", ["long codes", "of eight bits", "one"])
def test_huffman_decodes_to_the_same_bits(name: str, short_chunks: int) -> None:
    torch.manual_seed(0)
    lengths = CODES[name]
    for shape in ((3, 347), (1,)):
        words = torch.randint(-(2**15), 2**15, shape, dtype=torch.int32)
        symbols = torch.tensor(list(lengths))[torch.randint(len(lengths), shape)]
        words = (words & ~0x7F80 | symbols << 7).to(torch.int16)
        flat, sign_mantissa = split(words)
        tensors = encode_huffman(flat, lengths, short_chunks) | {"sign_mantissa": sign_mantissa}
        prepared = df11_triton.prepare_huffman(tensors, "cpu")
        assert torch.equal(df11_triton.decode_huffman(prepared), words)


def test_segments_begin_where_the_lengths_say(short_chunks: int) -> None:
    torch.manual_seed(0)
    lengths = CODES["long codes"]
    symbols = [100 + int(i) for i in torch.randint(13, (600,))]
    tensors = encode_huffman(symbols, lengths, short_chunks)
    tensors["like"] = torch.empty(0, 600, dtype=torch.float8_e4m3fn)
    prepared = df11_triton.prepare_huffman(tensors, "cpu")
    starts, bit = [], 0
    for element, symbol in enumerate(symbols):
        if element % short_chunks == 0:
            bit = -(-bit // 8) * 8
        if element % 32 == 0:
            starts.append(bit)
        bit += lengths[symbol]
    found = prepared.groups.repeat_interleave(4)[: len(starts)] + prepared.segments.long()
    assert found.tolist() == starts
    assert prepared.groups.tolist() == starts[::4]
    assert df11_triton.decode_huffman(prepared).tolist() == symbols  # and words of 8 bits have no sign_mantissa


def test_positions_past_the_stream_read_nothing_there(short_chunks: int) -> None:
    lengths = CODES["of a Gaussian"]
    tensors = encode_huffman([120] * 512, lengths, short_chunks) | {"like": torch.empty(0, 512, dtype=torch.uint8)}
    prepared = df11_triton.prepare_huffman(tensors, "cpu")
    for wrong in (1 << 50, -(1 << 50), 8 * tensors["codes"].numel() - 1):
        prepared.groups[1] = wrong
        out = df11_triton.decode_huffman(prepared)
        assert (out[:128] == 120).all() and (out[256:] == 120).all()


def test_damaged_huffman_codes_are_refused(short_chunks: int) -> None:
    tensors = encode_huffman([0, 255] * 256, CODES["two"], short_chunks)
    tensors["like"] = torch.empty(0, 512, dtype=torch.uint8)
    for name, wrong in (
        ("codes", tensors["codes"][:-1]),
        ("chunk_bytes", tensors["chunk_bytes"][:1]),
        ("table", torch.tensor([[0, 1], [1, 2]], dtype=torch.uint8)),
    ):
        with pytest.raises(ValueError, match="chunk_bytes: do not belong|table of code lengths is damaged"):
            df11_triton.prepare_huffman({**tensors, name: wrong}, "cpu")


def flipped(tensors: dict[str, Tensor], bit: int) -> dict[str, Tensor]:
    codes = tensors["codes"].clone()
    codes[bit // 8] ^= 1 << bit % 8
    return {**tensors, "codes": codes}


def is_refused(tensors: dict[str, Tensor]) -> bool:
    try:
        df11_triton.prepare_huffman(tensors, "cpu")
    except ValueError as error:
        assert str(error) == "the codes are damaged; download the checkpoint again"
        return True
    return False


def chunks_fit(tensors: dict[str, Tensor], lengths: dict[int, int], count: int, chunk: int) -> bool:
    """Whether each chunk's codes end in the last of its bytes, read bit by bit."""
    symbols = {code: symbol for symbol, code in canonical(lengths).items()}
    stream = "".join(f"{byte:08b}"[::-1] for byte in tensors["codes"].tolist()) + "0" * 12 * chunk
    start, fits = 0, True
    for c, size in enumerate(tensors["chunk_bytes"].tolist()):
        bit = 8 * start
        for _ in range(min(chunk, count - c * chunk)):
            bit += next(n for n in range(1, 13) if stream[bit : bit + n] in symbols)
        start += size
        fits = fits and -(-bit // 8) == start
    return fits


@pytest.fixture
def tiny_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(df11_triton, "CHUNK", 16)
    monkeypatch.setattr(df11_triton, "SEGMENT", 8)
    monkeypatch.setattr(df11_triton, "GROUP", 1)
    return 16


@pytest.mark.parametrize("count", [33, 46], ids=str)
def test_flipped_bits_are_refused_where_a_chunk_no_longer_ends_with_its_bytes(count: int, tiny_chunks: int) -> None:
    torch.manual_seed(count)
    lengths = CODES["long codes"]
    symbols = [100 + int(i) for i in torch.randint(13, (count - 1,))] + [112]
    symbols[tiny_chunks - 1] = 112  # a code that becomes two leaves these 12 bits over
    tensors = encode_huffman(symbols, lengths, tiny_chunks) | {"like": torch.empty(0, count, dtype=torch.uint8)}
    assert not is_refused(tensors)
    bits = 8 * int(tensors["chunk_bytes"].int().sum())
    found = []
    for bit in [*range(0, bits, bits // 5), *range(bits - 5, bits)]:
        damaged = flipped(tensors, bit)
        found.append(is_refused(damaged))
        assert found[-1] == (not chunks_fit(damaged, lengths, count, tiny_chunks)), bit
    assert True in found and False in found  # some flips only change symbols


def test_the_cpu_refuses_the_same_codes(tiny_chunks: int) -> None:
    torch.manual_seed(0)
    lengths = CODES["long codes"]
    symbols = [100 + int(i) for i in torch.randint(13, (14,))] + [112]
    tensors = encode_huffman(symbols, lengths, tiny_chunks) | {"like": torch.empty(0, 15, dtype=torch.uint8)}
    found = []
    for bit in range(0, 8 * int(tensors["chunk_bytes"].int().sum()), 5):
        damaged = flipped(tensors, bit)
        found.append(is_refused(damaged))
        if found[-1]:
            with pytest.raises(ValueError, match="^the codes are damaged; download the checkpoint again$"):
                df11.decode(damaged, 15)
        else:
            df11.decode(damaged, 15)
    assert True in found and False in found


def test_bytes_of_a_code_that_has_no_bits_are_refused(tiny_chunks: int) -> None:
    tensors = encode_huffman([77] * 40, CODES["one"], tiny_chunks) | {"like": torch.empty(0, 40, dtype=torch.uint8)}
    assert not is_refused(tensors)
    sizes, codes = torch.tensor([0, 1, 0], dtype=torch.uint16), torch.zeros(16, dtype=torch.uint8)
    assert is_refused({**tensors, "chunk_bytes": sizes, "codes": codes})


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_x_and_bias_of_another_device_or_dtype_are_refused(tokens: int) -> None:
    words = gaussian(4, 256).view(torch.int16)
    prepared = df11_triton.prepare_fixed(encode_fixed(words, best_base(words)), "cpu")
    x, bias = torch.ones(tokens, 256), torch.ones(4)
    with pytest.raises(ValueError, match="^x: is on meta; move it to cpu"):
        df11_triton.linear_fixed(x.to("meta"), prepared, bias)
    with pytest.raises(ValueError, match="^bias: is on meta; move it to cpu"):
        df11_triton.linear_fixed(x, prepared, bias.to("meta"))
    for dtype in (torch.float64, torch.int32, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match=f"^x: is {dtype}; convert it to bfloat16"):
            df11_triton.linear_fixed(x.to(dtype), prepared, bias)


@pytest.mark.parametrize(
    "coding, dtype",
    [("huffman", torch.bfloat16), ("huffman", torch.float32), ("fixed", torch.bfloat16)],
)
def test_the_scheme_decodes_and_multiplies_on_what_it_prepares(
    coding: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared_kernels, "runs_triton", lambda device: True)
    monkeypatch.setattr(df11_triton, "SEGMENT", 32)
    monkeypatch.setattr(df11_triton, "GROUP", 4)
    scheme = Df11(coding)  # type: ignore[arg-type]
    weight = (torch.randn(8, 64) * 0.02).to(dtype)
    tensors = scheme.encode(weight)
    prepared = scheme.prepare(tensors)
    assert prepared is not tensors and torch.equal(scheme.decode(prepared), weight)
    index = torch.tensor([[5, 0], [7, 7]])
    assert torch.equal(scheme.rows(prepared, index), weight[index])
    x, bias = torch.randn(3, 64).to(dtype), torch.randn(8).to(dtype)
    wanted = x.double() @ weight.double().T + bias.double()
    assert (scheme.linear(x, prepared, bias).double() - wanted).norm() / wanted.norm() < 2**-7
