"""Distils a language model into a smaller one: from all logits of the teacher, and from 32 a token.

    python examples/distill.py

The full teacher runs beside the student at every step, since nobody keeps its logits: 128 kB a
token. Its 32 largest log-probabilities and their words are kept: 256 bytes, found once, read by
every training that follows. `fastdiv.topk_kl_div` learns from these, in one pass over the student's
logits each way; the probability that the 32 leave over it spreads over the other words.

Each way of distilling is done in plain torch as well: same model, same batches, same curve; what
changes is time and memory. If two curves are apart by more than float32 noise, the script exits
with 1.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fastdiv
from corpus import Corpus, read_corpus
from measure import Loss, measure
from report import Comparison, Run, bar, plot, progress_bars, report
from train_lm import LanguageModel, example_parser, fit, machine

ROWS, LENGTH = 8, 32
TEACHER_WIDTH, STUDENT_WIDTH = 64, 32
COMPARED = ("torch", "fastdiv in place")  # what the students are trained with

# (student's logits, the teacher's k log-probabilities, the words these are of) -> scalar
TopKLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def torch_kl_div(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns what `fastdiv_kl_div` does, the way one writes it with torch."""
    log_q, log_p = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


fastdiv_kl_div = partial(fastdiv.kl_div, target_type="logits")
FULL: dict[str, Loss] = {
    "torch": torch_kl_div,
    "fastdiv": fastdiv_kl_div,
    "fastdiv in place": partial(fastdiv_kl_div, inplace_backward=True),
}


def torch_topk_kl_div(student: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """Returns what `fastdiv_topk_kl_div` does, the way one writes it with torch."""
    log_q = F.log_softmax(student, dim=-1)
    of_k, p = log_q.gather(-1, indices), values.exp()
    rest, others = 1 - p.sum(-1), student.shape[-1] - values.shape[-1]
    mean = (log_q.sum(-1) - of_k.sum(-1)) / others
    rows = (p * (values - of_k)).sum(-1) + rest * ((rest / others).log() - mean)
    return rows.mean()


fastdiv_topk_kl_div = partial(fastdiv.topk_kl_div, values_type="log_probs", missing="uniform")
TOPK: dict[str, TopKLoss] = {
    "torch": torch_topk_kl_div,
    "fastdiv": fastdiv_topk_kl_div,
    "fastdiv in place": partial(fastdiv_topk_kl_div, inplace_backward=True),
}


class Options(argparse.Namespace):
    """The command line."""

    device: str
    steps: int
    teacher_steps: int
    seed: int
    vocab: int
    k: int
    output: Path


@dataclass(frozen=True)
class Stored:
    """What is kept of the teacher for one batch."""

    values: Tensor  #: float32 `[tokens, k]`, log-probabilities
    indices: Tensor  #: int32 `[tokens, k]`, the words these are of

    @property
    def bytes(self) -> int:
        return self.values.nbytes + self.indices.nbytes


def train_teacher(
    corpus: Corpus, options: Options, on_step: Callable[[str, Run], None]
) -> LanguageModel:
    teacher = new_model(corpus, TEACHER_WIDTH, options)

    def batch_loss(_: str, words: Tensor, next_words: Tensor) -> Tensor:
        return fastdiv.cross_entropy(teacher(words), next_words.flatten(), inplace_backward=True)

    batches = corpus.batches(options.teacher_steps, ROWS, LENGTH, options.seed, options.device)
    fit({"fastdiv in place": teacher}, batches, batch_loss, on_step)
    return teacher


def new_model(corpus: Corpus, width: int, options: Options) -> LanguageModel:
    torch.manual_seed(options.seed)
    return LanguageModel(len(corpus.words), width).to(options.device)


@torch.no_grad()
def store(teacher: LanguageModel, words: Tensor, k: int) -> Stored:
    """Runs the teacher on a batch, and keeps the k words of each token that it holds likeliest."""
    values, indices = F.log_softmax(teacher(words), dim=-1).topk(k)
    return Stored(values, indices.int())


def compare(corpus: Corpus, options: Options, console: Console) -> list[Comparison]:
    """Distils in both ways with each of `COMPARED`, then measures the losses alone."""

    def batches(seed: int, steps: int) -> list[tuple[Tensor, Tensor]]:
        return list(corpus.batches(steps, ROWS, LENGTH, seed, options.device))

    students = {
        way: {name: new_model(corpus, STUDENT_WIDTH, options) for name in COMPARED}
        for way in ("full", "topk")
    }
    texts = batches(options.seed + 1, options.steps)
    with progress_bars(console) as bars:
        on_step = bar(bars, "teacher", ["fastdiv in place"], options.teacher_steps)
        teacher = train_teacher(corpus, options, on_step)

        def full_loss(name: str, words: Tensor, _: Tensor) -> Tensor:
            with torch.no_grad():
                teacher_logits = teacher(words)
            return FULL[name](students["full"][name](words), teacher_logits)

        on_step = bar(bars, "full", COMPARED, options.steps)
        full = fit(students["full"], texts, full_loss, on_step)

        stored = {id(words): store(teacher, words, options.k) for words, _ in texts}

        def topk_loss(name: str, words: Tensor, _: Tensor) -> Tensor:
            kept = stored[id(words)]
            logits = students["topk"][name](words)
            return TOPK[name](logits, kept.values, kept.indices.long())

        on_step = bar(bars, f"top {options.k}", COMPARED, options.steps)
        topk = fit(students["topk"], texts, topk_loss, on_step)

    words, next_words = batches(options.seed + 2, 1)[0]  # of neither
    kept = next(iter(stored.values()))
    print_kept(kept, len(corpus.words), options, console)
    nats = {
        "teacher": next_word_nats(teacher, words, next_words),
        "student of all logits": next_word_nats(students["full"][COMPARED[1]], words, next_words),
        f"student of {options.k}": next_word_nats(students["topk"][COMPARED[1]], words, next_words),
    }
    found = ", ".join(f"{name} {value:.3f}" for name, value in nats.items())
    console.print(f"next word of other text, nats: {found}\n", highlight=False, soft_wrap=True)

    with torch.no_grad():
        logits, student_logits = teacher(words), students["topk"]["torch"](words)
    at_classes = {name: partial(at_fixed_classes, loss) for name, loss in TOPK.items()}
    with console.status("measuring the losses alone"):
        of_full = measure(FULL, student_logits, logits)
        of_topk = measure(at_classes, student_logits, kept.values)
    return [
        Comparison("all logits, kl_div", full, *of_full),
        Comparison(f"{options.k} of them, topk_kl_div", topk, *of_topk),
    ]


def at_fixed_classes(loss: TopKLoss, student: Tensor, values: Tensor) -> Tensor:
    """The loss with a teacher of evenly spaced words: time and memory depend on neither."""
    k = values.shape[-1]
    indices = torch.arange(k, device=values.device) * (student.shape[-1] // k)
    return loss(student, values, indices.expand(values.shape))


def next_word_nats(model: nn.Module, words: Tensor, next_words: Tensor) -> float:
    with torch.no_grad():
        return fastdiv.cross_entropy(model(words), next_words.flatten()).item()


def print_kept(kept: Stored, classes: int, options: Options, console: Console) -> None:
    """Prints what a stored teacher takes."""
    tokens, k = kept.values.shape
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("kept of the teacher")
    for heading in ("bytes a token", f"{options.steps} batches", "probability covered"):
        table.add_column(heading, justify="right")
    covered = kept.values.exp().sum(-1).mean().item()
    for name, size, share in (
        (f"{classes:,} logits", 4 * classes * tokens, "100 %"),
        (f"{k} log-probabilities and words", kept.bytes, f"{covered:.0%}"),
    ):
        megabytes = size * options.steps / 1e6
        table.add_row(name, f"{size // tokens:,}", f"{megabytes:,.1f} MB", share)
    console.print(table)


def parse_options() -> Options:
    parser = example_parser(__doc__, 30, Path(__file__).with_suffix(".png"))
    parser.add_argument("--teacher-steps", type=int, default=80, help="batches for the teacher")
    parser.add_argument("--vocab", type=int, default=32_000, help="distinct words to keep")
    parser.add_argument("--k", type=int, default=32, help="words of the teacher to store")
    options = parser.parse_args(namespace=Options())
    if min(options.steps, options.teacher_steps) < 1:
        parser.error("--steps and --teacher-steps must be at least 1")
    if not 1 <= options.k <= options.vocab:
        parser.error("--k must be between 1 and --vocab")
    return options


def main() -> int:
    """Returns 0 if fastdiv's curves and torch's agree, else 1."""
    options, console = parse_options(), Console()
    corpus = read_corpus(options.vocab)
    rows, classes = ROWS * LENGTH, len(corpus.words)
    sizes = (
        f"{rows} tokens × {classes:,} words: {rows * classes * 4 / 1e6:.0f} MB of float32 logits"
        f" per step, {machine(options.device)}"
    )
    console.print(sizes)
    comparisons = compare(corpus, options, console)
    report(comparisons, console)
    plot(comparisons, sizes, options.output)
    console.print(f"picture: {options.output}", soft_wrap=True)
    return 0 if all(comparison.agrees for comparison in comparisons) else 1


if __name__ == "__main__":
    sys.exit(main())
