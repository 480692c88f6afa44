"""Trains a language model by rewards with TRL's `GRPOTrainer`, without fastdiv and with it.

    python examples/grpo_trl.py         (needs `pip install trl`)

Nothing is downloaded: the model is a tiny Llama from a configuration, and its words are numbers.
There are two prompts, "even" and "odd". The reward is the share of a completion's numbers that are.
The one line is `trl_on_fastdiv.apply()`: TRL's log-probabilities and entropies then come from
`fastdiv.linear_log_prob_and_entropy`. Time and memory differ. If rewards and entropies of the first
steps differ by more than float32 noise, the script exits with 1.
"""

import argparse
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from functools import cache
from statistics import fmean, median
from typing import Any

import torch
from datasets import Dataset
from rich import box
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import utils

import fastdiv.integrations.trl as trl_on_fastdiv
from measure import Loss, measure
from training import positive, sizes

PROMPTS = ("even", "odd")
GENERATIONS, ANSWER, WIDTH = 8, 16, 64
ROWS, MEASURED_WIDTH, CLASSES = 512, 256, 8_000  # of the log-probabilities alone
SPECIAL = ["<pad>", "</s>", "<unk>", *PROMPTS]
# Steps that differ by rounding alone, and the most that they may.  Later a rounding may change a
# sampled word, and with it what is learned.
COMPARED, NOISE = 5, 1e-4
TRLS = utils._ChunkedLogProbFunction  # before the line


@cache  # once in each process
def the_line() -> trl_on_fastdiv.TrlPatch:
    return trl_on_fastdiv.apply()


def log_probs(function: Any, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Return the mean of the log-probabilities that TRL trains on; it logs the entropies."""
    outputs = ("log_probs", "entropy")
    return function.apply(hidden, weight, None, target, 1.0, 32768, None, 1.0, outputs)[0].mean()


def plain(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return log_probs(TRLS, hidden, weight, target)


def patched(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    the_line()
    return log_probs(utils._ChunkedLogProbFunction, hidden, weight, target)


LOSSES: dict[str, Loss] = {"torch": plain, "patched": patched}


@dataclass
class Run:
    """The reward, the entropy in nats, and the seconds of every step of a training."""

    rewards: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


class Clock(TrainerCallback):
    """A record of the time of each step."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.run.seconds.append(time.perf_counter() - self.start)


def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Return the share of each completion's numbers that are as its prompt says."""

    def share(prompt: str, completion: str) -> float:
        numbers = [int(word) for word in completion.split() if word.isdecimal()]
        return sum(number % 2 == PROMPTS.index(prompt) for number in numbers) / ANSWER

    return [share(*pair) for pair in zip(prompts, completions, strict=True)]


def tokenizer(words: int) -> PreTrainedTokenizerFast:
    number = {word: i for i, word in enumerate([*SPECIAL, *map(str, range(words))])}
    of_words = Tokenizer(WordLevel(number, unk_token="<unk>"))
    of_words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=of_words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def model(options: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + options.vocab,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).to(options.device)


def train(options: argparse.Namespace) -> Run:
    """Train as TRL does; nothing here depends on the line."""
    run = Run()
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=len(PROMPTS) * GENERATIONS,
            num_generations=GENERATIONS,
            max_completion_length=ANSWER,
            learning_rate=5.0,
            # Adam turns rounding noise into large steps, and the model would write other numbers.
            optim="sgd",
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=options.device == "cpu",
            bf16=False,
            seed=options.seed,
        )
        trainer = GRPOTrainer(
            model=model(options),
            reward_funcs=reward,
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
            processing_class=tokenizer(options.vocab),
            callbacks=[Clock(run)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    run.rewards = [entry["reward"] for entry in logged]
    run.entropies = [entry["entropy"] for entry in logged]
    return run


def report(
    runs: dict[str, Run],
    seconds: dict[str, float],
    memory: dict[str, float | None],
    console: Console,
) -> None:
    """Print a table of both trainings, and of the log-probabilities alone."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("", min_width=14)
    for heading in ("reward", "last 3", "step, s", "alone, ms", "speed-up", "peak, MB"):
        table.add_column(heading, justify="right")
    for name, run in runs.items():
        peak = memory[name]
        table.add_row(
            {"torch": "TRL", "patched": "TRL on fastdiv"}[name],
            f"{run.rewards[0]:.3f}",
            f"{fmean(run.rewards[-3:]):.3f}",
            f"{median(run.seconds):.3f}",
            f"{seconds[name] * 1e3:.1f}",
            f"{seconds['torch'] / seconds[name]:.1f}×",
            "?" if peak is None else f"{peak / 1e6:.0f}",
        )
    console.print(table)
    console.print(
        "alone: log-probabilities and entropies of hidden states, forward and backward, median; "
        "peak: their memory beyond their arguments\n",
        soft_wrap=True,
    )


def main() -> int:
    """Return 0 if both trainings begin with the same rewards and entropies, else 1."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=positive, default=14, help="steps to train")
    parser.add_argument("--vocab", type=positive, default=1_000, help="numbers to choose from")
    parser.add_argument("--seed", type=int, default=0, help="of the model and the completions")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default_device, help="where to train")
    options = parser.parse_args()
    console = Console()
    warnings.simplefilter("ignore", FutureWarning)  # about parts of transformers that TRL uses
    with console.status("training with TRL"):
        runs = {"torch": train(options)}
    with console.status("training with TRL on fastdiv"), trl_on_fastdiv.apply():
        runs["patched"] = train(options)
    with console.status("measuring the log-probabilities alone"):
        layer = [torch.randn(n, MEASURED_WIDTH, device=options.device) for n in (ROWS, CLASSES)]
        target = torch.randint(CLASSES, (ROWS,), device=options.device)
        seconds, memory = measure(LOSSES, *layer, target=target)
    console.print("alone:", sizes(ROWS, CLASSES, options.device), soft_wrap=True)
    report(runs, seconds, memory, console)
    before, after = runs.values()
    curves = (run.entropies[:COMPARED] + run.rewards[:COMPARED] for run in (before, after))
    apart = max(abs(a - b) for a, b in zip(*curves, strict=True))
    same = apart <= NOISE
    console.print(
        "[green]same curve[/]:" if same else "[bold red]NOT the same curve[/]:",
        f"entropies and rewards of the first {COMPARED} steps at most {apart:.1e} apart "
        f"(allowed {NOISE:.0e})",
        highlight=False,
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
