"""Trains a Llama of Hugging Face Transformers with and without fastdiv's one line.

    python examples/finetune_transformers.py

It trains the same small model twice, from scratch and with a large vocabulary, on the text that
every Python carries. Only `apply(model)` differs: the model's own forward runs, but its logits are
never held. Batches and curve are the same; memory differs, and some time. If the curves differ by
more than float32 noise, the script exits with 1.
"""

import argparse
import sys
from statistics import fmean, median

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from corpus import read_corpus
from fastdiv.integrations.transformers import apply
from measure import in_new_process, peak_of
from report import NOISE, Comparison, bar, plot, progress_bars
from training import fit, parse, sizes

ROWS, LENGTH, WIDTH, LAYERS, HEADS, LEARNING_RATE = 8, 128, 128, 2, 4, 1e-3
COMPARED = ("torch", "fastdiv")


def new_model(name: str, options: argparse.Namespace) -> LlamaForCausalLM:
    """Return a model that is the same every time."""
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


def compare(options: argparse.Namespace, console: Console) -> Comparison:
    """Train both, then measure the memory of a step of each."""
    corpus = read_corpus(options.vocab)
    models = {name: new_model(name, options) for name in COMPARED}

    def batch_loss(name: str, words: Tensor, _: Tensor) -> Tensor:
        return models[name](words, labels=words).loss  # the model shifts them itself

    batches = corpus.batches(options.steps, ROWS, LENGTH, options.seed, options.device)
    with progress_bars(console) as bars:
        on_step = bar(bars, "train", COMPARED, options.steps)
        runs = fit(models, batches, batch_loss, on_step, LEARNING_RATE)
    seconds = {name: median(run.seconds) for name, run in runs.items()}
    with console.status("measuring the memory of a step"):
        memory = {name: in_new_process(peak_memory, name, options) for name in COMPARED}
    return Comparison("training", runs, seconds, memory)


def peak_memory(name: str, options: argparse.Namespace) -> float | None:
    """Return the bytes of a step at its peak."""
    model = new_model(name, options)
    words = torch.randint(options.vocab, (ROWS, LENGTH), device=options.device)

    def step(words: Tensor) -> None:
        model(words, labels=words).loss.backward()
        model.zero_grad()

    step(words[:1, :4])  # loads what is loaded lazily, starts the threads
    return peak_of(lambda: step(words), torch.device(options.device).type)


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
    plain, fused = comparison.seconds.values()
    console.print(
        "start: first batch; end: mean of the last 10; step: median, optimizer included; peak: the "
        "memory that forward and backward take beyond the weights, gradients included\n"
        f"fastdiv's step takes {fused / plain:.2f} of the time; "
        f"{'same curve' if comparison.agrees else 'NOT the same curve'}: at most "
        f"{comparison.differences.max():.1e} nats apart (allowed {NOISE:.0e})",
        highlight=False,
        soft_wrap=True,
    )


def main() -> int:
    """Return 0 if fastdiv's curve and torch's agree, else 1."""
    options = parse(
        __file__,
        __doc__,
        steps=(12, "batches to train on"),
        vocab=(32_000, "distinct words to keep"),
    )
    console = Console()
    line = sizes(ROWS * LENGTH, options.vocab, options.device)
    title = f"Llama with {LAYERS} layers of width {WIDTH}, {line}"
    console.print(title, soft_wrap=True)
    comparison = compare(options, console)
    report(comparison, console)
    plot([comparison], title, options.output)
    console.print(f"picture: {options.output}", soft_wrap=True)
    return 0 if comparison.agrees else 1


if __name__ == "__main__":
    sys.exit(main())
