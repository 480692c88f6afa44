"""Trains a Llama of Hugging Face Transformers with and without fastdiv's one line.

    python examples/finetune_transformers.py

The same small model twice, untrained and with a large vocabulary, on the text that every Python
brings along. `apply(model)` is all that tells them apart: the model's own forward runs, but its
logits are never held. Same batches, same curve; what changes is memory, and some time. If the
curves are apart by more than float32 noise, the script exits with 1.
"""

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from corpus import read_corpus
from fastdiv._bench.memory import peak_of
from fastdiv.integrations.transformers import apply
from report import NOISE, Comparison, bar, plot, progress_bars
from train_lm import example_parser, fit, machine

ROWS, LENGTH, WIDTH, LAYERS, HEADS, LEARNING_RATE = 8, 128, 128, 2, 4, 1e-3
COMPARED = ("torch", "fastdiv")


class Options(argparse.Namespace):
    """The command line."""

    device: str
    steps: int
    seed: int
    vocab: int
    output: Path


def new_model(name: str, options: Options) -> LlamaForCausalLM:
    """Returns a model that is the same every time."""
    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(options.device).train()
    if name == "fastdiv":
        apply(model)  # the one line
    return model


def compare(options: Options, console: Console) -> Comparison:
    """Trains both, then measures the memory of a step of each."""
    corpus = read_corpus(options.vocab)
    models = {name: new_model(name, options) for name in COMPARED}

    def batch_loss(name: str, words: Tensor, _: Tensor) -> Tensor:
        return models[name](words, labels=words).loss  # which the model shifts itself

    batches = corpus.batches(options.steps, ROWS, LENGTH, options.seed, options.device)
    with progress_bars(console) as bars:
        on_step = bar(bars, "train", COMPARED, options.steps)
        runs = fit(models, batches, batch_loss, on_step, LEARNING_RATE)
    seconds = {name: median(run.seconds) for name, run in runs.items()}
    with console.status("measuring the memory of a step"):
        memory = {name: peak_memory(name, options) for name in COMPARED}
    return Comparison("training", runs, seconds, memory)


def peak_memory(name: str, options: Options) -> float | None:
    """Returns the bytes of a step at its peak, in a process that has nothing to reuse."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh_process:
        return fresh_process.submit(_peak_memory, name, options).result()


def _peak_memory(name: str, options: Options) -> float | None:
    model = new_model(name, options)
    words = torch.randint(options.vocab, (ROWS, LENGTH), device=options.device)

    def step(words: Tensor) -> None:
        model(words, labels=words).loss.backward()
        model.zero_grad()

    step(words[:1, :4])  # loads what is loaded lazily, starts the threads
    return peak_of(lambda: step(words), torch.device(options.device).type)[1]


def report(comparison: Comparison, console: Console) -> None:
    table = Table("", "start", "end", "step", "peak", box=box.SIMPLE_HEAD)
    for name, run in comparison.runs.items():
        memory = comparison.memory[name]
        table.add_row(
            name,
            f"{run.losses[0]:.4f} nats",
            f"{fmean(run.losses[-10:]):.4f} nats",
            f"{comparison.seconds[name] * 1e3:.0f} ms",
            "?" if memory is None else f"{memory / 1e6:.0f} MB",
        )
    console.print(table)
    theirs, ours = comparison.seconds.values()
    console.print(
        "start: first batch; end: mean of the last 10; step: median, optimizer included; peak: the "
        "memory that forward and backward take beyond the weights, gradients included\n"
        f"fastdiv's step takes {ours / theirs:.2f} of the time; "
        f"{'same curve' if comparison.agrees else 'NOT the same curve'}: at most "
        f"{comparison.differences.max():.1e} nats apart (allowed {NOISE:.0e})",
        highlight=False,
        soft_wrap=True,
    )


def parse_options() -> Options:
    parser = example_parser(__doc__, 12, Path(__file__).with_suffix(".png"))
    parser.add_argument("--vocab", type=int, default=32_000, help="distinct words to keep")
    options = parser.parse_args(namespace=Options())
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    return options


def main() -> int:
    """Returns 0 if fastdiv's curve and torch's agree, else 1."""
    options, console = parse_options(), Console()
    tokens = ROWS * LENGTH
    sizes = (
        f"Llama with {LAYERS} layers of width {WIDTH}, {tokens} tokens × {options.vocab:,} words: "
        f"{tokens * options.vocab * 4 / 1e6:.0f} MB of float32 logits, {machine(options.device)}"
    )
    console.print(sizes, soft_wrap=True)
    comparison = compare(options, console)
    report(comparison, console)
    plot([comparison], sizes, options.output)
    console.print(f"picture: {options.output}", soft_wrap=True)
    return 0 if comparison.agrees else 1


if __name__ == "__main__":
    sys.exit(main())
