"""What all pictures have in common: they are made for a page 800 pixels wide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


def figure(height: float) -> Any:
    """An empty picture as wide as a page."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    below = 0.16 / height  # for the line that says where this comes from
    layout = ConstrainedLayoutEngine(rect=(0, below, 1, 1 - below))
    return Figure(figsize=(WIDTH, height), layout=layout)


def legend(figure: Any, axes: Sequence[Any]) -> None:
    """One for all panels, below them, of every label once."""
    found: dict[str, Any] = {}
    for panel in axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(
        found.values(), found.keys(), loc="outside lower center", ncols=min(6, len(found))
    )


def panels(height: float, rows: int, columns: int, **shared: bool) -> tuple[Any, Any]:
    """A picture of so many panels."""
    picture = figure(0.9 + height * rows)
    return picture, picture.subplots(rows, columns, squeeze=False, **shared)


def count(n: int) -> str:
    """A number in binary thousands."""
    for unit, text in ((1 << 20, "M"), (1 << 10, "K")):
        if n >= unit:
            return f"{n / unit:.3g}{text}"
    return str(n)


def decimal(axes: Any) -> None:
    """A logarithmic axis at the side."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")


def binary(axes: Any, values: Sequence[int], label: str) -> None:
    """An axis below, in powers of two."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    ticks = sorted(set(values))
    ticks = ticks[:: 1 + (len(ticks) - 1) // 6]
    axes.set_xticks(ticks, [count(n) for n in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)
