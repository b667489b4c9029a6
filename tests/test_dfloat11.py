"""DFloat11's published layout is read bit for bit; an encoder written from its description makes it here, slowly."""

import heapq
import itertools
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import compress
from compress import dfloat11
from compress.dfloat11 import Unit
from compress.exporting import export
from compress.formats import dfloat11 as streams
from compress.formats.checkpoint import Checkpoint
from compress.scheme import Spec
from compress.source import Source

Tiny = Callable[[str], Path]
Tensors = dict[str, Tensor]
END = -1  # the symbol that fills the last byte up; it sorts before the others
THREAD_BITS = 64
BLOCK = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
BLOCK += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
PATTERNS: dict[str, list[str]] = {r"model\.layers\.\d+": BLOCK, r"model\.embed_tokens": [], "lm_head": []}


def bits_of(weight: Tensor) -> Any:
    """The bits of bfloat16 values, in one row."""
    return weight.detach().contiguous().reshape(-1).view(torch.int16).numpy().view(np.uint16)


def from_bits(bits: Any) -> Tensor:
    return torch.from_numpy(np.asarray(bits, np.uint16)).view(torch.bfloat16)


def huffman(counts: dict[int, int]) -> dict[int, str]:
    """Symbol -> code of a Huffman tree over `counts` and END, which occurs once."""
    order = itertools.count()
    heap: list[tuple[int, int, Any]] = [(n, next(order), s) for s, n in sorted({END: 1, **counts}.items())]
    heapq.heapify(heap)
    while len(heap) > 1:
        (n, _, zero), (m, _, one) = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (n + m, next(order), (zero, one)))
    codes: dict[int, str] = {}
    todo = [("", heap[0][2])]
    while todo:
        code, node = todo.pop()
        if isinstance(node, tuple):
            todo += [(code + "0", node[0]), (code + "1", node[1])]
        else:
            codes[node] = code
    return codes


def tables(codes: dict[int, str], leak: bool) -> Tensor:
    """A table for every whole number of bytes that a longer code begins with, shortest first, and a row of lengths.

    leak: what no code leads to holds what came last, be it in the table before, as their writer has it; else zeros.
    """
    codes = {symbol: code for symbol, code in codes.items() if symbol != END}
    prefixes = sorted({code[:i] for code in codes.values() for i in range(0, len(code), 8)}, key=lambda p: (len(p), p))
    rows, last = [], 0
    for prefix in prefixes:
        row: list[int | None] = [None] * 256
        for symbol, code in codes.items():
            rest = code[len(prefix) :]
            if not code.startswith(prefix) or not rest:
                continue
            if len(rest) > 8:
                row[int(rest[:8], 2)] = 256 - prefixes.index(prefix + rest[:8])
            else:
                start = int(rest.ljust(8, "0"), 2)
                row[start : start + 2 ** (8 - len(rest))] = [symbol] * 2 ** (8 - len(rest))
        for entry in row:
            last = entry if entry is not None else last if leak else 0
            rows.append(last)
    lengths = [len(codes.get(symbol, "")) for symbol in range(256)]
    return torch.tensor([*rows, *lengths], dtype=torch.uint8).view(-1, 256)


def encode(
    weights: Sequence[Tensor], codes: dict[int, str] | None = None, leak: bool = True, threads: int = 512
) -> Tensors:
    """The tensors of a unit by local name. codes: in place of the best ones. threads: of a block."""
    words = np.concatenate([bits_of(weight) for weight in weights])
    exponents = (words >> 7) & 0xFF
    codes = codes or huffman(dict(zip(*(x.tolist() for x in np.unique(exponents, return_counts=True)), strict=True)))
    stream = "".join([codes[exponent] for exponent in exponents.tolist()])
    starts = np.cumsum([0, *(len(codes[exponent]) for exponent in exponents.tolist())])[:-1].tolist()
    if len(stream) % 8:
        starts.append(len(stream))  # END counts as a code that starts here, though it is cut off
        stream += codes[END][: -len(stream) % 8]
        stream += "0" * (-len(stream) % 8)
    packed = np.packbits(np.frombuffer(stream.encode(), np.uint8) - ord("0"))
    block_bits = threads * THREAD_BITS
    gaps, positions = [0] * (threads * -(-8 * len(packed) // block_bits)), {}
    for i in range(len(starts) - 1, -1, -1):  # so the first that starts in a thread's bits stays
        gaps[starts[i] // THREAD_BITS] = starts[i] % THREAD_BITS
        positions[starts[i] // block_bits] = i
    counts = [positions[block] for block in sorted(positions)] + [len(words)]
    gap_bits = "".join(f"{gap:05b}" for gap in gaps)
    splits = np.cumsum([weight.numel() for weight in weights])[:-1]
    return {
        "luts": tables(codes, leak),
        "encoded_exponent": torch.from_numpy(packed),
        "sign_mantissa": torch.from_numpy((((words >> 8) & 0x80) | (words & 0x7F)).astype(np.uint8)),
        "output_positions": torch.from_numpy(np.array(counts, "<u4")).view(torch.uint8),
        "gaps": torch.from_numpy(np.packbits(np.frombuffer(gap_bits.encode(), np.uint8) - ord("0"))),
        "split_positions": torch.from_numpy(splits.astype(np.int64)),
    }


def decode_by_threads(tensors: Tensors) -> Tensor:
    """As their kernel does: every thread decodes the codes that start in its 64 bits, code by code."""
    luts = tensors["luts"].tolist()
    stream = "".join(f"{byte:08b}" for byte in tensors["encoded_exponent"].tolist()) + "0" * 64
    gaps = "".join(f"{byte:08b}" for byte in tensors["gaps"].tolist())
    counts = tensors["output_positions"].numpy().view("<u4").tolist()
    found: list[int] = []
    for thread in range(-(-(len(stream) - 64) // THREAD_BITS)):
        block = thread // 512
        if thread % 512 == 0:
            assert block >= len(counts) - 1 or len(found) == counts[block]
        bit = thread * THREAD_BITS + int(gaps[5 * thread : 5 * thread + 5], 2)
        while bit < (thread + 1) * THREAD_BITS and len(found) < counts[-1]:
            value, place = luts[0][int(stream[bit : bit + 8], 2)], bit
            while value >= 240:
                place += 8
                value = luts[256 - value][int(stream[place : place + 8], 2)]
            found.append(value)
            bit += luts[-1][value]
    exponents, rest = np.array(found, np.uint16), tensors["sign_mantissa"].numpy().astype(np.uint16)
    return from_bits(((rest & 0x80) << 8) | (exponents << 7) | (rest & 0x7F))


def read(tensors: Tensors, shapes: Sequence[tuple[int, ...]], threads: int = 512) -> list[Tensor]:
    """Every weight of a unit, after the checks that a checkpoint gets."""
    unit = Unit("unit", {f"w{i}": shape for i, shape in enumerate(shapes)}, threads)
    unit.check({local: Spec(t.dtype, tuple(t.shape)) for local, t in tensors.items()})
    return [unit.decode(tensors, name) for name in unit.shapes]


def check_round_trip(weights: Sequence[Tensor], threads: int = 512, **options: Any) -> Tensors:
    tensors = encode(weights, threads=threads, **options)
    for got, want in zip(read(tensors, [tuple(w.shape) for w in weights], threads), weights, strict=True):
        assert got.dtype == torch.bfloat16 and got.shape == want.shape
        assert np.array_equal(bits_of(got), bits_of(want))
    return tensors


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(0.02).bfloat16()


def skewed(depth: int) -> Tensor:
    """Exponents 1 to depth, each twice as often as the one before: their best codes have up to `depth` bits."""
    exponents = np.repeat(np.arange(1, depth + 1), 2 ** np.arange(depth))
    generator = np.random.default_rng(depth)
    words = exponents << 7 | generator.integers(0, 128, exponents.size) | generator.integers(0, 2, exponents.size) << 15
    return from_bits(generator.permutation(words))


def test_three_weights_by_hand() -> None:
    # 1.0 has exponent 127 with code 0, 2.0 has 128 with code 10, and the stream 0 10 0 is filled up with 11..
    luts = torch.tensor([[127] * 128 + [128] * 128, [0] * 127 + [1, 2] + [0] * 127], dtype=torch.uint8)
    tensors = {
        "luts": luts,
        "encoded_exponent": torch.tensor([0b0100_1100], dtype=torch.uint8),
        "sign_mantissa": torch.tensor([0x00, 0x40, 0x80], dtype=torch.uint8),
        "output_positions": torch.tensor([0, 0, 0, 0, 3, 0, 0, 0], dtype=torch.uint8),
        "gaps": torch.zeros(320, dtype=torch.uint8),
        "split_positions": torch.tensor([1]),
    }
    first, second = read(tensors, [(1,), (2,)])
    assert first.tolist() == [1.0] and second.tolist() == [3.0, -1.0]
    made = encode([first, second], {127: "0", 128: "10", END: "11"})
    assert all(torch.equal(made[local], tensors[local]) for local in tensors)


@pytest.mark.parametrize("leak", [True, False], ids=["leaked", "zeros"])
@pytest.mark.parametrize("shape", [(64, 100), (1, 1), (1, 7), (129, 331)], ids=str)
def test_a_gaussian_weight_comes_back_bit_for_bit(shape: tuple[int, int], leak: bool) -> None:
    check_round_trip([gaussian(*shape)], leak=leak)


@pytest.mark.parametrize("values", [[1.0], [-0.0], [1.0, -3.0], [0.0, -0.0, 1e-40, -9e-41, 5.0]], ids=str)
def test_few_different_values_come_back(values: list[float]) -> None:
    weight = torch.tensor((values * 30000)[:30001]).bfloat16()
    assert check_round_trip([weight])["luts"].shape == (2, 256)


@pytest.mark.parametrize("depth, rows", [(8, 2), (9, 3), (16, 3), (17, 4)])
def test_codes_of_more_than_8_and_16_bits_go_through_further_tables(depth: int, rows: int) -> None:
    luts = check_round_trip([skewed(depth)])["luts"]
    assert luts[-1].max() == depth and luts.shape[0] == rows


def test_codes_of_32_bits_and_all_the_tables_that_the_format_has_are_read() -> None:
    # Not the best codes for anything: 14 tables behind the first one, and two more behind the one of eight zeros.
    codes = {100: "1", 101: "01", 239: "00111111"}
    for i in range(14):
        codes |= {120 + i: f"00{i:06b}1", 140 + i: f"00{i:06b}01"}
    codes |= {160 + i: "0" * (10 + i) + "1" for i in range(21)} | {199: "0" * 31 + "1", END: "0" * 32}
    exponents = np.array([symbol for symbol in codes if symbol != END] * 40, np.uint16)
    luts = check_round_trip([from_bits(np.random.default_rng(0).permutation(exponents) << 7 | 5)], codes=codes)["luts"]
    assert luts.shape[0] == 18 and (luts[:-1] == 240).any() and luts[-1].max() == 32


@pytest.mark.parametrize("count", [11_000, 12_345, 40_000])
def test_blocks_of_threads_and_the_serial_decoder_give_the_same(count: int) -> None:
    weight = torch.cat([gaussian(count), skewed(12)])
    tensors = encode([weight])
    assert torch.equal(decode_by_threads(tensors).view(torch.int16), weight.view(torch.int16))
    assert torch.equal(read(tensors, [(weight.numel(),)])[0].view(torch.int16), weight.view(torch.int16))


def test_blocks_of_other_sizes_are_read() -> None:
    for threads in (8, 64, 256, 1024):
        check_round_trip([gaussian(70, 1001), skewed(10)], threads=threads)


@pytest.mark.parametrize(
    "shapes", [[(7, 5), (1, 1), (300, 101), (3, 11), (90, 333)], [(64, 1000), (1, 64000)]], ids=str
)
def test_several_weights_of_one_unit_part_at_any_place(shapes: list[tuple[int, int]]) -> None:
    tensors = check_round_trip([gaussian(*shape, seed=i) for i, shape in enumerate(shapes)])
    assert tensors["output_positions"].numel() // 4 - 1 > 3


def test_a_last_code_that_ends_in_a_block_of_its_own_is_read() -> None:
    # 32767 one-bit codes fill a block but for one bit, where a code of two to ten bits starts.
    for length in range(2, 11):
        codes = {127: "1", 130: "0" * (length - 1) + "1", END: "0" * length}
        weight = torch.tensor([1.0] * 32767 + [8.0]).bfloat16()
        tensors = check_round_trip([weight], codes=codes)
        assert tensors["encoded_exponent"].numel() == 4097 + (length > 9)
        # theirs counts no values before a block in which nothing starts, not even the fill
        assert tensors["output_positions"].numel() == (8 if length == 9 else 12)


def test_threads_do_not_change_a_bit(on_threads: Any) -> None:
    weight = torch.cat([skewed(20), gaussian(100)])  # more than one thread decodes at a time
    tensors = encode([weight])
    for (found,) in on_threads(lambda: read(tensors, [(weight.numel(),)])):
        assert np.array_equal(bits_of(found), bits_of(weight))


Edit = Callable[[Tensors], object]


def cut(local: str, count: int) -> Edit:
    return lambda tensors: tensors.update({local: tensors[local][:-count].clone()})


def extend(local: str, count: int) -> Edit:
    return lambda tensors: tensors.update({local: torch.cat([tensors[local], tensors[local][:count]])})


def change(local: str, at: int, value: int) -> Edit:
    return lambda tensors: tensors[local].view(-1)[at].fill_(value)


DAMAGES: list[tuple[Edit, str]] = [
    (cut("encoded_exponent", 1), "cut off"),
    (cut("encoded_exponent", 5000), "do not fit"),
    (extend("encoded_exponent", 1), "too long"),
    (cut("sign_mantissa", 1), "it has 39999 values, and by config.json its weights have 40000"),
    (cut("luts", 3), "luts has shape"),
    (cut("luts", 1), "do not fit together|over 32 bits"),
    (lambda tensors: tensors.update(luts=tensors["luts"].repeat(7, 1)), "luts has shape"),
    (lambda tensors: tensors.update(luts=tensors["luts"].view(-1, 128)), "luts has shape"),
    (lambda tensors: tensors.update(gaps=tensors["gaps"].to(torch.int32)), "not all of its tensors are uint8"),
    (lambda tensors: tensors.update(sign_mantissa=tensors["sign_mantissa"].view(torch.int8)), "not all .* uint8"),
    (lambda tensors: tensors.pop("gaps"), "no gaps is stored"),
    (cut("output_positions", 4), "ascend"),
    (cut("output_positions", 8), "do not fit"),
    (cut("output_positions", 1), "do not fit"),
    (change("output_positions", 0, 1), "ascend from 0 to 40000"),
    (change("output_positions", 4, 0), "do not fit together"),
    (change("output_positions", 7, 255), "ascend"),
    (cut("gaps", 2), "do not fit"),
    (change("gaps", 320, 0xF8), "do not fit together"),
    (change("split_positions", 0, 5), "split_positions"),
    (cut("split_positions", 1), "split_positions"),
    (change("luts", -1, 9), "from 240 on"),
    (change("luts", -200, 33), "over 32 bits"),
    (change("luts", 255, 239), "do not fit together"),  # which has no code
    (change("encoded_exponent", 700, 0), "do not fit together"),
]


@pytest.mark.parametrize("edit, problem", DAMAGES, ids=range(len(DAMAGES)))
def test_a_damaged_unit_is_refused(edit: Edit, problem: str) -> None:
    tensors, shapes = encode([gaussian(100, 100), gaussian(300, 100, seed=1)]), [(100, 100), (300, 100)]
    read(tensors, shapes)
    edit(tensors)
    with pytest.raises(ValueError, match=rf"^unit: .*({problem}).*; download the checkpoint again$"):
        read(tensors, shapes)


class Fenced:
    """An array that is left by no index, below or above."""

    def __init__(self, array: Any) -> None:
        self.array, self.size = array, array.size

    def _inside(self, index: Any) -> Any:
        for i, length in zip(index if isinstance(index, tuple) else (index,), self.array.shape, strict=False):
            if not 0 <= i < length:
                raise IndexError(f"{index} of {self.array.shape}")
        return index

    def __getitem__(self, index: Any) -> Any:
        found = self.array[self._inside(index)]
        return Fenced(found) if isinstance(found, np.ndarray) else found

    def __setitem__(self, index: Any, value: Any) -> None:
        self.array[self._inside(index)] = value


def run_fenced(loop: Any, rows: int, size: int, *arguments: Any) -> None:
    loop.py_func(0, rows, *(Fenced(a) if isinstance(a, np.ndarray) else a for a in arguments))


def test_no_damage_makes_the_loops_leave_their_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_look_further", "_next_bits"):
        monkeypatch.setattr(streams, name, getattr(streams, name).py_func)
    monkeypatch.setattr(streams, "in_threads", run_fenced)
    weights = [torch.cat([gaussian(300), skewed(9)]), gaussian(30, 10)]
    shapes = [tuple(weight.shape) for weight in weights]
    whole = encode(weights, threads=8)
    assert whole["output_positions"].numel() > 16 and np.array_equal(
        np.concatenate([bits_of(weight) for weight in read(whole, shapes, 8)]),
        np.concatenate([bits_of(weight) for weight in weights]),
    )
    generator, refused = np.random.default_rng(0), 0
    for _ in range(150):
        tensors = {local: tensor.clone() for local, tensor in whole.items()}
        local = str(generator.choice(["luts", "encoded_exponent", "output_positions", "gaps"]))
        for _ in range(generator.integers(1, 4)):
            tensors[local].view(-1)[generator.integers(tensors[local].numel())] = int(generator.integers(256))
        try:
            read(tensors, shapes, 8)
        except ValueError:
            refused += 1
    assert 50 < refused < 150  # and some damage is not to be seen
    for row, value in itertools.product(range(2), range(240, 256)):  # to tables that do not exist, or in a circle
        luts = whole["luts"].clone()
        luts[row] = value
        with pytest.raises(ValueError, match="do not fit together"):
            read({**whole, "luts": luts}, shapes, 8)


def write_unit(path: Path, unit: str, children: list[str], tensors: Tensors) -> set[str]:
    """The file of a unit, with everything else that its module has. Returns the names that were taken."""
    weights = [f"{unit}.{child}.weight" for child in children] or [f"{unit}.weight"]
    coded = encode([tensors[name] for name in weights])
    rest = {name: t for name, t in tensors.items() if name.startswith(f"{unit}.") and name not in weights}
    file = path / f"{unit.replace('.', '_')}.safetensors"
    save_file({**rest, **{f"{unit}.{local}": tensor for local, tensor in coded.items()}}, file)
    return {*weights, *rest}


def write_dfloat11(model: Path, out: Path, patterns: dict[str, list[str]], units: list[str]) -> Path:
    """A tiny model as their package writes it: a file for each unit, model.safetensors, and patterns in config.json."""
    out.mkdir()
    tensors = load_file(model / "model.safetensors")
    children = {unit: next(value for key, value in patterns.items() if re.fullmatch(key, unit)) for unit in units}
    for unit in units:
        for name in write_unit(out, unit, children[unit], tensors):
            del tensors[name]
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    config["dfloat11_config"] = {
        "version": "0.2.0",
        "threads_per_block": [512],
        "bytes_per_thread": 8,
        "pattern_dict": patterns,
    }
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.fixture(scope="module")
def df11_dir(tiny_model: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    units = ["model.layers.0", "model.layers.1", "lm_head", "model.embed_tokens"]
    return write_dfloat11(tiny_model("llama"), tmp_path_factory.mktemp("df11") / "model", PATTERNS, units)


@pytest.fixture
def copy(df11_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(df11_dir, tmp_path / "copy"))


def check_export(path: Path, model: Path, out: Path) -> None:
    export(path, out)
    got, want = load_file(out / "model.safetensors"), load_file(model / "model.safetensors")
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].shape == tensor.shape and np.array_equal(bits_of(got[name]), bits_of(tensor))
    config, original = (json.loads((folder / "config.json").read_text()) for folder in (out, model))
    assert config == original


def test_export_gives_back_the_model(tiny_model: Tiny, df11_dir: Path, tmp_path: Path) -> None:
    assert len(list(df11_dir.glob("*.safetensors"))) == 5
    check_export(df11_dir, tiny_model("llama"), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]


def test_load_runs_it_decoded_and_it_is_scored_as_the_original(tiny_model: Tiny, df11_dir: Path) -> None:
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        found, wanted = (compress.load(path)(ids).logits for path in (df11_dir, tiny_model("llama")))
    assert torch.equal(found, wanted)


def test_a_tied_head_that_is_not_stored_stays_so(tiny_model: Tiny, tmp_path: Path) -> None:
    model = tiny_model("llama-tied-biased")
    assert "lm_head.weight" not in Checkpoint(model).entries
    for number, units in enumerate((["model.layers.0", "model.layers.1"], ["model.embed_tokens", "model.layers.1"])):
        path = write_dfloat11(model, tmp_path / f"df11-{number}", PATTERNS, units)
        check_export(path, model, tmp_path / f"out-{number}")


def test_of_tied_weights_either_may_be_stored(tiny_model: Tiny, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model("llama-tied-biased"), tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    check_export(write_dfloat11(model, tmp_path / "df11", PATTERNS, ["lm_head"]), model, tmp_path / "out")


def test_weights_that_transformers_has_under_other_names_are_found(tiny_config: Any, tmp_path: Path) -> None:
    import transformers

    text = tiny_config("gemma3")
    config = transformers.Gemma3Config(text_config=text.to_dict(), vision_config=VISION, mm_tokens_per_image=4)
    config.architectures = ["Gemma3ForConditionalGeneration"]
    torch.manual_seed(0)
    model: Any = transformers.Gemma3ForConditionalGeneration(config)
    model.bfloat16().save_pretrained(tmp_path / "model")
    names = Checkpoint(tmp_path / "model").entries
    assert "language_model.model.layers.0.mlp.up_proj.weight" in names
    patterns = {r"language_model\.model\.layers\.\d+": BLOCK}
    units = ["language_model.model.layers.0", "language_model.model.layers.1"]
    path = write_dfloat11(tmp_path / "model", tmp_path / "df11", patterns, units)
    check_export(path, tmp_path / "model", tmp_path / "out")


VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}


def test_files_that_an_index_does_not_name_are_read_too(tiny_model: Tiny, copy: Path, tmp_path: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    assert tensors.keys() == {"model.norm.weight"}
    (copy / "model.safetensors").rename(copy / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    check_export(copy, tiny_model("llama"), tmp_path / "out")


def test_quantize_takes_it_as_it_takes_the_original(tiny_model: Tiny, df11_dir: Path, tmp_path: Path) -> None:
    for name, path in (("a", df11_dir), ("b", tiny_model("llama"))):
        compress.quantize(path, tmp_path / name, "int4", method="rtn", scoring=None, group_size=32)
    assert (tmp_path / "a" / "config.json").read_bytes() == (tmp_path / "b" / "config.json").read_bytes()
    got, want = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    ledger = json.loads((tmp_path / "a" / "compress.json").read_text())["ledger"]
    up = "model.layers.0.mlp.up_proj.weight"
    assert set(ledger[up]["read"]) == {f"model.layers.0.{local}" for local in (*dfloat11.LOCALS, "split_positions")}


def test_a_weight_is_read_alone_and_row_by_row(
    tiny_model: Tiny, df11_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, name = Source(df11_dir), "model.layers.1.self_attn.v_proj.weight"
    want = load_file(tiny_model("llama") / "model.safetensors")[name]
    assert source.specs[name] == Spec(torch.bfloat16, tuple(want.shape)) and source.is_packed(name)
    assert np.array_equal(bits_of(source.read(name)), bits_of(want))
    assert np.array_equal(bits_of(source.read(name, 3)), bits_of(want[3]))
    released: list[str] = []
    monkeypatch.setattr(source.checkpoint, "release", released.append)
    source.release(name)
    assert sorted(released) == sorted(source.backing[name]) and len(released) == 6
    assert not any(local in name for name in source.specs for local in dfloat11.LOCALS)


@pytest.mark.parametrize("file", ["model_layers_1", "lm_head", "model"])
def test_a_missing_file_is_noticed(copy: Path, file: str) -> None:
    (copy / f"{file}.safetensors").unlink()
    with pytest.raises(ValueError, match="no file holds .*; the checkpoint is incomplete, download it again"):
        Source(copy)


def test_a_unit_without_one_of_its_tensors_is_refused(copy: Path) -> None:
    for local in dfloat11.LOCALS:
        tensors = load_file(copy / "lm_head.safetensors")
        save_file({k: v for k, v in tensors.items() if k != f"lm_head.{local}"}, copy / "lm_head.safetensors")
        with pytest.raises(ValueError, match=f"lm_head: no {local} is stored"):
            Source(copy)
        save_file(tensors, copy / "lm_head.safetensors")
    Source(copy)


def test_a_tensor_or_weight_that_is_stored_twice_is_refused(copy: Path) -> None:
    shutil.copy(copy / "lm_head.safetensors", copy / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors: tensor 'lm_head.\w+' is also in lm_head.safetensors"):
        Source(copy)
    save_file({"lm_head.weight": torch.zeros(128, 64, dtype=torch.bfloat16)}, copy / "other.safetensors")
    with pytest.raises(ValueError, match="lm_head.weight is stored twice"):
        Source(copy)


@pytest.mark.parametrize(
    "change, problem",
    [
        ([], "dfloat11_config is not whole"),
        ({"pattern_dict": {"(": []}}, "dfloat11_config is not whole"),
        ({"pattern_dict": {"lm_head": None}}, "dfloat11_config is not whole"),
        ({"threads_per_block": 512}, "dfloat11_config is not whole"),
        ({"threads_per_block": ["x"]}, "no known version"),
        ({"threads_per_block": [4]}, "no known version"),
        ({"threads_per_block": [8]}, "do not fit"),
        ({"threads_per_block": [0]}, "no known version"),
        ({"bytes_per_thread": 16}, "no known version"),
        ({"pattern_dict": {"lm_h": [], "head": [], "model.*": []}}, "lm_head: 0 patterns of dfloat11_config"),
        ({"pattern_dict": {**PATTERNS, ".*head": ["a"]}}, "lm_head: 2 patterns of dfloat11_config"),
        (
            {"pattern_dict": {**PATTERNS, "lm_head": ["a"]}},
            "lm_head.a.weight: its shape is not stored, and the model of config.json",
        ),
        ({"pattern_dict": {**PATTERNS, r"model\.layers\.\d+": BLOCK[1:]}}, "by config.json its weights have"),
    ],
)
def test_a_config_that_does_not_describe_the_files_is_refused(copy: Path, change: Any, problem: str) -> None:
    config = json.loads((copy / "config.json").read_text())
    known = config["dfloat11_config"]
    config["dfloat11_config"] = {**known, **change} if isinstance(change, dict) else change
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=problem):
        Source(copy)


def test_children_in_another_order_are_noticed_where_their_sizes_differ(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["dfloat11_config"]["pattern_dict"][r"model\.layers\.\d+"] = BLOCK[::-1]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="split_positions are not"):
        Source(copy).read("model.layers.0.self_attn.q_proj.weight")
