"""What moved between two runs beyond their noise.

Two runs see two machines: another one, or the same while others use it.  So nothing is compared in
seconds.  A time is taken as a ratio to what the same rounds took for a copy, and for eager torch
where it ran, and has moved only if it has by each of them: by more than the tolerance, with
quartiles that do not meet.  Instructions and memory do not depend on the machine's mood, and are
compared as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from .._cli.console import Cell, print_table
from .measurements import Measurements
from .overhead import SHAPE
from .report import machine_line
from .result import Result
from .timing import Timing

OURS = ("fused", "in_place", "per_row")
MEGABYTE = 1_000_000  # what the memory of a process moves by itself

What = tuple[str, str, str, str, str]  # part, loss, dtype, size, what of it


class Interval(NamedTuple):
    """A figure: its median and its quartiles."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, time: Timing, unit: Timing) -> Interval:
        """A time in units of another of the same rounds."""
        return cls(
            time.lower_quartile / unit.upper_quartile,
            time.median / unit.median,
            time.upper_quartile / unit.lower_quartile,
        )

    def moved(self, after: Interval) -> float:
        """By how much more it takes, 0.1 for a tenth; 0 where the quartiles meet."""
        if self.low <= after.high and after.low <= self.high:
            return 0.0
        return after.middle / self.middle - 1 if self.middle > 0 else 1.0


Figure = Mapping[str, Interval]  # the same, in every unit that it is known in


def compare(before: Measurements, after: Measurements, tolerance: float) -> int:
    """Prints what moved, and returns how many figures got worse."""
    olds, news = dict(figures(before)), dict(figures(after))
    common = [what for what in news if what in olds]
    moved = {what: change(olds[what], news[what], tolerance) for what in common}
    moved = {what: by for what, by in moved.items() if by}
    print(f"before: {_origin(before)}\nafter:  {_origin(after)}")
    if moved:
        print_table(
            f"moved beyond their noise and by more than {100 * tolerance:.0f} %",
            ["part", "loss", "dtype", "size", "of it", "before", "after", "unit", "change"],
            [
                _row(what, olds[what], news[what], by)
                for what, by in sorted(moved.items(), key=lambda entry: -entry[1])
            ],
            names=5,
        )
    worse = sum(by > 0 for by in moved.values())
    print(f"{len(common)} figures compared: {worse} worse, {len(moved) - worse} better")
    return worse


def change(before: Figure, after: Figure, tolerance: float) -> float:
    """By how much a figure moved, in the unit that saw least of it; 0 where one saw nothing."""
    changes = [before[unit].moved(after[unit]) for unit in before if unit in after]
    least = min(changes, key=abs, default=0.0)
    agreed = all(by * least > 0 for by in changes)
    bound = tolerance if least > 0 else tolerance / (1 + tolerance)
    return least if agreed and abs(least) > bound else 0.0


def figures(run: Measurements) -> Iterator[tuple[What, Figure]]:
    """Everything of ours that a run measured."""
    for part in ("results", "by_classes", "by_rows", "threads"):
        for result in getattr(run, part):
            yield from _of_result(part, result)
    size = f"{SHAPE[0]}×{SHAPE[1]}"
    for call in run.overhead:
        ratio = Interval.of(call.fused, call.eager)
        yield ("overhead", call.loss, "f32", size, "training"), {"eager": ratio}
    for count in run.instructions:
        number = count.per_element
        what = ("instructions", count.loss, count.dtype, count.isa, count.phase)
        yield what, {"an element": Interval(number, number, number)}
    for entry in run.linear:
        job, products = entry.job, entry.times["products"]
        size = f"{job.rows}×{job.hidden}×{job.classes}"
        for name in OURS:
            what = ("linear", "linear_cross_entropy", job.dtype, size, name)
            if name in entry.times:
                yield what, {"products": Interval.of(entry.times[name], products)}
            if (extra := entry.extra_bytes.get(name)) is not None:
                yield (*what[:4], f"memory {name}"), _memory(extra)


def _of_result(part: str, result: Result) -> Iterator[tuple[What, Figure]]:
    size = f"{result.size}, {result.threads} threads"
    for phase, times in result.times.items():
        for name in OURS:
            if name in times:
                ratios = {"copies": Interval.of(times[name], result.copy)}
                if "eager" in times:
                    ratios["eager"] = Interval.of(times[name], times["eager"])
                yield (part, result.loss, result.dtype, size, f"{phase} {name}"), ratios
    for name in OURS:
        if (extra := result.extra_bytes.get(name)) is not None:
            yield (part, result.loss, result.dtype, size, f"memory {name}"), _memory(extra)


def _memory(count: int) -> Figure:
    return {
        "MB": Interval((count - MEGABYTE) / 1e6, count / 1e6, (count + MEGABYTE) / 1e6),
    }


def _row(what: What, before: Figure, after: Figure, by: float) -> list[str | Cell]:
    unit = next(unit for unit in before if unit in after)
    return [
        *what,
        f"{before[unit].middle:.2f}",
        f"{after[unit].middle:.2f}",
        unit,
        Cell(f"{100 * by:+.0f} %", "red" if by > 0 else "green"),
    ]


def _origin(run: Measurements) -> str:
    machine = run.machine
    return f"fastdiv {machine['fastdiv']} of {machine['date']} on {machine_line(machine)}"
