"""Distils a language model with TRL's `GKDTrainer`, without `fastdiv.integrations.trl` and with it.

    python examples/gkd_trl.py          (needs `pip install trl`)

Nothing is downloaded: the text is Python's own manual and standard library, the tokenizer is made
of its words, and the teacher is first trained for a few steps. The student then learns from the
teacher's distributions by TRL's generalized Jensen-Shannon divergence, half of the time on its own
text. The one line is `trl_on_fastdiv.apply()`. Models, data and curve are the same; time and memory
differ. If the curves differ by more than float32 noise, the script exits with 1.
"""

import argparse
import os
import sys
import tempfile
import time
import warnings
from functools import cache
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # GKD is experimental there

import torch
from datasets import Dataset
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer

import fastdiv.integrations.trl as trl_on_fastdiv
from corpus import Corpus, read_corpus
from measure import Loss, measure
from report import Comparison, Run, finish
from training import parse, sizes

ROWS, QUESTION, ANSWER, CONVERSATIONS = 8, 8, 40, 64
STUDENT_WIDTH, TEACHER_WIDTH = 32, 64
BETA = 0.5
SPECIAL = ["<pad>", "</s>", "<user>", "<assistant>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
TRLS_LOSS = GKDTrainer.generalized_jsd_loss  # before the line


def plain(student: Tensor, teacher: Tensor) -> Tensor:
    return TRLS_LOSS(student, teacher, beta=BETA)


def patched(student: Tensor, teacher: Tensor) -> Tensor:
    the_line()
    return GKDTrainer.generalized_jsd_loss(student, teacher, beta=BETA)


@cache  # once in each process
def the_line() -> trl_on_fastdiv.TrlPatch:
    return trl_on_fastdiv.apply()


LOSSES: dict[str, Loss] = {"torch": plain, "patched": patched}


class Text:
    """The corpus in the form that TRL reads: a tokenizer of its words, and conversations."""

    def __init__(self, corpus: Corpus) -> None:
        self.words = [word for word in corpus.words if word.strip()]  # without indentation
        number = {word: i for i, word in enumerate(SPECIAL + self.words)}
        tokenizer = Tokenizer(WordLevel(number, unk_token="<unk>"))
        tokenizer.pre_tokenizer = WhitespaceSplit()
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            eos_token="</s>",
            unk_token="<unk>",
            chat_template=TEMPLATE,
        )
        self.stream = [
            word for i in corpus.tokens[:40_000].tolist() if (word := corpus.words[i]).strip()
        ]

    def conversations(self) -> Dataset:
        length = QUESTION + ANSWER
        rows = (self.stream[i * length : (i + 1) * length] for i in range(CONVERSATIONS))
        return Dataset.from_list([{"messages": conversation(row)} for row in rows])

    def model(self, width: int, options: argparse.Namespace) -> LlamaForCausalLM:
        torch.manual_seed(options.seed)
        config = LlamaConfig(
            vocab_size=len(SPECIAL) + len(self.words),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        )
        return LlamaForCausalLM(config).to(options.device)

    def teacher(self, options: argparse.Namespace) -> LlamaForCausalLM:
        model = self.model(TEACHER_WIDTH, options)
        words = torch.tensor(self.tokenizer.convert_tokens_to_ids(self.stream))
        windows = words[: len(words) // 32 * 32].view(-1, 32).to(options.device)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for step in range(options.teacher_steps):
            batch = windows[step * ROWS % (len(windows) - ROWS) :][:ROWS]
            optimizer.zero_grad()
            model(batch, labels=batch).loss.backward()
            optimizer.step()
        return model


def conversation(words: list[str]) -> list[dict[str, str]]:
    said = {"user": words[:QUESTION], "assistant": words[QUESTION:]}
    return [{"role": role, "content": " ".join(text)} for role, text in said.items()]


class Clock(TrainerCallback):
    """A record of the time of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def distil(text: Text, teacher: LlamaForCausalLM, options: argparse.Namespace) -> Run:
    """Train a student as TRL does; nothing here depends on the line."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = GKDConfig(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=ROWS,
            learning_rate=1.0,
            # Adam turns rounding noise into large steps, and the student would write other words.
            optim="sgd",
            lmbda=0.5,
            beta=BETA,
            max_new_tokens=8,
            max_length=64,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=options.device == "cpu",
            bf16=False,
            seed=options.seed,
        )
        trainer = GKDTrainer(
            model=text.model(STUDENT_WIDTH, options),
            teacher_model=teacher,
            args=arguments,
            train_dataset=text.conversations(),
            processing_class=text.tokenizer,
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Run(losses, clock.seconds)


def compare(text: Text, options: argparse.Namespace, console: Console) -> Comparison:
    with console.status("training the teacher"):
        teacher = text.teacher(options)
    with console.status("distilling with TRL"):
        runs = {"torch": distil(text, teacher, options)}
    with console.status("distilling with TRL on fastdiv"), trl_on_fastdiv.apply():
        runs["patched"] = distil(text, teacher, options)
    with console.status("measuring the losses alone"), torch.no_grad():
        classes = teacher.config.vocab_size
        logits = torch.randn(ROWS * ANSWER, classes, device=options.device)
        target = torch.randn_like(logits)
    return Comparison("GKD", runs, *measure(LOSSES, logits, target=target))


def main() -> int:
    """Return 0 if both curves agree, else 1."""
    options = parse(
        __file__,
        __doc__,
        steps=(15, "batches to train on"),
        teacher_steps=(40, "batches for the teacher"),
        vocab=(16_000, "distinct words to keep"),
    )
    console = Console()
    warnings.simplefilter("ignore", FutureWarning)  # about parts of transformers that TRL uses
    text = Text(read_corpus(options.vocab))
    line = sizes(ROWS * ANSWER, len(SPECIAL) + len(text.words), options.device)
    title = line.replace("per step", "per step, and as much of the teacher's")
    console.print(title, soft_wrap=True)
    return finish([compare(text, options, console)], title, options.output, console)


if __name__ == "__main__":
    sys.exit(main())
