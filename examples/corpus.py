"""A large-vocabulary corpus that needs no download: the text every Python installation carries."""

import pydoc
import re
import sysconfig
from array import array
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

WORD = re.compile(r"\w+|[^\w\s]|\n *")  # a word or number, a punctuation mark, an indentation
UNKNOWN = 0  # the id of all words outside the vocabulary


@dataclass(frozen=True)
class Corpus:
    """Text as a stream of word ids."""

    tokens: Tensor  #: int64 `[tokens]`, each in `[0, len(words))`
    words: list[str]  #: by falling frequency, after `<unk>`
    types: int  #: number of distinct words in the text
    sources: list[str]  #: the names of what was read

    @property
    def coverage(self) -> float:
        """The share of the text that the vocabulary covers."""
        return (self.tokens != UNKNOWN).float().mean().item()

    def batches(
        self, steps: int, rows: int, length: int, seed: int, device: str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pairs (words, next words) of shape `[rows, length]`; same seed, same pairs."""
        generator = torch.Generator().manual_seed(seed)
        window = torch.arange(length + 1)
        for _ in range(steps):
            start = torch.randint(len(self.tokens) - length, (rows, 1), generator=generator)
            text = self.tokens[start + window].to(device)
            yield text[:, :-1], text[:, 1:]


def read_corpus(vocabulary: int) -> Corpus:
    """Read Python's own text and keep its `vocabulary - 1` most frequent words and `<unk>`.

    The manual and the standard library come first. If they have too few distinct words (as in a
    Python packaged without its tests), the sources of torch and of other packages follow.

    Raises:
        ValueError: if all of that together has fewer than `vocabulary` distinct words.
    """
    number: defaultdict[str, int] = defaultdict(lambda: len(number))  # word -> order of appearance
    stream = array("q")
    sources: list[str] = []
    for name, texts in _sources():
        if len(number) >= vocabulary:
            break
        for text in texts:
            stream.extend(map(number.__getitem__, WORD.findall(text)))
        sources.append(name)
    if len(number) < vocabulary:
        raise ValueError(
            f"vocabulary={vocabulary:,} is more than the {len(number):,} distinct words of "
            + ", ".join(sources)
        )

    appeared = torch.frombuffer(stream, dtype=torch.int64)
    frequent = torch.bincount(appeared).argsort(descending=True, stable=True)[: vocabulary - 1]
    rank = torch.full((len(number),), UNKNOWN)
    rank[frequent] = torch.arange(1, vocabulary)
    spelling = list(number)
    words = ["<unk>", *(spelling[i] for i in frequent.tolist())]
    return Corpus(rank[appeared], words, len(number), sources)


def print_corpus(corpus: Corpus, console: Console) -> None:
    """Print the sources and how much the vocabulary covers."""
    console.print(
        f"{' and '.join(corpus.sources)}: {len(corpus.tokens):,} words, {corpus.types:,} distinct; "
        f"the {len(corpus.words):,} kept cover {corpus.coverage:.1%}",
        soft_wrap=True,
    )


def _sources() -> Iterator[tuple[str, Iterator[str]]]:
    """Yield (name, texts), always in the same order."""
    topics = _manual()
    yield "the Python manual", (topics[key] for key in sorted(topics))
    yield "the standard library", _python_files(Path(sysconfig.get_path("stdlib")))
    installed = Path(torch.__file__).parent
    yield "torch", _python_files(installed)
    for package in sorted(installed.parent.iterdir()):
        if (package / "__init__.py").exists() and package != installed:
            yield package.name, _python_files(package)


def _manual() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it separately
        return {"pydoc": pydoc.__doc__ or ""}
    return topics


def _python_files(folder: Path) -> Iterator[str]:
    skipped = {"site-packages", "dist-packages", "pydoc_data"}
    for path in sorted(folder.rglob("*.py")):
        if skipped.isdisjoint(path.relative_to(folder).parts) and path.is_file():
            yield path.read_text(encoding="utf-8", errors="replace")
