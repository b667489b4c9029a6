"""Fixtures shared by the tests: one tiny Llama with a tokenizer, and tiny models of many architectures."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# One thread: tiny tensors are faster so, and a busy machine does not stall the tests.
torch.set_num_threads(1)

_SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "An assignment statement evaluates the expression list and assigns the single resulting object.",
    "Compression of a language model trades bytes against quality, and both are measured.",
    "Weights are stored in groups; each group keeps a scale and perhaps a zero point.",
)


@pytest.fixture
def on_threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], list[Any]]:
    """What a function returns on one, two and three threads, each time, however little there is to do."""
    monkeypatch.setattr("compress.formats.threads._SIZE", 0)
    monkeypatch.setattr("compress.formats.threads._PYTHON_SIZE", 0)

    def run(function: Callable[[], Any]) -> list[Any]:
        found, before = [], torch.get_num_threads()
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found.append(function())
        finally:
            torch.set_num_threads(before)
        return found

    return run


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 Llama with random weights: hidden 64, 2 layers, GQA 4/2, tied, context 128, byte-level BPE of 300."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("llama")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(_SENTENCES * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=128
    )
    tokenizer.save_pretrained(path)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
        # Four times the usual spread, so that predictions differ from token to token.
        initializer_range=0.08,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


_SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.08,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "head_dim": 16}
_BERT_SIZES = {key: value for key, value in _SIZES.items() if key != "num_key_value_heads"}
# name -> (class of transformers, fields of its config)
_TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "one-layer": (
        "LlamaForCausalLM",
        {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        | {"num_attention_heads": 2, "num_key_value_heads": 1},
    ),
    "llama": ("LlamaForCausalLM", {"tie_word_embeddings": False}),
    "llama-tied-biased": ("LlamaForCausalLM", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    # 172 = 4 * 43 has no group of 128, 64 or 32; 43 rows are a multiple of nothing
    "llama-ragged": (
        "LlamaForCausalLM",
        {"intermediate_size": 172, "vocab_size": 131, "tie_word_embeddings": False, "head_dim": 10},
    ),
    "llama-heads": ("LlamaForCausalLM", {"num_key_value_heads": 4, "attention_bias": True}),
    # more than one 128x128 block each way, the last of them cut
    "llama-wide": ("LlamaForCausalLM", {"hidden_size": 160, "intermediate_size": 272, "tie_word_embeddings": False}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", {"head_dim": 16}),
    "gemma3": ("Gemma3ForCausalLM", {"head_dim": 16, "sliding_window": 16}),
    "phi": ("PhiForCausalLM", {}),
    "phi3": ("Phi3ForCausalLM", {}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt-neox": ("GPTNeoXForCausalLM", {}),
    "opt": ("OPTForCausalLM", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "falcon": ("FalconForCausalLM", {}),
    "mamba": ("MambaForCausalLM", {}),
    "t5": ("T5ForConditionalGeneration", {"d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 4, "d_kv": 16}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": ("Qwen2MoeForCausalLM", {**_MOE, "num_experts": 4, "shared_expert_intermediate_size": 48}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {**_MOE, "num_experts": 4}),
    "gpt-oss": (
        "GptOssForCausalLM",
        {"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    ),
    # its experts lie in parameters called `weight`
    "jetmoe": ("JetMoeForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 16}),
    "llama4": ("Llama4ForCausalLM", {"head_dim": 16, "intermediate_size_mlp": 128, "num_local_experts": 4}),
    "deepseek-v3": (
        "DeepseekV3ForCausalLM",
        {
            **{key: value for key, value in _MOE.items() if key != "head_dim"},
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": 32,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "qk_nope_head_dim": 8,
            "first_k_dense_replace": 1,
        },
    ),
}


@pytest.fixture(scope="session")
def tiny_config() -> Callable[[str], Any]:
    """tiny_config(name): the config of a tiny model of `_TINY`; architectures set."""
    import transformers

    def config(name: str) -> Any:
        architecture, fields = _TINY[name]
        sizes = _SIZES if name not in ("gpt2", "t5", "falcon", "gpt-neox", "opt", "mamba") else _BERT_SIZES
        made = getattr(transformers, architecture).config_class(**{**sizes, **fields})
        made.architectures = [architecture]
        return made

    return config


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable[[str], Any]) -> Callable[[str], Path]:
    """tiny_model(name): the directory of a tiny bf16 model with random weights; no tokenizer. Treat it as read-only."""
    import transformers

    base = tmp_path_factory.mktemp("tiny")

    def path(name: str) -> Path:
        if not (base / name).exists():
            config = tiny_config(name)
            torch.manual_seed(0)
            model = getattr(transformers, config.architectures[0])(config).to(torch.bfloat16)
            with torch.no_grad():
                for tensor in model.parameters():
                    if tensor.dim() == 1:  # biases start as zeros and norms as ones: then neither shows when lost
                        tensor.add_(0.05 * torch.randn(tensor.shape))
            model.save_pretrained(base / name)
        return base / name

    return path


@pytest.fixture(scope="session")
def tiny_compressed(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path]) -> Callable[..., Path]:
    """tiny_compressed(name, scheme, **options): a tiny model compressed without data, unscored. It is read-only."""
    import compress

    base = tmp_path_factory.mktemp("compressed")
    known: dict[tuple[Any, ...], Path] = {}

    def path(name: str, scheme: str, **options: Any) -> Path:
        data_free: dict[str, dict[str, Any]] = {
            "int4": {"method": "rtn"},
            "int8": {"smooth": False},
            "bfp": {"method": "rtn", "reorder": False},
        }
        options = {**data_free.get(scheme, {}), **options}
        key = (name, scheme, *sorted(options.items()))
        if key not in known:
            known[key] = base / str(len(known))
            compress.quantize(tiny_model(name), known[key], scheme, scoring=None, **options)
        return known[key]

    return path


@pytest.fixture(scope="session")
def running_weights() -> Callable[[Any], dict[str, torch.Tensor]]:
    """running_weights(model): path of a parameter -> its value as the compressed modules run it."""
    from compress.kernels.experts import CompressedExperts
    from compress.kernels.linear import CompressedLinear

    def weights(model: Any) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        within = "no module yet"
        for path, module in model.named_modules():
            if isinstance(module, CompressedExperts):
                found[path], within = module.dense(), f"{path}."
            if isinstance(module, CompressedLinear) and not path.startswith(within):
                found[f"{path}.weight"] = module.weight
        return found

    return weights


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What scoring keeps between runs: not in the user's cache, and nothing of it from before."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPRESS_CACHE", str(folder))
        yield folder
