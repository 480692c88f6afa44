"""Results as plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .report import machine_line
from .run import Result

STYLES = {
    "in_place": ("fastdiv, in place", "#1b7837"),
    "fused": ("fastdiv", "#7fbf7b"),
    "compile": ("torch.compile", "#9970ab"),
    "eager": ("eager torch", "#bdbdbd"),
    "liger": ("Liger", "#2166ac"),
    "quack": ("quack", "#d6604d"),
}
TITLES = {"forward": "forward", "backward": "backward", "training": "both"}


def plot_copies(results: Sequence[Result], machine: Mapping[str, Any], path: Path) -> None:
    """Draws the time of forward and backward in units of one copy, as one group of bars a loss."""
    from matplotlib.figure import Figure

    shown = [v for v in STYLES if any(v in result.training for result in results)]
    figure = Figure(figsize=(8, 1.2 + 0.2 * (len(shown) + 1) * len(results)), layout="constrained")
    axes = figure.add_subplot()
    for i, variant in enumerate(shown):
        having = [n for n, result in enumerate(results) if variant in result.training]
        bars = axes.barh(
            [n + (i - (len(shown) - 1) / 2) / (len(shown) + 1) for n in having],
            [results[n].copies(variant) for n in having],
            height=1 / (len(shown) + 1),
            color=STYLES[variant][1],
            label=STYLES[variant][0],
        )
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
    axes.set_xscale("log")
    axes.margins(x=0.12)
    labels = [f"{r.loss}\n{r.dtype} {r.shape[0]}×{r.shape[1]}" for r in results]
    axes.set_yticks(range(len(results)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("forward and backward, in units of one copy of the logits")
    axes.set_title(f"fastdiv {machine['fastdiv']} on {machine_line(machine)}", fontsize=8)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def plot_bandwidths(results: Sequence[Result], machine: Mapping[str, Any], path: Path) -> None:
    """Draws GB/s of the least traffic over the number of classes: a row a loss, a line each."""
    from matplotlib.figure import Figure

    losses = list(dict.fromkeys(r.loss for r in results))
    columns = [(d, p) for d in dict.fromkeys(r.dtype for r in results) for p in TITLES]
    size = (3.4 * len(columns), 0.6 + 2.6 * len(losses))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(losses), len(columns), squeeze=False, sharex=True, sharey=True)
    drawn: dict[str, Any] = {}
    for loss, row in zip(losses, grid, strict=True):
        for (dtype, phase), axes in zip(columns, row, strict=True):
            chosen = [r for r in results if (r.loss, r.dtype) == (loss, dtype)]
            for label, line in _lines(axes, chosen, phase):
                drawn.setdefault(label, line)
            axes.set_title(f"{loss}, {dtype}: {TITLES[phase]}", fontsize=8)
            axes.set_xscale("log", base=2)
            axes.grid(alpha=0.3)
    grid[0, 0].set_ylim(bottom=0)  # shared by all
    for axes in grid[-1]:
        axes.set_xlabel("classes", fontsize=8)
    figure.supylabel("GB/s of the least traffic", fontsize=8)
    title = f"fastdiv {machine['fastdiv']} on {machine_line(machine)}"
    figure.suptitle(title, fontsize=8)
    lines, labels = list(drawn.values()), list(drawn)
    figure.legend(lines, labels, loc="outside lower center", ncols=7, fontsize=8)
    figure.savefig(path, dpi=120)


def _lines(axes: Any, results: Sequence[Result], phase: str) -> list[tuple[str, Any]]:
    results = sorted(results, key=lambda r: r.shape[1])
    x = [r.shape[1] for r in results]
    lines = axes.plot(x, [r.copy_bandwidth for r in results], "k:", lw=1)
    drawn = [("a copy", lines[0])]
    for variant, (label, color) in STYLES.items():
        points = [
            (r.shape[1], r.bandwidth(variant, phase))
            for r in results
            if variant in r.times.get(phase, {})
        ]
        if points:
            lines = axes.plot(*zip(*points, strict=True), ".-", color=color, lw=1.2)
            drawn.append((label, lines[0]))
    return drawn
