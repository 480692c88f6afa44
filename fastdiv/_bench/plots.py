"""Measurements as pictures, for a page 800 pixels wide."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import linear_report
from .linear import LinearMemory
from .measurements import Measurements
from .report import machine_line
from .result import Result

WIDTH, DPI = 8.0, 150  # inches; drawn at 1200 pixels and shown at 800
STYLES = {
    "in_place": ("fastdiv, in place", "#0b5d2a"),
    "fused": ("fastdiv", "#3fa65a"),
    "compile": ("torch.compile", "#8e6bb5"),
    "eager": ("eager torch", "#a9a9a9"),
    "liger": ("Liger", "#2166ac"),
    "quack": ("quack", "#d6604d"),
}
LOSS_COLORS = ("#1b7837", "#2166ac", "#d6604d", "#8e6bb5", "#b8860b", "#555555")
SETTINGS: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}


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


def _figure(height: float) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    below = 0.16 / height  # for the line that says where this comes from
    layout = ConstrainedLayoutEngine(rect=(0, below, 1, 1 - below))
    return Figure(figsize=(WIDTH, height), layout=layout)


def _scan(results: Sequence[Result]) -> list[Result]:
    """The results, if they are of many numbers of classes and about as many elements."""
    sizes = {r.shape for r in results}
    elements = [rows * classes for rows, classes in sizes]
    return list(results) if len(sizes) > 2 and max(elements) < 2 * min(elements) else []


def _legend(figure: Any, axes: Sequence[Any]) -> None:
    """One for all panels, below them, of every label once."""
    found: dict[str, Any] = {}
    for panel in axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=len(found))


def _title(results: Sequence[Result]) -> str:
    return f"of {results[0].shape[0]}×{results[0].shape[1]} logits, forward + backward"


# --- bars ---------------------------------------------------------------------------------------


def _bars(results: Sequence[Result], heights: Mapping[str, Any], label: str, title: str) -> Any:
    """A panel for each dtype, a group of bars for each loss, a bar for each variant."""
    dtypes = list(dict.fromkeys(r.dtype for r in results))
    losses = list(dict.fromkeys(r.loss for r in results))
    figure = _figure(1.3 + 0.115 * (len(heights) + 1) * len(losses))
    panels = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
    for dtype, axes in zip(dtypes, panels, strict=True):
        by_loss = {r.loss: r for r in results if r.dtype == dtype}
        for i, (variant, height) in enumerate(heights.items()):
            bars = [
                (n, value)
                for n, loss in enumerate(losses)
                if loss in by_loss and (value := height(by_loss[loss])) is not None
            ]
            width = 1 / (len(heights) + 0.7)
            drawn = axes.barh(
                [n + (i - (len(heights) - 1) / 2) * width for n, _ in bars],
                [value for _, value in bars],
                height=0.92 * width,
                color=STYLES[variant][1],
                label=STYLES[variant][0],
            )
            axes.bar_label(drawn, labels=[_short(v) for _, v in bars], padding=2, fontsize=6)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.margins(y=0.01)
        axes.set_xlim(right=1.16 * axes.get_xlim()[1])
        axes.set(title=dtype, xlabel=label)
    panels[0].set_yticks(range(len(losses)), [loss.replace("_", " ") for loss in losses])
    panels[0].invert_yaxis()
    figure.suptitle(title, fontsize=11, fontweight="bold")
    _legend(figure, panels)
    return figure


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def plot_times(results: Sequence[Result]) -> Any:
    """Milliseconds beside eager torch and torch.compile."""

    def height(variant: str) -> Any:
        return lambda r: 1e3 * r.training[variant].median if variant in r.training else None

    shown = [v for v in STYLES if any(v in r.training for r in results)]
    heights = {variant: height(variant) for variant in shown}
    return _bars(results, heights, "ms", f"Time {_title(results)}")


def plot_memory(results: Sequence[Result]) -> Any:
    """Memory beside eager torch."""

    def height(variant: str) -> Any:
        return lambda r: None if (v := r.extra_bytes.get(variant)) is None else v / 1e6

    shown = [v for v in STYLES if any(r.extra_bytes.get(v) is not None for r in results)]
    heights = {variant: height(variant) for variant in shown}
    label = "MB beyond logits, target and gradient"
    return _bars(results, heights, label, f"Memory {_title(results)}")


# --- lines --------------------------------------------------------------------------------------


def _panels(height: float, rows: int, columns: int, **shared: bool) -> tuple[Any, Any]:
    figure = _figure(0.9 + height * rows)
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def _count(n: float, _: Any = None) -> str:
    return f"{n / 1024:.0f}K" if n >= 1024 else f"{n:.0f}"


def _binary(axes: Any, values: Sequence[int], label: str) -> None:
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    ticks = sorted(set(values))
    ticks = ticks[:: 1 + (len(ticks) - 1) // 6]
    axes.set_xticks(ticks, [_count(n) for n in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)


def plot_bandwidth(results: Sequence[Result]) -> Any:
    """GB/s of the least traffic over the number of classes: a row a dtype, a column a loss."""
    losses = list(dict.fromkeys(r.loss for r in results))[:4]
    dtypes = list(dict.fromkeys(r.dtype for r in results))
    figure, grid = _panels(1.75, len(dtypes), len(losses), sharey=True)
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
            axes.set_ylim(bottom=0)
            _binary(axes, x, "classes")
    figure.supylabel("GB/s of the least traffic", fontsize=9)
    figure.suptitle("Bandwidth of forward + backward", fontsize=11, fontweight="bold")
    _legend(figure, grid.flat)
    return figure


def plot_scale(by_classes: Sequence[Result], by_rows: Sequence[Result]) -> Any:
    """Nanoseconds for an element over classes and over rows: a row a dtype."""
    results = [*by_classes, *by_rows]
    dtypes = list(dict.fromkeys(r.dtype for r in results))
    losses = list(dict.fromkeys(r.loss for r in results))
    figure, grid = _panels(2.0, len(dtypes), 2, sharey=True)
    for dtype, row in zip(dtypes, grid, strict=True):
        for axes, scan, axis in zip(row, (by_classes, by_rows), (1, 0), strict=True):
            chosen = [r for r in scan if r.dtype == dtype]
            for loss, color in zip(losses, LOSS_COLORS * 3, strict=False):
                line = sorted((r.shape[axis], r.nanoseconds()) for r in chosen if r.loss == loss)
                label = loss.replace("_", " ")
                axes.plot(*zip(*line, strict=True), ".-", color=color, label=label)
            one = chosen[0]
            of = (
                f"rows of {one.shape[1]}"
                if axis == 0
                else f"classes, {one.elements >> 20} Mi logits"
            )
            _binary(axes, [r.shape[axis] for r in chosen], of)
            axes.set(title=dtype, yscale="log")
            axes.yaxis.set_major_formatter("{x:g}")
    figure.supylabel("ns for an element", fontsize=9)
    title = "Cost of an element, forward + backward"
    figure.suptitle(title, fontsize=11, fontweight="bold")
    _legend(figure, grid.flat)
    return figure


def plot_threads(results: Sequence[Result]) -> Any:
    """How many times faster with more threads: a panel a dtype, a line a loss."""
    dtypes = list(dict.fromkeys(r.dtype for r in results))
    losses = list(dict.fromkeys(r.loss for r in results))
    figure, grid = _panels(2.4, 1, len(dtypes), sharey=True)
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
        axes.set(title=dtype, ylim=(0, None))
        _binary(axes, counts, "threads")
    figure.supylabel("times as fast as one thread", fontsize=9)
    title = f"Threads: {results[0].size}, forward + backward"
    figure.suptitle(title, fontsize=11, fontweight="bold")
    _legend(figure, grid.flat)
    return figure


def plot_linear(points: Sequence[LinearMemory]) -> Any:
    """Memory of linear cross entropy over the number of rows, a panel for each dtype."""
    dtypes = list(dict.fromkeys(point.job.dtype for point in points))
    figure, grid = _panels(2.6, 1, len(dtypes), sharey=True)
    for dtype, axes in zip(dtypes, grid[0], strict=True):
        chosen = [point for point in points if point.job.dtype == dtype]
        for name, (label, color) in linear_report.STYLES.items():
            line = [(p.job.rows, v / 1e6) for p in chosen if (v := p.extra_bytes.get(name))]
            if line:
                axes.plot(*zip(*line, strict=True), ".-", color=color, label=label)
        logits = [(p.job.rows, p.job.logits_bytes / 1e6) for p in chosen]
        axes.plot(*zip(*logits, strict=True), ":", color="black", lw=1, label="the logits")
        axes.set(title=dtype, yscale="log")
        _binary(axes, [p.job.rows for p in chosen], "rows")
    job = points[0].job
    figure.supylabel("MB beyond arguments and gradients", fontsize=9)
    figure.suptitle(
        f"Memory of linear cross entropy: {job.hidden} features, {job.classes} classes",
        **{"fontsize": 11, "fontweight": "bold"},
    )
    _legend(figure, grid.flat)
    return figure
