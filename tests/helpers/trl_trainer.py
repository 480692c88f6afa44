"""Trainings by TRL that need no download: tiny random models, a tokenizer of some words."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WORDS = ["<pad>", "</s>", "<unk>", "user", "assistant", *map(str, range(60))]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


@dataclass
class Trained:
    """What a training logged, and the gradients of its steps."""

    losses: list[float] = field(default_factory=list)
    logged: list[dict[str, float]] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)


def conversation(start: int) -> dict[str, list[dict[str, str]]]:
    answer = " ".join(str(start + i) for i in range(3 + start % 3))
    return {
        "messages": [
            {"role": "user", "content": str(start)},
            {"role": "assistant", "content": answer},
        ]
    }


def prompt(start: int) -> dict[str, Any]:
    return {"prompt": f"user {start} </s> assistant"}


def preference(start: int) -> dict[str, Any]:
    return prompt(start) | {"chosen": f" {start + 1} {start + 2}", "rejected": f" {start + 9}"}


def judged(start: int) -> dict[str, Any]:
    return prompt(start) | {"completion": f" {start + 1} {start + 2}", "label": start % 2 == 0}


def reward(completions: list[str], **_: Any) -> list[float]:
    """Count the words, and the numbers above 30."""
    numbers = [[int(word) for word in text.split() if word.isdigit()] for text in completions]
    return [len(row) + 3.0 * sum(number > 30 for number in row) for row in numbers]


# For each trainer: its data, the options of its configuration, its arguments.
SAMPLING: dict[str, Any] = {"num_generations": 4, "max_completion_length": 5, "beta": 0.04}
TRAINERS: dict[str, tuple[Callable[[int], Any], dict[str, Any], dict[str, Any]]] = {
    "GKD": (conversation, {"lmbda": 0.5, "beta": 0.3, "max_new_tokens": 4, "max_length": 32}, {}),
    "GRPO": (prompt, SAMPLING | {"temperature": 0.9}, {"reward_funcs": reward}),
    "RLOO": (prompt, SAMPLING, {"reward_funcs": reward}),
    "DPO": (preference, {"max_length": 32}, {}),
    "KTO": (judged, {"max_length": 32}, {}),
    "SFT": (conversation, {"max_length": 32}, {}),
    "Distillation": (prompt, {"beta": 0.5, "max_completion_length": 5}, {}),
}
WITH_TEACHER = ("GKD", "Distillation")


def train(folder: Path, name: str = "GKD", **options: Any) -> Trained:
    """Train for three steps, and record losses and gradients."""
    # Here, since pytest imports this file for its doctests where these may be missing.
    from datasets import Dataset
    from transformers import TrainerCallback

    where = "trl.experimental.gkd" if name == "GKD" else "trl"
    trl = importlib.import_module(where)
    row, own, arguments = TRAINERS[name]
    config = getattr(trl, f"{name}Config")(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        optim="sgd",
        seed=0,
        **(own | options),
    )
    done = Trained()

    class Recorder(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            done.gradients.append(torch.cat(found).clone())

    if name in WITH_TEACHER:
        arguments = arguments | {"teacher_model": model(32, 1)}
    student = model(16, 0)
    student.save_pretrained(folder / "start")  # some read the reference model from there
    trainer = getattr(trl, f"{name}Trainer")(
        model=type(student).from_pretrained(folder / "start"),
        args=config,
        train_dataset=Dataset.from_list([row(start) for start in range(8)]),
        processing_class=tokenizer(),
        callbacks=[Recorder()],
        **arguments,
    )
    trainer.train()
    done.logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    done.losses = [entry["loss"] for entry in done.logged]
    return done


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
