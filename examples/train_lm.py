"""Trains a language model with fastdiv, distils it with fastdiv, and does both again with torch.

    python examples/train_lm.py

Nothing is downloaded: the text is Python's own manual and standard library. With a vocabulary of
50,304 words, the logits of one small batch take 100 MB.

`CROSS_ENTROPY` and `DISTILLATION` below are all there is to using fastdiv: functions from logits to
a loss, in the place of torch's. The rest shows what that changes, which is speed and memory, and
what it does not: same model, same batches, same curve. If the curves are apart by more than float32
noise, the script exits with 1.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import fastdiv
from corpus import Corpus, read_corpus
from measure import Loss, measure
from report import Comparison, Run, bar, plot, progress_bars, report

ROWS, LENGTH, WIDTH = 16, 24, 64
LEARNING_RATE = 1e-2
TEMPERATURE = 2.0

fastdiv_kl_div = partial(
    fastdiv.kl_div, target_type="logits", reduction="batchmean", temperature=TEMPERATURE
)


def torch_kl_div(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns what `fastdiv_kl_div` does, the way one writes it with torch."""
    log_q = F.log_softmax(student / TEMPERATURE, dim=-1)
    log_p = F.log_softmax(teacher / TEMPERATURE, dim=-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


# `inplace_backward=True` writes the gradient over the logits. They come from the model's last
# matmul and nobody else needs them, so a training step may as well give them away.
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
FASTDIV = "fastdiv in place"  # what a model is trained with, before one is with "torch"


class Options(argparse.Namespace):
    """The command line."""

    device: str
    steps: int
    distil_steps: int
    seed: int
    vocab: int
    output: Path


class LanguageModel(nn.Module):
    """An embedding, a GRU, and a head that shares the embedding's weight."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        nn.init.zeros_(self.head.bias)
        self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        """Maps words `[rows, length]` to the next words' logits `[rows * length, vocabulary]`."""
        hidden, _ = self.gru(self.embedding(words))
        return self.head(hidden.flatten(0, 1))


def train(
    loss: Loss, corpus: Corpus, options: Options, progress: Callable[[float], None]
) -> tuple[LanguageModel, Run]:
    """Trains a new model to predict the next word."""
    torch.manual_seed(options.seed)
    model = LanguageModel(len(corpus.words), WIDTH).to(options.device)

    def batch_loss(words: Tensor, next_words: Tensor) -> Tensor:
        return loss(model(words), next_words.flatten())

    batches = corpus.batches(options.steps, ROWS, LENGTH, options.seed, options.device)
    return model, fit(model, batches, batch_loss, progress)


def distil(
    loss: Loss,
    teacher: LanguageModel,
    corpus: Corpus,
    options: Options,
    progress: Callable[[float], None],
) -> tuple[LanguageModel, Run]:
    """Trains a new model of half the width to predict what `teacher` predicts."""
    torch.manual_seed(options.seed)
    student = LanguageModel(len(corpus.words), WIDTH // 2).to(options.device)

    def batch_loss(words: Tensor, _: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher(words)
        return loss(student(words), target)

    batches = corpus.batches(options.distil_steps, ROWS, LENGTH, options.seed + 1, options.device)
    return student, fit(student, batches, batch_loss, progress)


def fit(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    batch_loss: Callable[[Tensor, Tensor], Tensor],
    progress: Callable[[float], None],
) -> Run:
    """Takes a step of Adam for each batch, and tells `progress` its loss."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    run = Run([], [])
    for words, next_words in batches:
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = batch_loss(words, next_words)
        loss.backward()
        optimizer.step()
        run.losses.append(loss.item())  # on CUDA this waits for the step
        run.seconds.append(time.perf_counter() - start)
        progress(run.losses[-1])
    return run


def compare(corpus: Corpus, options: Options, console: Console) -> list[Comparison]:
    """Does both tasks with fastdiv and with torch, then measures the losses alone."""
    training: dict[str, Run] = {}
    distillation: dict[str, Run] = {}
    models, students = {}, {}
    with progress_bars(console) as bars:
        for name in (FASTDIV, "torch"):
            on_step = bar(bars, f"train, {name}", options.steps)
            models[name], training[name] = train(CROSS_ENTROPY[name], corpus, options, on_step)
        teacher = models[FASTDIV]
        for name in (FASTDIV, "torch"):
            on_step = bar(bars, f"distil, {name}", options.distil_steps)
            students[name], distillation[name] = distil(
                DISTILLATION[name], teacher, corpus, options, on_step
            )

    words, next_words = next(corpus.batches(1, ROWS, LENGTH, options.seed, options.device))
    with torch.no_grad():
        logits, student_logits = teacher(words), students[FASTDIV](words)
    with console.status("measuring the losses alone"):
        seconds, memory = measure(CROSS_ENTROPY, logits, next_words.flatten())
        trained = Comparison("training, cross_entropy", FASTDIV, training, seconds, memory)
        seconds, memory = measure(DISTILLATION, student_logits, logits)
        distilled = Comparison("distillation, kl_div", FASTDIV, distillation, seconds, memory)
    return [trained, distilled]


def parse_options() -> Options:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default_device, help="where to train")
    parser.add_argument("--steps", type=int, default=150, help="batches to train on")
    parser.add_argument("--distil-steps", type=int, default=60, help="batches to distil on")
    parser.add_argument("--seed", type=int, default=0, help="of the models and the batches")
    parser.add_argument("--vocab", type=int, default=50_304, help="distinct words to keep")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).with_suffix(".png"), help="the picture"
    )
    options = parser.parse_args(namespace=Options())
    if min(options.steps, options.distil_steps) < 1:
        parser.error("--steps and --distil-steps must be at least 1")
    return options


def main() -> int:
    """Returns 0 if fastdiv's curves and torch's agree, else 1."""
    options, console = parse_options(), Console()
    corpus = read_corpus(options.vocab)
    rows, classes = ROWS * LENGTH, len(corpus.words)
    console.print(
        f"{' and '.join(corpus.sources)}: {len(corpus.tokens):,} words, {corpus.types:,} distinct; "
        f"the {classes:,} kept cover {corpus.coverage:.1%}",
        soft_wrap=True,
    )
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


def machine(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"


if __name__ == "__main__":
    sys.exit(main())
