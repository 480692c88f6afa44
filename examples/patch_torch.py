"""Trains a language model with torch's own loss, and with `fastdiv.patch_torch()` before it.

    python examples/patch_torch.py

The training knows nothing of fastdiv: it calls `torch.nn.functional.cross_entropy`. The one line is
in `patched`, as a `with` block, so that both trainings fit into one program; in a program of your
own it stands at the top. Same model, same batches, same curve; what changes is time and memory. If
the curves are apart by more than float32 noise, the script exits with 1.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

import fastdiv
from corpus import Corpus, read_corpus
from measure import Loss, measure
from report import Comparison, bar, plot, progress_bars, report
from train_lm import LanguageModel, example_parser, fit, machine

ROWS, LENGTH, WIDTH = 16, 32, 32
COMPARED = ("torch", "patched")


def plain(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, label_smoothing=0.1)


def patched(logits: Tensor, target: Tensor) -> Tensor:
    with fastdiv.patch_torch():
        return plain(logits, target)


LOSSES: dict[str, Loss] = {"torch": plain, "patched": patched}


class Options(argparse.Namespace):
    """The command line."""

    device: str
    steps: int
    seed: int
    vocab: int
    output: Path


def compare(corpus: Corpus, options: Options, console: Console) -> Comparison:
    models = {}
    for name in COMPARED:
        torch.manual_seed(options.seed)
        models[name] = LanguageModel(len(corpus.words), WIDTH).to(options.device)

    def batch_loss(name: str, words: Tensor, next_words: Tensor) -> Tensor:
        return LOSSES[name](models[name](words), next_words.flatten())

    batches = corpus.batches(options.steps, ROWS, LENGTH, options.seed, options.device)
    with progress_bars(console) as bars:
        runs = fit(models, batches, batch_loss, bar(bars, "train", COMPARED, options.steps))
    words, next_words = next(corpus.batches(1, ROWS, LENGTH, options.seed, options.device))
    with torch.no_grad():
        logits = models["torch"](words)
    with console.status("measuring the losses alone"):
        measured = measure(LOSSES, logits, next_words.flatten())
    return Comparison("F.cross_entropy", runs, *measured)


def parse_options() -> Options:
    parser = example_parser(__doc__, 20, Path(__file__).with_suffix(".png"))
    parser.add_argument("--vocab", type=int, default=32_000, help="distinct words to keep")
    options = parser.parse_args(namespace=Options())
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    return options


def main() -> int:
    """Returns 0 if both curves agree, else 1."""
    options, console = parse_options(), Console()
    corpus = read_corpus(options.vocab)
    rows, classes = ROWS * LENGTH, len(corpus.words)
    sizes = (
        f"{rows} tokens × {classes:,} words: {rows * classes * 4 / 1e6:.0f} MB of float32 logits"
        f" per step, {machine(options.device)}"
    )
    console.print(sizes, soft_wrap=True)
    comparison = compare(corpus, options, console)
    report([comparison], console)
    plot([comparison], sizes, options.output)
    console.print(f"picture: {options.output}", soft_wrap=True)
    return 0 if comparison.agrees else 1


if __name__ == "__main__":
    sys.exit(main())
