"""The demo's progress bars, table and picture."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column, Table
from rich.text import Text
from torch import Tensor

# So far apart, in nats, may two curves be that differ in rounding only. One float32 rounding of a
# loss is 5e-7; each step hands its own on to the weights, so that they may add up.
NOISE_50_STEPS = 1e-4
NOISE = 1e-3


@dataclass(frozen=True)
class Run:
    """What a training leaves behind: the loss and the seconds of every step."""

    losses: list[float]
    seconds: list[float]


@dataclass(frozen=True)
class Comparison:
    """One task done with fastdiv and with torch."""

    task: str
    fastdiv: str  #: the name of the loss that stands for fastdiv in `runs`
    runs: dict[str, Run]  #: a training with that loss, and one with `"torch"`
    seconds: dict[str, float]  #: of each loss alone, forward and backward
    memory: dict[str, float | None]  #: the bytes that takes at its peak beyond the logits

    @property
    def differences(self) -> Tensor:
        """How far apart the two curves are at every step, in nats."""
        ours, theirs = (torch.tensor(self.runs[name].losses) for name in (self.fastdiv, "torch"))
        return (ours - theirs).abs()

    @property
    def agrees(self) -> bool:
        """Whether that is float32 noise; a NaN is not."""
        early, overall = self.differences[:50].max(), self.differences.max()
        return bool(early <= NOISE_50_STEPS and overall <= NOISE)


class StepsPerSecond(ProgressColumn):
    """How fast a training is."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f} steps/s" if speed else "")


def progress_bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<26}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]:.3f} nats"),
        StepsPerSecond(),
        console=console,
    )


def bar(bars: Progress, title: str, steps: int) -> Callable[[float], None]:
    """Returns what to call with the loss after every step."""
    task = bars.add_task(title, total=steps, loss=float("nan"))
    return lambda loss: bars.update(task, advance=1, loss=loss)


HEADINGS = ("start\nnats", "end\nnats", "total\ns", "step\ns", "alone\nms", "speed-up", "peak\nMB")


def report(comparisons: list[Comparison], console: Console) -> None:
    """Prints a table, and whether the curves agree."""
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
        " model, forward and backward, median; peak: the memory that takes beyond the logits\n",
        soft_wrap=True,
    )
    for comparison in comparisons:
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


OURS, THEIRS = "#12406e", "#f2a65a"
SMOOTH = 10  # steps


def plot(comparisons: list[Comparison], title: str, path: Path) -> None:
    """Draws each task: the curves over steps, their difference, and the curves over time."""
    figure = Figure(figsize=(11, 8), dpi=120, layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(3, len(comparisons), height_ratios=[3, 1.5, 2], squeeze=False)
    for comparison, (curves, apart, clock) in zip(comparisons, axes.T, strict=True):
        ours, theirs = comparison.runs[comparison.fastdiv], comparison.runs["torch"]
        steps = np.arange(1, len(ours.losses) + 1)

        curves.plot(steps, theirs.losses, color=THEIRS, linewidth=5, alpha=0.7, label="torch")
        curves.plot(steps, ours.losses, color=OURS, linewidth=1, label=comparison.fastdiv)
        curves.set(title=comparison.task, ylabel="loss (nats/token)")
        curves.sharex(apart)
        curves.tick_params(labelbottom=False)

        difference = comparison.differences.numpy()
        equal = np.count_nonzero(difference == 0)  # those have no place on a log scale
        difference[difference == 0] = np.nan
        label = f"apart ({equal} of {len(steps)} steps equal)"
        apart.semilogy(steps, difference, ".", color=OURS, markersize=4, label=label)
        resolution = np.spacing(np.array(theirs.losses, dtype=np.float32))
        apart.plot(steps, resolution, color="grey", linewidth=1, label="a float32 rounding")
        allowed = np.where(steps <= 50, NOISE_50_STEPS, NOISE)
        apart.plot(steps, allowed, "--", color="firebrick", linewidth=1, label="allowed")
        apart.set(xlabel="step", ylabel="difference\n(nats/token)", ylim=(None, 60 * NOISE))
        apart.legend(fontsize="x-small", ncols=3, loc="upper right")

        window = min(SMOOTH, len(steps))
        for run, name, color in ((theirs, "torch", THEIRS), (ours, comparison.fastdiv, OURS)):
            smooth = np.convolve(run.losses, np.ones(window) / window, "valid")
            seconds = np.cumsum(run.seconds)[window - 1 :]
            clock.plot(seconds, smooth, color=color, linewidth=2, label=name)
        clock.set(xlabel="seconds", xlim=(0, None), ylabel=f"loss, mean of {SMOOTH}\n(nats/token)")
        for axis in (curves, apart, clock):
            axis.grid(alpha=0.25)
        curves.legend()
        clock.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
