"""Pictures over a number of classes, rows or threads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import linear_report
from .canvas import LOSS_COLORS, STYLES, binary, count, decimal, legend, panels
from .linear import LinearMemory
from .result import Result


def plot_bandwidth(results: Sequence[Result]) -> Any:
    """GB/s of the least traffic over the number of classes: a row a dtype, a column a loss."""
    losses = list(dict.fromkeys(r.loss for r in results))[:4]
    dtypes = list(dict.fromkeys(r.dtype for r in results))
    figure, grid = panels(1.75, len(dtypes), len(losses), sharey=True)
    for dtype, row in zip(dtypes, grid, strict=True):
        for loss, axes in zip(losses, row, strict=True):
            chosen = [r for r in results if (r.loss, r.dtype) == (loss, dtype)]
            chosen.sort(key=lambda r: r.shape[1])
            x = [r.shape[1] for r in chosen]
            copy = [r.copy_bandwidth for r in chosen]
            axes.plot(x, copy, ":", color="black", lw=1, label="a copy")
            for variant, (label, color) in STYLES.items():
                points = [r for r in chosen if variant in r.training]
                y = [r.bandwidth(variant) for r in points]
                if y:
                    axes.plot([r.shape[1] for r in points], y, ".-", color=color, label=label)
            axes.set_title(f"{loss.replace('_', ' ')}, {dtype}")
            binary(axes, x, "classes")
            decimal(axes)
    figure.supylabel("GB/s of the least traffic", fontsize=9)
    figure.suptitle("Bandwidth of forward + backward", fontsize=11, fontweight="bold")
    legend(figure, grid.flat)
    return figure


def plot_scale(by_classes: Sequence[Result], by_rows: Sequence[Result]) -> Any:
    """Nanoseconds for an element over classes and over rows: a row a dtype."""
    results = [*by_classes, *by_rows]
    dtypes = list(dict.fromkeys(r.dtype for r in results))
    losses = list(dict.fromkeys(r.loss for r in results))
    figure, grid = panels(2.0, len(dtypes), 2, sharey=True)
    for dtype, row in zip(dtypes, grid, strict=True):
        for axes, scan, axis in zip(row, (by_classes, by_rows), (1, 0), strict=True):
            chosen = [r for r in scan if r.dtype == dtype]
            for loss, color in zip(losses, LOSS_COLORS * 3, strict=False):
                line = sorted((r.shape[axis], r.nanoseconds()) for r in chosen if r.loss == loss)
                label = loss.replace("_", " ")
                axes.plot(*zip(*line, strict=True), ".-", color=color, label=label)
            rows, classes = chosen[0].shape
            of = (
                f"classes of {count(rows * classes)} logits"
                if axis
                else f"rows of {classes} classes"
            )
            binary(axes, [r.shape[axis] for r in chosen], of)
            axes.set_title(dtype)
            decimal(axes)
    figure.supylabel("ns for an element", fontsize=9)
    title = "Cost of an element, forward + backward"
    figure.suptitle(title, fontsize=11, fontweight="bold")
    legend(figure, grid.flat)
    return figure


def plot_threads(results: Sequence[Result]) -> Any:
    """How many times faster with more threads: a panel a dtype, a line a loss."""
    dtypes = list(dict.fromkeys(r.dtype for r in results))
    losses = list(dict.fromkeys(r.loss for r in results))
    figure, grid = panels(2.4, 1, len(dtypes), sharey=True)
    for dtype, axes in zip(dtypes, grid[0], strict=True):
        chosen = sorted((r for r in results if r.dtype == dtype), key=lambda r: r.threads)
        counts = sorted({r.threads for r in chosen})
        axes.plot(counts, counts, ":", color="black", lw=1, label="linear")
        for name, color, style in [
            *((loss, color, ".-") for loss, color in zip(losses, LOSS_COLORS * 3, strict=False)),
            ("a copy", "#a9a9a9", ".--"),
        ]:
            line = [r for r in chosen if name in (r.loss, "a copy")]
            times = {
                r.threads: r.copy.median if name == "a copy" else r.training["fused"].median
                for r in line
            }
            first = counts[0] * times[counts[0]]
            label = name.replace("_", " ")
            axes.plot(counts, [first / times[n] for n in counts], style, color=color, label=label)
        axes.set_title(dtype)
        binary(axes, counts, "threads")
    grid[0, 0].set_ylim(bottom=0)  # of all
    figure.supylabel("times as fast as one thread", fontsize=9)
    title = f"Threads: {results[0].size}, forward + backward"
    figure.suptitle(title, fontsize=11, fontweight="bold")
    legend(figure, grid.flat)
    return figure


def plot_linear(points: Sequence[LinearMemory]) -> Any:
    """Memory of linear cross entropy over the number of rows, a panel for each dtype."""
    dtypes = list(dict.fromkeys(point.job.dtype for point in points))
    figure, grid = panels(2.6, 1, len(dtypes), sharey=True)
    for dtype, axes in zip(dtypes, grid[0], strict=True):
        chosen = [point for point in points if point.job.dtype == dtype]
        for name, (label, color) in linear_report.STYLES.items():
            line = [(p.job.rows, v / 1e6) for p in chosen if (v := p.extra_bytes.get(name))]
            if line:
                axes.plot(*zip(*line, strict=True), ".-", color=color, label=label)
        logits = [(p.job.rows, p.job.logits_bytes / 1e6) for p in chosen]
        axes.plot(*zip(*logits, strict=True), ":", color="black", lw=1, label="the logits")
        axes.set_title(dtype)
        decimal(axes)
        binary(axes, [p.job.rows for p in chosen], "rows")
    job = points[0].job
    figure.supylabel("MB beyond arguments and gradients", fontsize=9)
    figure.suptitle(
        f"Memory of linear cross entropy: {job.hidden} features, {job.classes} classes",
        **{"fontsize": 11, "fontweight": "bold"},
    )
    legend(figure, grid.flat)
    return figure
