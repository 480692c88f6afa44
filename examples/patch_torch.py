"""Trains a language model with torch's own loss, and with `fastdiv.patch_torch()` before it.

    python examples/patch_torch.py

The training does not mention fastdiv: it calls `torch.nn.functional.cross_entropy`. The one line is
in `patched`, as a `with` block, so that both trainings fit into one program; in a program of your
own it stands at the top. Model, batches and curve are the same; time and memory differ. If the
curves differ by more than float32 noise, the script exits with 1.
"""

import argparse
import sys

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

import fastdiv
from corpus import Corpus, read_corpus
from measure import Loss, measure
from report import Comparison, bar, finish, progress_bars
from training import LanguageModel, fit, parse, sizes

ROWS, LENGTH, WIDTH = 16, 32, 32


def plain(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, label_smoothing=0.1)


def patched(logits: Tensor, target: Tensor) -> Tensor:
    with fastdiv.patch_torch():
        return plain(logits, target)


LOSSES: dict[str, Loss] = {"torch": plain, "patched": patched}


def compare(corpus: Corpus, options: argparse.Namespace, console: Console) -> Comparison:
    def make() -> LanguageModel:
        return LanguageModel(len(corpus.words), WIDTH, options.seed).to(options.device)

    models = {name: make() for name in LOSSES}

    def batch_loss(name: str, words: Tensor, next_words: Tensor) -> Tensor:
        return LOSSES[name](models[name](words), next_words.flatten())

    batches = corpus.batches(options.steps, ROWS, LENGTH, options.seed, options.device)
    with progress_bars(console) as bars:
        runs = fit(models, batches, batch_loss, bar(bars, "train", LOSSES, options.steps))
    words, next_words = next(corpus.batches(1, ROWS, LENGTH, options.seed, options.device))
    with torch.no_grad():
        logits = models["torch"](words)
    with console.status("measuring the losses alone"):
        return Comparison(
            "F.cross_entropy", runs, *measure(LOSSES, logits, target=next_words.flatten())
        )


def main() -> int:
    """Return 0 if both curves agree, else 1."""
    options = parse(
        __file__,
        __doc__,
        steps=(20, "batches to train on"),
        vocab=(32_000, "distinct words to keep"),
    )
    console, corpus = Console(), read_corpus(options.vocab)
    title = sizes(ROWS * LENGTH, len(corpus.words), options.device)
    console.print(title, soft_wrap=True)
    return finish([compare(corpus, options, console)], title, options.output, console)


if __name__ == "__main__":
    sys.exit(main())
