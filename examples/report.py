"""Progress bars, the table and the picture of the examples."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column, Table
from torch import Tensor

# The largest difference, in nats, of two curves that differ only in rounding. One float32 rounding
# of a loss is 5e-7; each step passes its own on to the weights, so they may add up.
NOISE_50_STEPS = 1e-4
NOISE = 1e-3


@dataclass(frozen=True)
class Run:
    """The loss and the seconds of every step of a training."""

    losses: list[float]
    seconds: list[float]


@dataclass(frozen=True)
class Comparison:
    """One task done with fastdiv and with torch."""

    task: str
    runs: dict[str, Run]  #: a training with torch, then one with fastdiv; or none
    seconds: dict[str, float]  #: of each loss alone, forward and backward
    memory: dict[str, float | None]  #: the bytes of each at its peak beyond the logits

    @property
    def differences(self) -> Tensor:
        """The difference of the two curves at every step, in nats."""
        original, fused = (torch.tensor(run.losses) for run in self.runs.values())
        return (fused - original).abs()

    @property
    def agrees(self) -> bool:
        """True if all differences are float32 noise; a NaN is not."""
        early, overall = self.differences[:50].max(), self.differences.max()
        return bool(early <= NOISE_50_STEPS and overall <= NOISE)


def progress_bars(console: Console) -> Progress:
    """Return a display for `bar`, to be used as a context manager."""
    return Progress(
        TextColumn("{task.description:<25}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]:7.3f} nats {task.fields[speed]:5.1f} steps/s"),
        console=console,
    )


def bar(bars: Progress, task: str, names: Iterable[str], steps: int) -> Callable[[str, Run], None]:
    """Add a bar for each name; return a function to call with a name and its run every step."""
    ids = {
        name: bars.add_task(f"{task}, {name}", total=steps, loss=math.nan, speed=math.nan)
        for name in names
    }

    def on_step(name: str, run: Run) -> None:
        speed = len(run.seconds) / sum(run.seconds)
        bars.update(ids[name], advance=1, loss=run.losses[-1], speed=speed)

    return on_step


def finish(
    trained: list[Comparison],
    title: str,
    picture: Path,
    console: Console,
    others: Iterable[Comparison] = (),
) -> int:
    """Print the tables, draw the picture, and return 0 if the curves of all trainings agree."""
    report([*trained, *others], console)
    plot(trained, title, picture)
    console.print(f"picture: {picture}", soft_wrap=True)
    return 0 if all(comparison.agrees for comparison in trained) else 1


HEADINGS = ("start\nnats", "end\nnats", "total\ns", "step\ns", "alone\nms", "speed-up", "peak\nMB")


def report(comparisons: list[Comparison], console: Console) -> None:
    """Print a table of each comparison, and whether its curves agree."""
    for comparison in comparisons:
        name_column = Column(f"\n{comparison.task}", min_width=24)
        columns = (Column(heading, justify="right", min_width=6) for heading in HEADINGS)
        table = Table(name_column, *columns, box=box.SIMPLE_HEAD, padding=0)
        for name, seconds in comparison.seconds.items():
            run, memory = comparison.runs.get(name), comparison.memory[name]
            table.add_row(
                name,
                *(_summary(run) if run else [""] * 4),
                f"{seconds * 1e3:.1f}",
                f"{comparison.seconds['torch'] / seconds:.1f}×",
                "?" if memory is None else f"{memory / 1e6:.0f}",
            )
        console.print(table)
    console.print(
        "start: first batch; end: mean of the last 20; step: median. alone: the loss without the"
        " model, forward and backward, median; peak: its memory beyond its arguments\n",
        soft_wrap=True,
    )
    for comparison in comparisons:
        if not comparison.runs:
            continue
        difference = comparison.differences
        console.print(
            "[green]same curve[/]" if comparison.agrees else "[bold red]NOT the same curve[/]",
            f"({comparison.task}): at most {difference[:50].max():.1e} nats apart in the first 50"
            f" steps (allowed {NOISE_50_STEPS:.0e}), {difference.max():.1e} in all"
            f" {len(difference)} (allowed {NOISE:.0e})",
            highlight=False,
            soft_wrap=True,
        )


def _summary(run: Run) -> list[str]:
    return [
        f"{run.losses[0]:.3f}",
        f"{fmean(run.losses[-20:]):.3f}",
        f"{sum(run.seconds):.1f}",
        f"{median(run.seconds):.3f}",
    ]


COLORS = ("#f2a65a", "#12406e")  # torch, fastdiv
SMOOTH = 10  # steps


def plot(comparisons: list[Comparison], title: str, path: Path) -> None:
    """Draw for each task the curves over steps, their difference, and the curves over time."""
    figure = Figure(figsize=(11, 8), dpi=120, layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(3, len(comparisons), height_ratios=[3, 1.5, 2], squeeze=False)
    for comparison, (curves, apart, clock) in zip(comparisons, axes.T, strict=True):
        curves.set_title(comparison.task)
        curves.sharex(apart)
        curves.tick_params(labelbottom=False)
        _draw_curves(curves, comparison)
        _draw_differences(apart, comparison)
        _draw_clock(clock, comparison)
        for axis in (curves, apart, clock):
            axis.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_curves(axes: Axes, comparison: Comparison) -> None:
    """Draw fastdiv's curve thin over torch's thick one, so that both are visible."""
    for (name, run), color, width in zip(comparison.runs.items(), COLORS, (5, 1), strict=True):
        steps = range(1, len(run.losses) + 1)
        axes.plot(steps, run.losses, color=color, linewidth=width, label=name)
    axes.set_ylabel("loss (nats/token)")
    axes.legend()


def _draw_differences(axes: Axes, comparison: Comparison) -> None:
    difference = comparison.differences.numpy()
    steps = np.arange(1, len(difference) + 1)
    equal = difference == 0  # which a logarithmic scale cannot show
    difference[equal] = np.nan
    label = f"apart ({equal.sum()} of {len(steps)} steps are equal)"
    axes.semilogy(steps, difference, ".", color=COLORS[1], markersize=4, label=label)
    losses = np.array(comparison.runs["torch"].losses, dtype=np.float32)
    axes.plot(steps, np.spacing(losses), color="grey", linewidth=1, label="a float32 rounding")
    allowed = np.where(steps <= 50, NOISE_50_STEPS, NOISE)
    axes.plot(steps, allowed, "--", color="firebrick", linewidth=1, label="allowed")
    axes.set(xlabel="step", ylabel="difference\n(nats/token)", ylim=(None, 60 * NOISE))
    axes.legend(fontsize="x-small", ncols=3, loc="upper right")


def _draw_clock(axes: Axes, comparison: Comparison) -> None:
    for (name, run), color in zip(comparison.runs.items(), COLORS, strict=True):
        window = min(SMOOTH, len(run.losses))
        smooth = np.convolve(run.losses, np.ones(window) / window, "valid")
        axes.plot(np.cumsum(run.seconds)[window - 1 :], smooth, color=color, label=name)
    axes.set(xlabel="seconds", xlim=(0, None), ylabel=f"loss, mean of {SMOOTH}\n(nats/token)")
    axes.legend()
