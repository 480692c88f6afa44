"""Trains a speech recogniser's attention decoder with WeNet's loss in plain torch and in fastdiv.

    python examples/asr_label_smoothing.py

Batches have the shape of WeNet's: 16 utterances of some 13 characters out of 4233, padded. Nothing
is downloaded: a character sounds like a fixed spectrum under noise, held for a few frames.

The loss is the KL divergence of the prediction from the smoothed label. `PlainLoss` computes it as
WeNet and ESPnet do: it writes out the true distribution of every character, takes `KLDivLoss`, and
copies the number of characters to the host. `fastdiv.nn.LabelSmoothingLoss` is a drop-in
replacement. Model, batches and curve are the same; time and memory differ. If the curves differ by
more than float32 noise, the script exits with 1.
"""

import argparse
import sys
from collections.abc import Iterator
from functools import partial

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fastdiv.nn import LabelSmoothingLoss
from measure import Loss, measure
from report import Comparison, bar, finish, progress_bars
from training import fit, parse, sizes

ROWS, CHARACTERS, PADDING, SMOOTHING = 16, 4233, -1, 0.1
START = 0  # a character that is never spoken
LENGTHS = range(8, 14)  # characters of an utterance
BANDS, NOISE = 80, 0.3  # of a frame's spectrum
HELD = range(2, 6)  # frames of a character
WIDTH, LAYERS, LEARNING_RATE = 128, 2, 3e-4


class PlainLoss(nn.Module):
    """The formula in torch: KL(true ‖ softmax(x)), summed, divided by the number of characters."""

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x, target = x.flatten(0, 1), target.flatten()
        padding = target == PADDING
        true = torch.full_like(x, SMOOTHING / (CHARACTERS - 1))
        true.scatter_(1, target.masked_fill(padding, 0).unsqueeze(1), 1 - SMOOTHING)
        kl = nn.functional.kl_div(x.log_softmax(1), true, reduction="none")
        characters = len(target) - padding.sum().item()
        return kl.masked_fill(padding.unsqueeze(1), 0).sum() / characters


fused = partial(LabelSmoothingLoss, CHARACTERS, PADDING, SMOOTHING, normalize_length=True)
LOSSES: dict[str, Loss] = {
    "torch": PlainLoss(),
    "fastdiv": fused(),
    "fastdiv in place": fused(inplace_backward=True),
}
COMPARED = ("torch", "fastdiv in place")  # the losses that decoders are trained with


def utterances(steps: int, options: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pairs (frames `[rows, frames, bands]`, characters `[rows, length]`), both padded."""
    generator = torch.Generator().manual_seed(options.seed)
    integers = partial(torch.randint, generator=generator)
    spectra = torch.randn(CHARACTERS, BANDS, generator=generator)
    # The n-th character is n times rarer than the first, as in a language.
    frequency = 1 / torch.arange(1, CHARACTERS)
    for _ in range(steps):
        texts, sounds = [], []
        for length in integers(LENGTHS.start, LENGTHS.stop, (ROWS,)).tolist():
            text = 1 + frequency.multinomial(length, replacement=True, generator=generator)
            held = integers(HELD.start, HELD.stop, (length,))
            clean = spectra[text.repeat_interleave(held)]
            sounds.append(clean + NOISE * torch.randn(clean.shape, generator=generator))
            texts.append(text)
        yield (
            pad_sequence(sounds, batch_first=True).to(options.device),
            pad_sequence(texts, batch_first=True, padding_value=PADDING).to(options.device),
        )


class Recogniser(nn.Module):
    """A convolution over the frames, and a decoder that attends to it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv1d(BANDS, WIDTH, 5, padding=2)
        self.embedding = nn.Embedding(CHARACTERS, WIDTH)
        layer = nn.TransformerDecoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, LAYERS)
        self.head = nn.Linear(WIDTH, CHARACTERS)

    def forward(self, frames: Tensor, text: Tensor) -> Tensor:
        """Map frames and characters to every character's logits `[rows, length, classes]`."""
        sound = self.encoder(frames.mT).mT
        silent = (frames == 0).all(-1)
        before = torch.cat([torch.full_like(text[:, :1], START), text[:, :-1].clamp(min=0)], 1)
        length = text.shape[1]
        future = torch.ones(length, length, dtype=torch.bool, device=text.device).triu(1)
        hidden = self.decoder(
            self.embedding(before) + positions(length, text.device),
            sound + positions(sound.shape[1], text.device),
            tgt_mask=future,
            memory_key_padding_mask=silent,
        )
        return self.head(hidden)


def positions(length: int, device: torch.device) -> Tensor:
    """Return sines and cosines of the position in a sequence, `[length, width]`."""
    rate = 1e-4 ** torch.linspace(0, 1, WIDTH // 2, device=device)
    angle = torch.arange(length, device=device).unsqueeze(1) * rate
    return torch.cat([angle.sin(), angle.cos()], 1)


def compare(options: argparse.Namespace, console: Console) -> Comparison:
    models = {}
    for name in COMPARED:
        torch.manual_seed(options.seed)
        models[name] = Recogniser().to(options.device)

    def batch_loss(name: str, frames: Tensor, text: Tensor) -> Tensor:
        return LOSSES[name](models[name](frames, text), text)

    batches = utterances(options.steps, options)
    with progress_bars(console) as bars:
        on_step = bar(bars, "train", COMPARED, options.steps)
        runs = fit(models, batches, batch_loss, on_step, LEARNING_RATE)
    frames, text = next(utterances(1, options))
    with torch.no_grad():
        logits = models["torch"](frames, text)
    with console.status("measuring the losses alone"):
        return Comparison("label smoothing", runs, *measure(LOSSES, logits, target=text))


def main() -> int:
    """Return 0 if fastdiv's curve and torch's agree, else 1."""
    options = parse(__file__, __doc__, steps=(100, "batches to train on"))
    console = Console()
    lengths = f"{ROWS} utterances × {LENGTHS[0]} to {LENGTHS[-1]}, at most "
    title = lengths + sizes(ROWS * LENGTHS[-1], CHARACTERS, options.device, "characters")
    console.print(title, soft_wrap=True)
    return finish([compare(options, console)], title, options.output, console)


if __name__ == "__main__":
    sys.exit(main())
