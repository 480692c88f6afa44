"""Trains a language model with fastdiv, distils it with fastdiv, and does both again with torch.

    python examples/train_lm.py

Nothing is downloaded: the text is Python's own manual and standard library. With a vocabulary of
50,304 words, the logits of one small batch take 103 MB.

`CROSS_ENTROPY` and `DISTILLATION` below are all there is to using fastdiv: functions from logits to
a loss, in the place of torch's. The rest shows what that changes, which is speed and memory, and
what it does not: same model, same batches, same curve. If the curves are apart by more than float32
noise, the script exits with 1.

The last table is of the model's last layer and the loss together, from the hidden states on, where
`linear_cross_entropy` never holds the logits. With `--fused-linear` the model is trained so.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import fastdiv
from corpus import Corpus, read_corpus
from measure import LinearLoss, Loss, measure, measure_linear
from report import Comparison, Run, bar, plot, progress_bars, report

ROWS, LENGTH, WIDTH = 16, 32, 64
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
# From hidden states and the layer's weight instead: no logits at all.
FUSED_LINEAR = "fastdiv, fused linear"
LINEAR: dict[str, LinearLoss] = {
    "torch": lambda hidden, weight, target: F.cross_entropy(F.linear(hidden, weight), target),
    FUSED_LINEAR: fastdiv.linear_cross_entropy,
}
COMPARED = ("torch", "fastdiv in place")  # what the models are trained with


class Options(argparse.Namespace):
    """The command line."""

    device: str
    steps: int
    distil_steps: int
    seed: int
    vocab: int
    fused_linear: bool
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
        return self.head(self.hidden(words))

    def hidden(self, words: Tensor) -> Tensor:
        """What the head makes logits of, `[rows * length, width]`."""
        hidden, _ = self.gru(self.embedding(words))
        return hidden.flatten(0, 1)


def train(
    corpus: Corpus, options: Options, on_step: Callable[[str, Run], None]
) -> tuple[dict[str, LanguageModel], dict[str, Run]]:
    """Trains a model in torch and one in fastdiv to predict the next word."""
    models = {name: new_model(corpus, WIDTH, options) for name in compared(options)}

    def batch_loss(name: str, words: Tensor, next_words: Tensor) -> Tensor:
        model, target = models[name], next_words.flatten()
        if name == FUSED_LINEAR:
            hidden, head = model.hidden(words), model.head
            return fastdiv.linear_cross_entropy(hidden, head.weight, target, linear_bias=head.bias)
        return CROSS_ENTROPY[name](model(words), target)

    batches = corpus.batches(options.steps, ROWS, LENGTH, options.seed, options.device)
    return models, fit(models, batches, batch_loss, on_step)


def distil(
    teacher: LanguageModel, corpus: Corpus, options: Options, on_step: Callable[[str, Run], None]
) -> tuple[dict[str, LanguageModel], dict[str, Run]]:
    """Trains a model of half the width with each of `COMPARED` to predict what `teacher` does."""
    students = {name: new_model(corpus, WIDTH // 2, options) for name in COMPARED}

    def batch_loss(name: str, words: Tensor, _: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_logits = teacher(words)
        return DISTILLATION[name](students[name](words), teacher_logits)

    batches = corpus.batches(options.distil_steps, ROWS, LENGTH, options.seed + 1, options.device)
    return students, fit(students, batches, batch_loss, on_step)


def compared(options: Options) -> tuple[str, str]:
    """What the language models are trained with."""
    return ("torch", FUSED_LINEAR) if options.fused_linear else COMPARED


def new_model(corpus: Corpus, width: int, options: Options) -> LanguageModel:
    """Returns a model that is the same every time."""
    torch.manual_seed(options.seed)
    return LanguageModel(len(corpus.words), width).to(options.device)


def fit(
    models: Mapping[str, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    batch_loss: Callable[[str, Tensor, Tensor], Tensor],
    on_step: Callable[[str, Run], None],
    learning_rate: float = LEARNING_RATE,
) -> dict[str, Run]:
    """Takes a step of Adam with every model for each batch.

    They take turns, so that a machine that slows down slows all of them.
    """
    optimizers = {
        name: torch.optim.Adam(model.parameters(), lr=learning_rate)
        for name, model in models.items()
    }
    runs = {name: Run([], []) for name in models}
    for words, next_words in batches:
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.zero_grad()
            loss = batch_loss(name, words, next_words)
            loss.backward()
            optimizer.step()
            runs[name].losses.append(loss.item())  # on CUDA this waits for the step
            runs[name].seconds.append(time.perf_counter() - start)
            on_step(name, runs[name])
    return runs


def compare(corpus: Corpus, options: Options, console: Console) -> list[Comparison]:
    """Does both tasks with each of `COMPARED`, then measures the losses alone."""
    with progress_bars(console) as bars:
        on_step = bar(bars, "train", compared(options), options.steps)
        models, training = train(corpus, options, on_step)
        teacher = models[compared(options)[1]]
        students, distillation = distil(
            teacher, corpus, options, bar(bars, "distil", COMPARED, options.distil_steps)
        )

    words, next_words = next(corpus.batches(1, ROWS, LENGTH, options.seed, options.device))
    with torch.no_grad():
        logits, student_logits = teacher(words), students["fastdiv in place"](words)
        hidden = teacher.hidden(words)
    with console.status("measuring the losses alone"):
        weight, target = teacher.head.weight.detach(), next_words.flatten()
        of_linear = measure_linear(LINEAR, hidden, weight, target)
        of_training = None if options.fused_linear else measure(CROSS_ENTROPY, logits, target)
        of_distillation = measure(DISTILLATION, student_logits, logits)
    distilled = Comparison("distillation, kl_div", distillation, *of_distillation)
    if of_training is None:
        return [Comparison("training, linear_cross_entropy", training, *of_linear), distilled]
    return [
        Comparison("training, cross_entropy", training, *of_training),
        distilled,
        Comparison("last layer and loss", {}, *of_linear),
    ]


def example_parser(description: str, steps: int, output: Path) -> argparse.ArgumentParser:
    """The options of every example that trains, with their defaults."""
    parser = argparse.ArgumentParser(
        description=description.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default_device, help="where to train")
    parser.add_argument("--steps", type=int, default=steps, help="batches to train on")
    parser.add_argument("--seed", type=int, default=0, help="of the models and the batches")
    parser.add_argument("--output", type=Path, default=output, help="the picture")
    return parser


def parse_options() -> Options:
    parser = example_parser(__doc__, 300, Path(__file__).with_suffix(".png"))
    parser.add_argument("--distil-steps", type=int, default=50, help="batches to distil on")
    parser.add_argument("--vocab", type=int, default=50_304, help="distinct words to keep")
    parser.add_argument(
        "--fused-linear", action="store_true", help="train with linear_cross_entropy: no logits"
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
    trained = [comparison for comparison in comparisons if comparison.runs]
    plot(trained, sizes, options.output)
    console.print(f"picture: {options.output}", soft_wrap=True)
    return 0 if all(comparison.agrees for comparison in trained) else 1


def machine(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"


if __name__ == "__main__":
    sys.exit(main())
