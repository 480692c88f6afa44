"""Trains a language model with fastdiv, distils it with fastdiv, and does both again with torch.

    python examples/train_lm.py

Nothing is downloaded: the text is Python's own manual and standard library. With a vocabulary of
50,304 words, the logits of one small batch take 103 MB.

`CROSS_ENTROPY` and `DISTILLATION` below are all that uses fastdiv: functions from logits to a loss,
in the place of torch's. The rest compares the two. Model, batches and curve are the same; speed and
memory differ. If the curves differ by more than float32 noise, the script exits with 1.

The last table is of the model's last layer and the loss together, from the hidden states on, where
`linear_cross_entropy` never holds the logits. With `--fused-linear` the model is trained so.
"""

import argparse
import sys
from functools import partial

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

import fastdiv
from corpus import Corpus, print_corpus, read_corpus
from measure import Loss, measure
from report import Comparison, bar, finish, progress_bars
from training import LanguageModel, fit, parse, sizes

ROWS, LENGTH, WIDTH = 16, 32, 64
TEMPERATURE = 2.0

fastdiv_kl_div = partial(
    fastdiv.kl_div, target_type="logits", reduction="batchmean", temperature=TEMPERATURE
)


def torch_kl_div(student: Tensor, teacher: Tensor) -> Tensor:
    """Return what `fastdiv_kl_div` does, the way one writes it with torch."""
    log_q = F.log_softmax(student / TEMPERATURE, dim=-1)
    log_p = F.log_softmax(teacher / TEMPERATURE, dim=-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


# `inplace_backward=True` writes the gradient over the logits. They come from the model's last
# matmul, and nothing else in a training step reads them.
CROSS_ENTROPY: dict[str, Loss] = {
    "torch": F.cross_entropy,
    "fastdiv": fastdiv.cross_entropy,
    "fastdiv in place": partial(fastdiv.cross_entropy, inplace_backward=True),
}
DISTILLATION: dict[str, Loss] = {
    "torch": torch_kl_div,
    "fastdiv": fastdiv_kl_div,
    "fastdiv in place": partial(fastdiv_kl_div, inplace_backward=True),
}
COMPARED = ("torch", "fastdiv in place")  # the losses that models are trained with


def torch_linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


# From hidden states and the layer's weight instead: no logits at all.
FUSED_LINEAR = "fastdiv, fused linear"
LINEAR: dict[str, Loss] = {
    "torch": torch_linear_cross_entropy,
    FUSED_LINEAR: fastdiv.linear_cross_entropy,
}


def compare(
    corpus: Corpus, options: argparse.Namespace, console: Console
) -> tuple[list[Comparison], list[Comparison]]:
    """Train and distil with torch and with fastdiv, then measure the losses alone.

    Return the comparisons of trainings, and those of losses only.
    """
    classes, seed, device = len(corpus.words), options.seed, options.device
    compared = ("torch", FUSED_LINEAR) if options.fused_linear else COMPARED
    models = {name: LanguageModel(classes, WIDTH, seed).to(device) for name in compared}
    students = {name: LanguageModel(classes, WIDTH // 2, seed).to(device) for name in COMPARED}
    teacher = models[compared[1]]

    def training_loss(name: str, words: Tensor, next_words: Tensor) -> Tensor:
        model, target = models[name], next_words.flatten()
        if name == FUSED_LINEAR:
            hidden, head = model.hidden(words), model.head
            return fastdiv.linear_cross_entropy(hidden, head.weight, target, linear_bias=head.bias)
        return CROSS_ENTROPY[name](model(words), target)

    def distillation_loss(name: str, words: Tensor, _: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_logits = teacher(words)
        return DISTILLATION[name](students[name](words), teacher_logits)

    with progress_bars(console) as bars:
        batches = corpus.batches(options.steps, ROWS, LENGTH, seed, device)
        on_step = bar(bars, "train", compared, options.steps)
        training = fit(models, batches, training_loss, on_step)
        batches = corpus.batches(options.distil_steps, ROWS, LENGTH, seed + 1, device)
        on_step = bar(bars, "distil", COMPARED, options.distil_steps)
        distillation = fit(students, batches, distillation_loss, on_step)

    words, next_words = next(corpus.batches(1, ROWS, LENGTH, seed, device))
    target, weight = next_words.flatten(), teacher.head.weight
    with torch.no_grad():
        logits, student_logits = teacher(words), students["fastdiv in place"](words)
        hidden = teacher.hidden(words)
    with console.status("measuring the losses alone"):
        of_linear = measure(LINEAR, hidden, weight, target=target)
        of_kl = measure(DISTILLATION, student_logits, target=logits)
        distilled = Comparison("distillation, kl_div", distillation, *of_kl)
        if options.fused_linear:
            name = "training, linear_cross_entropy"
            return [Comparison(name, training, *of_linear), distilled], []
        of_training = measure(CROSS_ENTROPY, logits, target=target)
    trained = Comparison("training, cross_entropy", training, *of_training)
    return [trained, distilled], [Comparison("last layer and loss", {}, *of_linear)]


def main() -> int:
    """Return 0 if fastdiv's curves and torch's agree, else 1."""
    options = parse(
        __file__,
        __doc__,
        steps=(300, "batches to train on"),
        distil_steps=(50, "batches to distil on"),
        vocab=(50_304, "distinct words to keep"),
        fused_linear="train with linear_cross_entropy: no logits",
    )
    console, corpus = Console(), read_corpus(options.vocab)
    print_corpus(corpus, console)
    title = sizes(ROWS * LENGTH, len(corpus.words), options.device)
    console.print(title)
    trained, others = compare(corpus, options, console)
    return finish(trained, title, options.output, console, others)


if __name__ == "__main__":
    sys.exit(main())
