"""Packed KV caches: by hand, against a cache that rounds and does not pack, in whole models, and measured."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

import compress
from compress import kv_cache
from compress.cache import BfpCache, BfpPacking, key_order, paired
from compress.eval.evaluate import evaluate
from compress.formats import bfp
from compress.formats.bfp import Format
from compress.kernels import bfp_cache
from compress.kivi import KiviCache, KiviPacking
from compress.packed_cache import Exact, PackedLayer, nbytes


def states(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def bfp_layer(bits: int = 4, window: int = 0) -> PackedLayer:
    return PackedLayer((BfpPacking(bits, 32, rotary=1.0), BfpPacking(bits, 32)), window)


def kivi_layer(bits: int = 2, window: int = 0) -> PackedLayer:
    return PackedLayer((KiviPacking(bits, 8, True), KiviPacking(bits, 8, False)), window)


LAYERS = {"bfp": bfp_layer, "kivi": kivi_layer}


class Rounding(DynamicLayer):
    """What a packed layer with no window stands for: transformers' own, on states that were packed and unpacked."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.get_seq_length():
            self.packing = BfpPacking(4, 32, rotary=1.0, centered=True), BfpPacking(4, 32)
            self.packing[0].begin(key_states)
        rounded = [
            part.unpack(part.pack(given), given.shape[3], given.dtype)
            for part, given in zip(self.packing, (key_states, value_states), strict=True)
        ]
        keys, values = super().update(*rounded)
        return keys, values


def test_attention_gets_what_the_packed_states_stand_for() -> None:
    channels = torch.tensor([1.5, -0.25, 0.3, 1.94, -1.0, 0.1, 0.0, 0.0] * 2)
    key = torch.stack([channels, 64 * channels])[None, None]
    keys, values = bfp_layer().update(key, -key)
    # The largest is 1.94, and steps are 0.25: seven of them are nearer to 1.94 than any number of 0.5 is.
    assert keys[0, 0, 0].tolist() == [1.5, -0.25, 0.25, 1.75, -1.0, 0.0, 0.0, 0.0] * 2
    assert values[0, 0, 0].tolist() == [-1.5, 0.25, -0.25, -2.0, 1.0, 0.0, 0.0, 0.0] * 2  # eight below zero
    assert torch.equal(keys[0, 0, 1], 64 * keys[0, 0, 0]) and torch.equal(values[0, 0, 1], 64 * values[0, 0, 0])


def test_kivi_by_hand() -> None:
    key = torch.tensor([[0.0, 8.0], [1.0, 8.0], [2.0, 8.0], [3.0, 8.0]])[None, None]  # two channels, four tokens
    packing = KiviPacking(2, 4, by_channel=True)
    rows, scale, least = packing.pack(key)
    assert scale.tolist() == [[[[1.0, 0.0]]]] and least.tolist() == [[[[0.0, 8.0]]]]
    assert rows.flatten().tolist() == [0, 1, 2, 3] and torch.equal(
        packing.unpack((rows, scale, least), 2, key.dtype), key
    )
    value = torch.tensor([[0.0, 1.0, 2.2, 3.0], [-6.0, 0.0, -6.0, -1.9]])[None, None]
    packing = KiviPacking(2, 4, by_channel=False)
    rows, scale, least = packing.pack(value)
    assert scale.flatten().tolist() == [1.0, 2.0] and least.flatten().tolist() == [0.0, -6.0]
    assert rows.flatten().tolist() == [0b11100100, 0b10001100]
    found = packing.unpack((rows, scale, least), 4, value.dtype)
    assert found[0, 0].tolist() == [[0.0, 1.0, 2.0, 3.0], [-6.0, 0.0, -6.0, -2.0]]


def test_the_two_of_a_rotary_pair_lie_side_by_side() -> None:
    assert paired(torch.arange(8), 1.0).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert paired(torch.arange(8), 0.5).tolist() == [0, 2, 1, 3, 4, 5, 6, 7]
    assert paired(torch.arange(5), 1.0).tolist() == [0, 2, 1, 3, 4]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("window", [0, 5])
def test_what_is_stored_does_not_depend_on_how_many_tokens_come_at_a_time(kind: str, window: int) -> None:
    keys, values = states(0, 2, 3, 41, 20), states(1, 2, 3, 41, 20)
    at_once, one_by_one, some = (LAYERS[kind](window=window) for _ in range(3))
    whole = at_once.update(keys, values)
    for i in range(41):
        last = one_by_one.update(keys[:, :, i : i + 1], values[:, :, i : i + 1])
    for part in (slice(0, 17), slice(17, 18), slice(18, 41)):
        some.update(keys[:, :, part], values[:, :, part])
    assert at_once.get_seq_length() == one_by_one.get_seq_length() == some.get_seq_length() == 41
    for other in (one_by_one, some):
        for a, b in zip(at_once.packed, other.packed, strict=True):
            assert all(torch.equal(*pair) for pair in zip(a, b, strict=True))
    assert all(torch.equal(*pair) for pair in zip(whole, last, strict=True))
    exact = at_once.keys.shape[2]
    assert exact == (window if kind == "bfp" else window + (41 - window) % 8)
    assert torch.equal(whole[0][:, :, 41 - exact :], keys[:, :, 41 - exact :])
    assert not torch.equal(whole[0][:, :, : 41 - exact], keys[:, :, : 41 - exact])


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("window", [0, 6, 64])
def test_rows_and_tokens_are_dropped_and_repeated_as_without_packing(kind: str, window: int) -> None:
    layer, plain = LAYERS[kind](window=window), DynamicLayer()
    plain.update(*layer.update(states(0, 3, 2, 37, 16), states(1, 3, 2, 37, 16)))  # from here on nothing is rounded

    def changed(change: Callable[[Any], object]) -> None:
        for one in (layer, plain):
            change(one)
        found = [torch.cat([a, b], 2) for a, b in zip(layer._unpacked(layer.packed), layer._recent(), strict=True)]
        assert torch.equal(found[0], plain.keys) and torch.equal(found[1], plain.values)
        assert layer.get_seq_length() == plain.get_seq_length()

    changed(lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0])))
    changed(lambda cache: cache.batch_repeat_interleave(2))
    changed(lambda cache: cache.batch_select_indices(torch.tensor([0, 5, 1])))
    changed(lambda cache: cache.crop(0))
    for count in (-2, -1, -9, -11):
        changed(lambda cache, count=count: cache.crop(count))  # type: ignore[misc]
    new = states(2, 3, 2, 3, 16), states(3, 3, 2, 3, 16)
    before = layer.count
    keys, _ = layer.update(*new)
    assert keys.shape[2] == 17 and torch.equal(keys[:, :, :before], plain.keys[:, :, :before])
    layer.crop(4)  # as older callers say it: four are kept
    assert layer.get_seq_length() == 4
    layer.crop(-100)
    assert layer.get_seq_length() == 0
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.update(*new)[0].shape[2] == 3


@pytest.mark.parametrize("bits, width", [(4, 32 + 2), (5, 40 + 2), (6, 48 + 2), (8, 64 + 2)])
def test_bytes_held_are_those_of_the_format(bits: int, width: int) -> None:
    layer = bfp_layer(bits, window=10)
    layer.update(states(0, 2, 3, 100, 64), states(1, 2, 3, 100, 64))
    cache = Cache(layers=[layer])
    assert nbytes(cache) == 2 * (2 * 3) * (90 * width + 10 * 64 * 2)
    storages = [t.untyped_storage().nbytes() for part in (*layer.packed, layer._recent()) for t in part]
    assert sum(storages) == nbytes(cache)  # no view holds on to more


def test_four_bits_take_about_half_of_eight() -> None:
    held = []
    for bits in (4, 8):
        layer = bfp_layer(bits)
        layer.update(states(0, 1, 2, 64, 64), states(1, 1, 2, 64, 64))
        held.append(nbytes(Cache(layers=[layer])))
    assert held[1] / held[0] == 66 / 34


def test_an_odd_head_dim_and_each_dtype_come_back() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        given = states(0, 1, 2, 9, 37).to(dtype)
        for packing in (BfpPacking(8, 32, rotary=1.0), KiviPacking(4, 3, True), KiviPacking(4, 32, False), Exact()):
            found = packing.unpack(packing.pack(given), 37, dtype)
            assert found.dtype == dtype and found.shape == given.shape
            assert (found - given).norm() / given.norm() < (0.01 if isinstance(packing, BfpPacking) else 0.1)


def test_nan_in_a_key_is_not_hidden() -> None:
    given = states(0, 1, 1, 3, 64)
    given[0, 0, 1, 3] = float("nan")
    keys, _ = bfp_layer().update(given, given)
    assert keys[0, 0, 1].isnan().sum() == 32 and keys[0, 0, ::2].isfinite().all()


def test_what_all_keys_have_in_common_is_taken_off() -> None:
    common = torch.zeros(64)
    common[5] = -40
    keys, values = states(0, 2, 3, 50, 64) + common.bfloat16(), states(1, 2, 3, 50, 64)
    errors, held = [], []
    for centered in (False, True):
        layer = PackedLayer((BfpPacking(4, 32, rotary=1.0, centered=centered), BfpPacking(4, 32)), window=2)
        layer.update(keys[:, :, :30], values[:, :, :30])
        found, _ = layer.update(keys[:, :, 30:], values[:, :, 30:])
        errors.append(float((found - keys)[..., :48].norm()))
        held.append(nbytes(Cache(layers=[layer])))
    assert errors[1] < 0.3 * errors[0]
    assert held[1] - held[0] == 2 * 3 * 64  # a mean of each head's channels
    assert torch.equal(layer.packings[0].mean[0, :, 0], keys[:, :, :30].float().mean((0, 2)).bfloat16())  # type: ignore[attr-defined]


def outliers(tokens: int = 400) -> Tensor:
    """Keys of 128 channels, of whose 64 rotary pairs 6 are 12 times as large."""
    generator = torch.Generator().manual_seed(0)
    size = torch.ones(64)
    size[torch.randperm(64, generator=generator)[:6]] = 12
    return torch.randn(1, 1, tokens, 128, generator=generator) * size.repeat(2)


def product_error(keys: Tensor, packing: BfpPacking) -> float:
    queries = torch.randn(300, 128, generator=torch.Generator().manual_seed(1))
    found = packing.unpack(packing.pack(keys), 128, keys.dtype)
    return float((queries @ (found - keys)[0, 0].T).norm() / (queries @ keys[0, 0].T).norm())


def test_sorted_pairs_side_by_side_halve_what_outliers_cost() -> None:
    keys = outliers()
    order = keys[0, 0].square().mean(0)[:64].argsort(descending=True)
    in_halves, side_by_side = torch.cat([order, order + 64]), torch.stack([order, order + 64], 1).flatten()
    found = {
        size: [
            product_error(keys, BfpPacking(4, size, given)) for given in (torch.arange(128), in_halves, side_by_side)
        ]
        for size in (16, 32, 64, 128)
    }
    for size in (16, 32):
        assert found[size][2] < found[size][1] < found[size][0]
    assert found[32][2] < 0.75 * found[32][0]
    assert found[64][2] < 0.9 * found[64][0] and found[64][1] == pytest.approx(found[64][0], rel=0.02)
    assert found[128][0] == pytest.approx(found[128][2], rel=1e-6)  # one block: no order changes anything


def test_key_order_by_hand(tiny_model: Callable[[str], Path]) -> None:
    model = compress.load(tiny_model("llama"))  # 2 heads of 16
    weight = torch.zeros(32, 64)
    weight[[3, 11], 0], weight[7, 5], weight[15, 6] = 2.0, 3.0, 3.0  # pairs 3 and 7 of head 0
    weight[16 + 9, 1] = 1.0  # pair 1 of head 1
    model.model.layers[1].self_attn.k_proj.weight.data = weight
    order = key_order(model)[1]
    assert order.shape == (2, 16) and order.sort(1).values.tolist() == [list(range(16))] * 2
    assert order[0, :4].tolist() == [7, 15, 3, 11] and order[1, :4].tolist() == [1, 9, 0, 8]


@pytest.mark.parametrize("name, layers", [("qwen2", 2), ("qwen3", 2), ("gemma2", 2), ("phi", 2), ("gpt2", 0)])
def test_keys_are_sorted_by_weight_bias_and_norm(name: str, layers: int, tiny_model: Callable[[str], Path]) -> None:
    model = compress.load(tiny_model(name))
    if name == "qwen2":
        model.model.layers[0].self_attn.k_proj.bias.data[5] = 100
    if name == "qwen3":
        model.model.layers[0].self_attn.k_norm.weight.data[5] = 100
    order = key_order(model)
    assert len(order) == layers
    for found in order.values():
        assert found.sort(-1).values.tolist() == [list(range(found.shape[1]))] * found.shape[0]
    if name in ("qwen2", "qwen3"):
        assert order[0][0, :2].tolist() == [5, 13]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "phi", "gpt2", "mixtral", "deepseek-v3"])
@pytest.mark.parametrize("kind, bits, bound", [("bfp", 8, 0.2), ("kivi", 4, 0.4)])
def test_a_model_with_a_packed_cache_computes_about_the_same(
    name: str, kind: str, bits: int, bound: float, tiny_model: Callable[[str], Path]
) -> None:
    ids = torch.arange(3, 83).view(2, 40)
    plain = compress.load(tiny_model(name))
    packed = compress.load(tiny_model(name), kv_cache=kind, kv_bits=bits, kv_window=0)
    with torch.inference_mode():
        want, found = plain(ids).logits.double(), packed(ids)
    assert isinstance(found.past_key_values, BfpCache if kind == "bfp" else KiviCache)
    assert 0 < (found.logits - want).norm() / want.norm() < bound


def rounding(model: Any) -> Cache:
    return Cache(layers=[Rounding() for _ in range(model.config.num_hidden_layers)])


GENERATE: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams in groups": {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 0.5},
    "samples": {"do_sample": True, "num_return_sequences": 2, "top_k": 5},
    "in chunks": {"prefill_chunk_size": 7},
}


@pytest.mark.parametrize("how", GENERATE)
def test_generate_gives_what_a_rounded_cache_gives(how: str, tiny_model: Callable[[str], Path]) -> None:
    model = compress.load(tiny_model("llama"))
    ids = torch.arange(3, 29).view(2, 13)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # padding on the left
    options = {"attention_mask": mask, "max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, **GENERATE[how]}
    found = []
    for cache in (rounding(model), BfpCache(model.config, 4, window=0), BfpCache(model.config, 4), None):
        torch.manual_seed(0)
        found.append(model.generate(ids, past_key_values=cache, **options))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[3])
    assert torch.equal(found[2], found[3])  # the window holds them all


def test_a_loaded_model_generates_with_the_cache_it_was_told_to(tiny_model: Callable[[str], Path]) -> None:
    model = compress.load(tiny_model("llama"), kv_cache="bfp", kv_bits=4, kv_window=3)
    ids = torch.arange(3, 16)[None]
    options = {"max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True, "pad_token_id": 0}
    found = model.generate(ids, **options)
    cache = found.past_key_values
    assert isinstance(cache, BfpCache) and cache.layers[0].keys.shape[2] == 3
    plain = model.generate(ids, past_key_values=DynamicCache(config=model.config), **options)
    assert type(plain.past_key_values) is DynamicCache and cache.nbytes < nbytes(plain.past_key_values)
    again = copy.deepcopy(model)
    assert again._prepare_cache_for_generation.__self__ is again
    assert torch.equal(again.generate(ids, **options).sequences, found.sequences)
    with torch.inference_mode():
        assert model(ids, use_cache=False).past_key_values is None
        assert type(model(ids, past_key_values=DynamicCache()).past_key_values) is DynamicCache
    kv_cache.use(model, "kivi", 2)
    assert isinstance(model.generate(ids, **options).past_key_values, KiviCache)


def test_prompt_lookup_drops_tokens_from_a_packed_cache(tiny_model: Callable[[str], Path]) -> None:
    model = compress.load(tiny_model("llama"))
    ids = torch.tensor([[5, 6, 7, 8] * 6])
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "attention_mask": ids > 0}
    want = model.generate(ids, past_key_values=BfpCache(model.config, 8, window=2), **options)
    for cache in (BfpCache(model.config, 8, window=2), rounding(model)):
        found = model.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=3, **options)
        assert found.shape == want.shape


def test_layers_with_a_sliding_window_are_left_to_transformers(tiny_model: Callable[[str], Path]) -> None:
    config = compress.load(tiny_model("gemma3")).config
    config.layer_types = ["sliding_attention", "full_attention"]
    cache = BfpCache(config)
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicSlidingWindowLayer", "PackedLayer"]
    assert cache.is_sliding == [True, False] and cache.nbytes == 0
    config.layer_types = ["sliding_attention"] * 2
    for kind in (BfpCache, KiviCache):
        with pytest.raises(ValueError, match="no layer of this gemma3_text attends to all tokens .*without kv_cache"):
            kind(config)


def test_what_cannot_be_is_said_in_one_line(tiny_model: Callable[[str], Path]) -> None:
    llama = tiny_model("llama")
    for options, said in (
        ({"kv_cache": "bpf"}, "unknown kind 'bpf'; did you mean 'bfp'"),
        ({"kv_cache": "bfp", "kv_bits": 3}, "bits is 3; give 4, 5, 6 or 8"),
        ({"kv_cache": "kivi", "kv_bits": 5}, "bits is 5; give one of 2, 4"),
        ({"kv_cache": "bfp", "kv_window": -1}, "window -1"),
        ({"kv_bits": 4}, "of which cache"),
    ):
        with pytest.raises(ValueError, match=said):
            compress.load(llama, **options)
    for name in ("t5", "mamba"):
        with pytest.raises(ValueError, match="^kv_cache: .*without kv_cache"):
            compress.load(tiny_model(name), kv_cache="bfp")
    with pytest.raises(ValueError, match=r"order: \(8,\) channels of keys are ordered, and there are \(2, 16\)"):
        BfpPacking(4, 32, torch.arange(8)).pack(states(0, 1, 2, 3, 16))


def test_compressed_weights_and_a_compressed_cache(tiny_compressed: Callable[..., Path]) -> None:
    model = compress.load(tiny_compressed("llama", "bfp"), kv_cache="bfp", kv_window=0)
    assert sorted(model.kv_cache.order) == [0, 1]
    with torch.inference_mode():
        assert isinstance(model(torch.arange(9)[None]).past_key_values, BfpCache)


def test_eval_scores_the_packed_cache_beside_the_original(llama_dir: Path) -> None:
    how: dict[str, Any] = {"tasks": [], "limit": 2, "window": 64, "dtype": "stored"}
    plain = evaluate(llama_dir, llama_dir, **how).to_dict()
    four, eight = (evaluate(llama_dir, llama_dir, kv_cache="bfp", kv_bits=bits, **how).to_dict() for bits in (4, 8))
    assert "kv_cache" not in plain and plain["kl_mean"] == 0
    assert 0 < eight["kl_mean"] < 0.1 * four["kl_mean"]
    assert four["reference_perplexity"] == plain["perplexity"]
    # 2 layers, keys and values, 2 heads of 16: mantissas of 8 bytes and an exponent
    each = 2 * 2 * 2 * 9 + 2 * 2 * 16 * 2 / 64  # and the means of keys, for 64 tokens
    held = {"kind": "bfp", "bits": 4, "bytes_per_token": each, "original_bytes_per_token": 2 * 2 * 2 * 32.0}
    assert four["kv_cache"] == held


def test_eval_on_the_command_line(llama_dir: Path) -> None:
    from click.testing import CliRunner

    from compress.cli import main

    arguments = ["eval", str(llama_dir), "--tasks", "", "--limit", "1", "--window", "32", "--kv-cache"]
    shown = CliRunner().invoke(main, [*arguments, "kivi", "--kv-bits", "2"])
    assert shown.exit_code == 0, shown.output
    assert "KV cache, bytes per token (kivi, 2 bits)" in shown.output


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
@pytest.mark.parametrize("columns", [1, 37, 64])
def test_compiled_unpacking_equals_the_slow_one(bits: int, columns: int) -> None:
    """By heads and by one order for all; with a block that holds no number."""
    form = Format(bits, 16, True, torch.float32)
    generator = torch.Generator().manual_seed(bits)
    values = torch.randn(2 * 3 * 5, columns, generator=generator)
    values[7, 0] = torch.inf
    exponents = bfp.shared_exponents(values, form)
    parts = [part.view(2, 3, 5, -1) for part in (bfp.pack(values, exponents, form), exponents)]
    plain = bfp.unpack(bfp.pack(values, exponents, form), exponents, form, columns).view(2, 3, 5, columns)
    mean = torch.randn(1, 3, 1, columns, generator=generator)
    for heads in (1, 3):
        order = torch.stack([torch.randperm(columns, generator=generator) for _ in range(heads)]).view(1, heads, 1, -1)
        places = torch.empty_like(plain).scatter_(-1, order.expand_as(plain), plain)
        for added in (None, mean):
            found = bfp_cache.states(*parts, form, order, added)
            torch.testing.assert_close(
                found, places if added is None else places + added, rtol=0, atol=0, equal_nan=True
            )
    assert bfp_cache.states(*(part[:, :, :0] for part in parts), form, order, None).shape == (2, 3, 0, columns)
