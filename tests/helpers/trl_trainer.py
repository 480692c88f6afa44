"""A GKD training that needs no download: two tiny random models, a tokenizer of some words."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

WORDS = ["<pad>", "</s>", "<unk>", "user", "assistant", *map(str, range(60))]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def conversation(start: int) -> dict[str, list[dict[str, str]]]:
    answer = " ".join(str(start + i) for i in range(3 + start % 3))
    return {
        "messages": [
            {"role": "user", "content": str(start)},
            {"role": "assistant", "content": answer},
        ]
    }


def train(folder: Path) -> list[float]:
    """The losses of three steps."""
    # Here, since pytest imports this file for its doctests where these may be missing.
    from datasets import Dataset

    from helpers.trl_functions import trainers

    gkd = trainers["GKDTrainer"]
    config = importlib.import_module(gkd.__module__).GKDConfig(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        lmbda=0.5,
        beta=0.3,
        max_new_tokens=4,
        max_length=32,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        optim="sgd",
        seed=0,
    )
    trainer = gkd(
        model=model(16, 0),
        teacher_model=model(32, 1),
        args=config,
        train_dataset=Dataset.from_list([conversation(start) for start in range(8)]),
        processing_class=tokenizer(),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def model(width: int, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
    )
