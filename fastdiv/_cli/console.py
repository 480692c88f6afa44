"""Tables and a progress bar on the terminal: rich's where it is installed, else plain text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple


class Cell(NamedTuple):
    """Text of a table, with a colour where the terminal has one."""

    text: str
    style: str = ""


Row = Sequence["str | Cell"]
Advance = Callable[[str], None]  # one step is done, and this is what comes next


def has_rich() -> bool:
    """Whether rich is installed; it is an extra (``pip install fastdiv[bench]``)."""
    try:
        import rich  # noqa: F401
    except ImportError:
        return False
    return True


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Row], *, names: int = 1, caption: str = ""
) -> None:
    """Prints a table whose first ``names`` columns are names, and the others numbers."""
    cells = [[c if isinstance(c, Cell) else Cell(c) for c in row] for row in rows]
    widths = [
        max(map(len, [*header.split("\n"), *(row[i].text for row in cells)]))
        for i, header in enumerate(columns)
    ]
    if has_rich():
        _print_rich(title, columns, cells, names, caption, sum(widths) + 3 * len(widths) + 1)
    else:
        print("\n".join(_plain_lines(title, columns, cells, names, caption, widths)))


def _print_rich(
    title: str,
    columns: Sequence[str],
    cells: list[list[Cell]],
    names: int,
    caption: str,
    width: int,
) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    # Where the terminal is too narrow it may break lines, but no figure gets lost.
    console = Console(highlight=False, width=max(width, console.width))
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for i, header in enumerate(columns):
        table.add_column(
            header, justify="left" if i < names else "right", vertical="bottom", no_wrap=True
        )
    for row in cells:
        table.add_row(*(Text(cell.text, style=cell.style) for cell in row))
    console.print(title, markup=False, style="bold", soft_wrap=True)
    console.print(table)
    if caption:
        console.print(caption, markup=False, soft_wrap=True)


def _plain_lines(
    title: str,
    columns: Sequence[str],
    cells: list[list[Cell]],
    names: int,
    caption: str,
    widths: list[int],
) -> Iterator[str]:
    def line(texts: Sequence[str]) -> str:
        aligned = (
            text.ljust(width) if i < names else text.rjust(width)
            for i, (text, width) in enumerate(zip(texts, widths, strict=True))
        )
        return "  ".join(aligned).rstrip()

    headers = [header.split("\n") for header in columns]
    height = max(map(len, headers))
    headers = [[""] * (height - len(header)) + header for header in headers]
    yield title
    yield from (line(level) for level in zip(*headers, strict=True))
    yield line(["-" * width for width in widths])
    yield from (line([cell.text for cell in row]) for row in cells)
    if caption:
        yield caption


@contextmanager
def progress(title: str, total: int) -> Iterator[Advance]:
    """A bar on stderr that counts to ``total``; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda following: None
    elif has_rich():
        yield from _rich_progress(title, total)
    else:
        yield from _plain_progress(title, total)


def _rich_progress(title: str, total: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    described = TextColumn("{task.description}", markup=False)
    columns = (described, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda following: bar.update(task, advance=1, description=f"{title}: {following}")


def _plain_progress(title: str, total: int) -> Iterator[Advance]:
    done = 0

    def advance(following: str) -> None:
        nonlocal done
        done += 1
        filled = 30 * done // total
        bar = "#" * filled + "." * (30 - filled)
        print(f"\r\033[K{title} [{bar}] {done}/{total} {following}", end="", file=sys.stderr)
        sys.stderr.flush()

    yield advance
    print("\r\033[K", end="", file=sys.stderr)
