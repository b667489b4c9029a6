"""The demo's model: a Llama of 1.4 M parameters, trained on Python's own documentation in about a minute.

It is small, but it is a real one: its weights are learned, so compressing it costs quality that can be measured.
"""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compress.eval.text import read

VOCABULARY = 1024
CONTEXT = 128
BATCH = 8
STEPS = 800
LEARNING_RATE = 3e-3

Progress = Callable[[int], None]  # told after every step how many are done


def train_into(directory: Path, progress: Progress) -> None:
    """Train the model and write it with its tokenizer. The directory appears when it is complete, never before."""
    unfinished = directory.with_name(directory.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    text = read(["builtin"], split="calibration").text
    tokenizer = train_tokenizer(text)
    tokenizer.save_pretrained(unfinished)
    model = train(torch.tensor(tokenizer(text, verbose=False)["input_ids"]), progress)
    model.to(torch.bfloat16).save_pretrained(unfinished)
    unfinished.rename(directory)


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every text can be written in it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        model_max_length=CONTEXT,
    )


def config() -> LlamaConfig:
    """Every width is a multiple of 128, the default group size of the schemes."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.04,  # learns faster than with the usual 0.02 at this width
    )


def train(tokens: Tensor, progress: Progress) -> LlamaForCausalLM:
    """tokens: (count,) int64. AdamW over random windows, one fixed seed and number of steps."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config()).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        starts = torch.randint(len(tokens) - CONTEXT, (BATCH, 1), generator=generator)
        batch = tokens[starts + torch.arange(CONTEXT)]
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        progress(step + 1)
    return model.eval()


def learning_rate(step: int) -> float:
    """Up over the first twentieth of the steps, then a cosine down to zero."""
    warmup = STEPS // 20
    if step < warmup:
        return LEARNING_RATE * (step + 1) / warmup
    return LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup)))
