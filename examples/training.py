"""The parts that all examples with a training share: model, steps, command line, and the end."""

import argparse
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from report import Run


class LanguageModel(nn.Module):
    """An embedding, a GRU, and a head that shares the embedding's weight."""

    def __init__(self, vocabulary: int, width: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(vocabulary, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        nn.init.zeros_(self.head.bias)
        self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        """Map words `[rows, length]` to the next words' logits `[rows * length, vocabulary]`."""
        return self.head(self.hidden(words))

    def hidden(self, words: Tensor) -> Tensor:
        """Return the input of the head, `[rows * length, width]`."""
        hidden, _ = self.gru(self.embedding(words))
        return hidden.flatten(0, 1)


def fit(
    models: Mapping[str, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    batch_loss: Callable[[str, Tensor, Tensor], Tensor],
    on_step: Callable[[str, Run], None],
    learning_rate: float = 1e-2,
) -> dict[str, Run]:
    """Take a step of Adam with every model for each batch.

    The models take turns, so that a machine that slows down slows all of them.
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


def parse(script: str, description: str, **own: tuple[int, str] | str) -> argparse.Namespace:
    """Read the command line of a script, with its own options besides those of all examples.

    An option is a positive number, given by its default and help, or a switch, given by its help.
    """
    parser = argparse.ArgumentParser(
        description=description.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default_device, help="where to train")
    parser.add_argument("--seed", type=int, default=0, help="of the models and the batches")
    picture = Path(script).with_suffix(".png")
    parser.add_argument("--output", type=Path, default=picture, help="the picture")
    for name, option in own.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(option, str):
            parser.add_argument(flag, action="store_true", help=option)
        else:
            default, text = option
            parser.add_argument(flag, type=positive, default=default, help=text)
    return parser.parse_args()


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def sizes(tokens: int, classes: int, device: str, what: str = "words") -> str:
    """Describe the logits of a step and the machine in one line."""
    machine = f"{torch.get_num_threads()} CPU threads"
    if torch.device(device).type == "cuda":
        machine = torch.cuda.get_device_name(device)
    megabytes = tokens * classes * 4 / 1e6
    return (
        f"{tokens} tokens × {classes:,} {what}: {megabytes:.0f} MB of float32 logits per step, "
        f"{machine}"
    )
