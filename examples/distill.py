"""Distils a language model into a smaller one: from all logits of the teacher, and from 32 a token.

    python examples/distill.py

The full teacher runs beside the student at every step, since its logits are too large to keep: 128
kB per token. Its 32 largest log-probabilities and their words take 256 bytes per token. They are
found once, and every later training reads them. `fastdiv.topk_kl_div` learns from these, in one
pass over the student's logits each way. It spreads the rest of the probability over all other
words.

Each way of distilling is done in plain torch as well. Model, batches and curve are the same; time
and memory differ. If two curves differ by more than float32 noise, the script exits with 1.
"""

import argparse
import sys
from functools import partial

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fastdiv
from corpus import Corpus, read_corpus
from measure import Loss, measure
from report import Comparison, bar, finish, progress_bars
from training import LanguageModel, fit, parse, sizes

ROWS, LENGTH = 8, 32
TEACHER_WIDTH, STUDENT_WIDTH = 64, 32
COMPARED = ("torch", "fastdiv in place")  # the losses that students are trained with


def torch_kl_div(student: Tensor, teacher: Tensor) -> Tensor:
    """Return what `fastdiv_kl_div` does, the way one writes it with torch."""
    log_q, log_p = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


fastdiv_kl_div = partial(fastdiv.kl_div, target_type="logits")
FULL: dict[str, Loss] = {  # of (student's logits, teacher's logits)
    "torch": torch_kl_div,
    "fastdiv": fastdiv_kl_div,
    "fastdiv in place": partial(fastdiv_kl_div, inplace_backward=True),
}


def torch_topk_kl_div(student: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """Return what `fastdiv_topk_kl_div` does, the way one writes it with torch."""
    log_q = F.log_softmax(student, dim=-1)
    of_k, p = log_q.gather(-1, indices), values.exp()
    rest, others = 1 - p.sum(-1), student.shape[-1] - values.shape[-1]
    mean = (log_q.sum(-1) - of_k.sum(-1)) / others
    rows = (p * (values - of_k)).sum(-1) + rest * ((rest / others).log() - mean)
    return rows.mean()


fastdiv_topk_kl_div = partial(fastdiv.topk_kl_div, values_type="log_probs", missing="uniform")
TOPK: dict[str, Loss] = {  # of (student's logits, the teacher's k log-probabilities, their words)
    "torch": torch_topk_kl_div,
    "fastdiv": fastdiv_topk_kl_div,
    "fastdiv in place": partial(fastdiv_topk_kl_div, inplace_backward=True),
}


@torch.no_grad()
def largest(teacher: nn.Module, words: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k most likely words of each token, to be stored, as (log-probabilities, words)."""
    values, indices = F.log_softmax(teacher(words), dim=-1).topk(k)
    return values, indices.int()


def compare(corpus: Corpus, options: argparse.Namespace, console: Console) -> list[Comparison]:
    """Distil in both ways with each of `COMPARED`, then measure the losses alone."""

    def new_model(width: int) -> LanguageModel:
        return LanguageModel(len(corpus.words), width, options.seed).to(options.device)

    def batches(seed: int, steps: int) -> list[tuple[Tensor, Tensor]]:
        return list(corpus.batches(steps, ROWS, LENGTH, options.seed + seed, options.device))

    teacher = new_model(TEACHER_WIDTH)
    of_full, of_topk = ({name: new_model(STUDENT_WIDTH) for name in COMPARED} for _ in range(2))
    texts = batches(1, options.steps)

    def teacher_loss(_: str, words: Tensor, next_words: Tensor) -> Tensor:
        return fastdiv.cross_entropy(teacher(words), next_words.flatten(), inplace_backward=True)

    def full_loss(name: str, words: Tensor, _: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_logits = teacher(words)
        return FULL[name](of_full[name](words), teacher_logits)

    def topk_loss(name: str, words: Tensor, _: Tensor) -> Tensor:
        values, indices = stored[id(words)]
        return TOPK[name](of_topk[name](words), values, indices.long())

    with progress_bars(console) as bars:
        on_step = bar(bars, "teacher", ["fastdiv in place"], options.teacher_steps)
        text = batches(0, options.teacher_steps)
        fit({"fastdiv in place": teacher}, text, teacher_loss, on_step)
        on_step = bar(bars, "full", COMPARED, options.steps)
        full = fit(of_full, texts, full_loss, on_step)
        stored = {id(words): largest(teacher, words, options.k) for words, _ in texts}
        on_step = bar(bars, f"top {options.k}", COMPARED, options.steps)
        topk = fit(of_topk, texts, topk_loss, on_step)

    values, indices = next(iter(stored.values()))
    print_stored(values, indices, len(corpus.words), options, console)
    words, next_words = batches(2, 1)[0]  # which no model has seen
    models = {
        "teacher": teacher,
        "student of all logits": of_full[COMPARED[1]],
        f"student of {options.k}": of_topk[COMPARED[1]],
    }
    with torch.no_grad():
        nats = {k: fastdiv.cross_entropy(v(words), next_words.flatten()) for k, v in models.items()}
        logits, student_logits = teacher(words), of_topk["torch"](words)
    found = ", ".join(f"{name} {value:.3f}" for name, value in nats.items())
    console.print(f"next word of other text, nats: {found}\n", highlight=False, soft_wrap=True)

    at_classes = {name: partial(at_fixed_classes, loss) for name, loss in TOPK.items()}
    with console.status("measuring the losses alone"):
        full_alone = measure(FULL, student_logits, target=logits)
        topk_alone = measure(at_classes, student_logits, target=values)
    return [
        Comparison("all logits, kl_div", full, *full_alone),
        Comparison(f"{options.k} of them, topk_kl_div", topk, *topk_alone),
    ]


def at_fixed_classes(loss: Loss, student: Tensor, values: Tensor) -> Tensor:
    """Compute the loss with evenly spaced words: time and memory do not depend on them."""
    k = values.shape[-1]
    indices = torch.arange(k, device=values.device) * (student.shape[-1] // k)
    return loss(student, values, indices.expand(values.shape))


def print_stored(
    values: Tensor, indices: Tensor, classes: int, options: argparse.Namespace, console: Console
) -> None:
    """Print the size of a stored teacher."""
    tokens, k = values.shape
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("kept of the teacher")
    for heading in ("bytes a token", f"{options.steps} batches", "probability covered"):
        table.add_column(heading, justify="right")
    covered = values.exp().sum(-1).mean().item()
    for name, size, share in (
        (f"{classes:,} logits", 4 * classes * tokens, "100 %"),
        (f"{k} log-probabilities and words", values.nbytes + indices.nbytes, f"{covered:.0%}"),
    ):
        megabytes = size * options.steps / 1e6
        table.add_row(name, f"{size // tokens:,}", f"{megabytes:,.1f} MB", share)
    console.print(table)


def main() -> int:
    """Return 0 if fastdiv's curves and torch's agree, else 1."""
    options = parse(
        __file__,
        __doc__,
        steps=(30, "batches to train on"),
        teacher_steps=(80, "batches for the teacher"),
        vocab=(32_000, "distinct words to keep"),
        k=(32, "words of the teacher to store; at most VOCAB"),
    )
    if options.k > options.vocab:
        sys.exit("--k must be at most --vocab")
    console, corpus = Console(), read_corpus(options.vocab)
    title = sizes(ROWS * LENGTH, len(corpus.words), options.device)
    console.print(title)
    return finish(compare(corpus, options, console), title, options.output, console)


if __name__ == "__main__":
    sys.exit(main())
