"""Fixtures shared by the tests: one tiny Llama on disk."""

from pathlib import Path

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
