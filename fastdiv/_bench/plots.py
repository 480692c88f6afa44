"""Measurements as pictures, for a page 800 pixels wide."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .losses import DTYPES
from .results import Measurements, Record, copy_gb_per_s, gb_per_s, nanoseconds, size_of
from .tables import LINEAR_NAMES, machine_line

WIDTH, DPI = 8.0, 150  # inches; drawn at 1200 pixels and shown at 800
STYLES = {
    "in_place": ("fastdiv, in place", "#0b5d2a"),
    "fused": ("fastdiv", "#3fa65a"),
    "compile": ("torch.compile", "#8e6bb5"),
    "eager": ("eager torch", "#a9a9a9"),
    "liger": ("Liger", "#2166ac"),
    "quack": ("quack", "#d6604d"),
}
LINEAR_COLORS = {
    "eager": "#bdbdbd",
    "compile": "#9970ab",
    "chunked": "#d6604d",
    "fused": "#1b7837",
    "per_row": "#7fbf7b",
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
    """Write a picture for each part that ran, and yield its file."""
    import matplotlib

    stem.parent.mkdir(parents=True, exist_ok=True)
    origin = f"fastdiv {found.machine['fastdiv']}, {machine_line(found.machine)}"
    with matplotlib.rc_context(SETTINGS):
        for name, figure in _pictures(found):
            figure.text(0.995, 0.0, origin, ha="right", va="bottom", fontsize=6, color="#777777")
            path = stem.with_name(f"{stem.name}-{name}.png")
            figure.savefig(path, dpi=DPI)
            yield path


class Curve(NamedTuple):
    """A line of a panel."""

    label: str
    color: str
    points: list[tuple[int, float]]
    style: str = ".-"


class Panel(NamedTuple):
    """Curves over a number of classes, rows or threads."""

    title: str
    below: str  # the label of the axis
    curves: list[Curve]


def _pictures(found: Measurements) -> Iterator[tuple[str, Any]]:
    first = [r for r in found.results if size_of(r) == size_of(found.results[0])]
    of = f"of {size_of(first[0])} logits, forward + backward" if first else ""
    if first:
        yield "times", _bars(first, _time, "ms", f"Time {of}")
    if any(count is not None for r in first for count in r["extra_bytes"].values()):
        beyond = "MB beyond logits, target and gradient"
        yield "memory", _bars(first, _extra_megabytes, beyond, f"Memory {of}")
    if scan := found.by_classes or _scan(found.results):
        panels = [
            [_bandwidth(scan, loss, d) for loss in _all("loss", scan)[:4]]
            for d in _all("dtype", scan)
        ]
        title = "Bandwidth of forward + backward"
        yield "bandwidth", _lines(panels, 1.75, title, "GB/s of the least traffic")
    if found.by_rows:
        scans = (found.by_classes, found.by_rows)
        panels = [
            [_cost(scan, d, axis) for scan, axis in zip(scans, ("classes", "rows"), strict=True)]
            for d in _all("dtype", found.by_rows)
        ]
        yield (
            "scale",
            _lines(panels, 2.0, "Cost of an element, forward + backward", "ns for an element"),
        )
    if found.threads:
        panels = [[_speed(found.threads, d) for d in _all("dtype", found.threads)]]
        title = f"Threads: {size_of(found.threads[0])}, forward + backward"
        yield (
            "threads",
            _lines(panels, 2.4, title, "times as fast as one thread", logarithmic=False),
        )
    if found.linear_memory:
        points = found.linear_memory
        panels = [[_linear_memory(points, d) for d in _all("dtype", points)]]
        size = "{hidden} features, {classes} classes".format(**points[0])
        title = f"Memory of linear cross entropy: {size}"
        yield "linear", _lines(panels, 2.6, title, "MB beyond arguments and gradients")


def _all(field: str, records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(r[field] for r in records))


def _chosen(records: Sequence[Record], **fields: str) -> list[Record]:
    return [r for r in records if all(r[name] == value for name, value in fields.items())]


def _scan(results: Sequence[Record]) -> list[Record]:
    """Return the results if they have many numbers of classes, and about as many elements each."""
    elements = {size_of(r): r["rows"] * r["classes"] for r in results}.values()
    return list(results) if len(elements) > 2 and max(elements) < 2 * min(elements) else []


# --- bars: a group for each loss ----------------------------------------------------------------


def _time(r: Record, variant: str) -> float | None:
    return r["training_ms"][variant].median if variant in r["training_ms"] else None


def _extra_megabytes(r: Record, variant: str) -> float | None:
    return None if (count := r["extra_bytes"].get(variant)) is None else count / 1e6


def _bars(
    results: Sequence[Record],
    length: Callable[[Record, str], float | None],
    below: str,
    title: str,
) -> Any:
    """Draw a panel for each dtype, a group of bars for each loss, a bar for each variant."""
    dtypes, losses = _all("dtype", results), _all("loss", results)
    variants = [v for v in STYLES if any(length(r, v) is not None for r in results)]
    figure = _figure(1.3 + 0.105 * (len(variants) + 1) * len(losses))
    panels = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
    width = 1 / (len(variants) + 0.7)
    for dtype, axes in zip(dtypes, panels, strict=True):
        for i, variant in enumerate(variants):
            lengths = {r["loss"]: length(r, variant) for r in _chosen(results, dtype=dtype)}
            bars = {loss: v for loss, v in lengths.items() if v is not None}
            label, color = STYLES[variant]
            places = [losses.index(loss) + (i - (len(variants) - 1) / 2) * width for loss in bars]
            drawn = axes.barh(places, bars.values(), 0.92 * width, color=color, label=label)
            short = [f"{v:.1f}" if v < 10 else f"{v:.0f}" for v in bars.values()]
            axes.bar_label(drawn, labels=short, padding=2, fontsize=6)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.margins(y=0.01)
        axes.set_xlim(right=1.16 * axes.get_xlim()[1])
        axes.set_title(dtype)
    panels[len(panels) // 2].set_xlabel(below)  # one for all: each would overlap the next
    panels[0].set_yticks(range(len(losses)), [_words(loss) for loss in losses])
    panels[0].invert_yaxis()
    return _finished(figure, title)


# --- lines --------------------------------------------------------------------------------------


def _bandwidth(results: Sequence[Record], loss: str, dtype: str) -> Panel:
    chosen = sorted(_chosen(results, loss=loss, dtype=dtype), key=lambda r: r["classes"])
    copy = [(r["classes"], copy_gb_per_s(r)) for r in chosen]
    curves = [Curve("a copy", "black", copy, ":")]
    for variant, style in STYLES.items():
        rates = [
            (r["classes"], gb_per_s(r, variant)) for r in chosen if variant in r["training_ms"]
        ]
        curves.append(Curve(*style, rates))
    return Panel(f"{_words(loss)}, {dtype}", "classes", curves)


def _cost(results: Sequence[Record], dtype: str, axis: str) -> Panel:
    first = results[0]
    of = f"{first['classes']} classes"
    if axis == "classes":
        of = f"{_count(first['rows'] * first['classes'])} logits"
    curves = []
    for loss, color in zip(_all("loss", results), LOSS_COLORS * 3, strict=False):
        chosen = _chosen(results, loss=loss, dtype=dtype)
        costs = sorted((r[axis], nanoseconds(r)) for r in chosen)
        curves.append(Curve(_words(loss), color, costs))
    return Panel(dtype, f"{axis} of {of}", curves)


def _speed(results: Sequence[Record], dtype: str) -> Panel:
    chosen = _chosen(results, dtype=dtype)

    def curve(label: str, color: str, times: dict[int, float], style: str = ".-") -> Curve:
        work = min(times) * times[min(times)]
        return Curve(label, color, [(n, work / times[n]) for n in sorted(times)], style)

    curves = [curve("linear", "black", {r["threads"]: 1 / r["threads"] for r in chosen}, ":")]
    for loss, color in zip(_all("loss", results), LOSS_COLORS * 3, strict=False):
        of_loss = _chosen(chosen, loss=loss)
        times = {r["threads"]: r["training_ms"]["fused"].median for r in of_loss}
        curves.append(curve(_words(loss), color, times))
    copy = {r["threads"]: r["copy_ms"].median for r in chosen}
    return Panel(dtype, "threads", [*curves, curve("a copy", "#a9a9a9", copy, ".--")])


def _linear_memory(records: Sequence[Record], dtype: str) -> Panel:
    chosen = _chosen(records, dtype=dtype)
    curves = []
    for variant, color in LINEAR_COLORS.items():
        megabytes = ((r["rows"], _extra_megabytes(r, variant)) for r in chosen)
        curves.append(Curve(LINEAR_NAMES[variant], color, [(n, v) for n, v in megabytes if v]))
    size = 1e-6 * DTYPES[dtype].itemsize * chosen[0]["classes"]
    logits = [(r["rows"], r["rows"] * size) for r in chosen]
    return Panel(dtype, "rows", [*curves, Curve("the logits", "black", logits, ":")])


def _lines(
    panels: list[list[Panel]], height: float, title: str, side: str, logarithmic: bool = True
) -> Any:
    from matplotlib.ticker import LogLocator, NullLocator

    figure = _figure(0.9 + height * len(panels))
    grid = figure.subplots(len(panels), len(panels[0]), squeeze=False, sharey=True)
    for panel, axes in zip((p for row in panels for p in row), grid.flat, strict=True):
        for label, color, points, style in panel.curves:
            if points:
                width = 1 if style == ":" else None
                axes.plot(*zip(*points, strict=True), style, color=color, label=label, lw=width)
        axes.set(title=panel.title, xlabel=panel.below)
        axes.set_xscale("log", base=2)
        ticks = sorted({n for curve in panel.curves for n, _ in curve.points})
        ticks = ticks[:: 1 + (len(ticks) - 1) // 6]
        axes.set_xticks(ticks, [_count(n) for n in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter("{x:g}")
    if not logarithmic:
        grid[0, 0].set_ylim(bottom=0)  # of all panels
    figure.supylabel(side, fontsize=9)
    return _finished(figure, title)


# --- both ---------------------------------------------------------------------------------------


def _figure(height: float) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    below = 0.16 / height  # for the line that names the machine
    layout = ConstrainedLayoutEngine(rect=(0, below, 1, 1 - below))
    return Figure(figsize=(WIDTH, height), layout=layout)


def _finished(figure: Any, title: str) -> Any:
    """Add the title, and one legend for all panels."""
    figure.suptitle(title, fontsize=11, fontweight="bold")
    found: dict[str, Any] = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    columns = min(6, len(found))
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns)
    return figure


def _words(loss: str) -> str:
    return loss.replace("_", " ")


def _count(n: int) -> str:
    """Write a number in binary thousands."""
    for unit, text in ((1 << 20, "M"), (1 << 10, "K")):
        if n >= unit:
            return f"{n / unit:.3g}{text}"
    return str(n)
