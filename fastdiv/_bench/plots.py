"""Measurements as pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .bars import plot_memory, plot_times
from .canvas import DPI, SETTINGS
from .lines import plot_bandwidth, plot_linear, plot_scale, plot_threads
from .measurements import Measurements
from .report import machine_line
from .result import Result


def draw(found: Measurements, stem: Path) -> Iterator[Path]:
    """Writes a picture for everything that was measured, and says where."""
    import matplotlib

    stem.parent.mkdir(parents=True, exist_ok=True)
    origin = f"fastdiv {found.machine['fastdiv']}, {machine_line(found.machine)}"
    with matplotlib.rc_context(SETTINGS):
        for name, figure in _pictures(found):
            figure.text(0.995, 0.0, origin, ha="right", va="bottom", fontsize=6, color="#777777")
            path = stem.with_name(f"{stem.name}-{name}.png")
            figure.savefig(path, dpi=DPI)
            yield path


def _pictures(found: Measurements) -> Iterator[tuple[str, Any]]:
    # Of the shape that comes first: the one that most people have.
    first = [r for r in found.results if r.shape == found.results[0].shape]
    if first:
        yield "times", plot_times(first)
    if any(v is not None for r in first for v in r.extra_bytes.values()):
        yield "memory", plot_memory(first)
    if scan := found.by_classes or _scan(found.results):
        yield "bandwidth", plot_bandwidth(scan)
    if found.by_rows:
        yield "scale", plot_scale(found.by_classes, found.by_rows)
    if found.threads:
        yield "threads", plot_threads(found.threads)
    if found.linear_memory:
        yield "linear", plot_linear(found.linear_memory)


def _scan(results: Sequence[Result]) -> list[Result]:
    """The results, if they are of many numbers of classes and about as many elements."""
    sizes = {r.shape for r in results}
    elements = [rows * classes for rows, classes in sizes]
    return list(results) if len(sizes) > 2 and max(elements) < 2 * min(elements) else []
