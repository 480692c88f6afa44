"""The comparison of two runs: the figures that moved beyond their noise.

The two runs may be on different machines, or on one that other programs use.  So times are not
compared in seconds, but as ratios: to the copy of the same rounds, and to eager torch where it ran.
A time has moved if each ratio has, by more than the tolerance and with quartiles that do not meet.
Instructions and memory do not depend on other programs, and are compared as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from rich.text import Text

from .results import PHASES, Measurements, Record, size_of
from .tables import machine_line, print_table
from .timing import Timing

FASTDIV = ("fused", "in_place", "per_row")
NAMED = ("log_prob", "log_prob_many", "log_prob_mask", "log_prob_bits", "topk_ignore", "topk_tail")
MEGABYTE = 1_000_000  # the noise of a process's memory

What = tuple[str, str, str, str, str]  # part, loss, dtype, size, quantity


class Interval(NamedTuple):
    """A figure: its median and its quartiles."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, time: Timing, unit: Timing) -> Interval:
        """Return a time in units of another one of the same rounds."""
        return cls(
            time.lower_quartile / unit.upper_quartile,
            time.median / unit.median,
            time.upper_quartile / unit.lower_quartile,
        )

    def moved(self, after: Interval) -> float:
        """Return the relative increase, 0.1 for a tenth; 0 where the quartiles meet."""
        if self.low <= after.high and after.low <= self.high:
            return 0.0
        return after.middle / self.middle - 1 if self.middle > 0 else 1.0


Figure = Mapping[str, Interval]  # one quantity, in every unit in which it is known


def compare(before: Measurements, after: Measurements, tolerance: float) -> int:
    """Print what moved, and return how many figures got worse."""
    olds, news = dict(figures(before)), dict(figures(after))
    common = [what for what in news if what in olds]
    moved = {what: change(olds[what], news[what], tolerance) for what in common}
    moved = {what: by for what, by in moved.items() if by}
    print(f"before: {_origin(before.machine)}\nafter:  {_origin(after.machine)}")
    if moved:
        rows = []
        for what, by in sorted(moved.items(), key=lambda entry: -entry[1]):
            old, new = olds[what], news[what]
            unit = next(unit for unit in old if unit in new)
            values = (f"{old[unit].middle:.2f}", f"{new[unit].middle:.2f}", unit)
            rows.append([*what, *values, Text(f"{100 * by:+.0f} %", "red" if by > 0 else "green")])
        title = f"moved beyond their noise and by more than {100 * tolerance:.0f} %"
        headers = ["part", "loss", "dtype", "size", "of it", "before", "after", "unit", "change"]
        print_table(title, headers, rows, names=5)
    worse = sum(by > 0 for by in moved.values())
    print(f"{len(common)} figures compared: {worse} worse, {len(moved) - worse} better")
    return worse


def change(before: Figure, after: Figure, tolerance: float) -> float:
    """Return the change of a figure in the unit where it is least; 0 if one unit shows none."""
    changes = [before[unit].moved(after[unit]) for unit in before if unit in after]
    least = min(changes, key=abs, default=0.0)
    agreed = all(by * least > 0 for by in changes)
    bound = tolerance if least > 0 else tolerance / (1 + tolerance)
    return least if agreed and abs(least) > bound else 0.0


def figures(run: Measurements) -> Iterator[tuple[What, Figure]]:
    """Yield all figures of fastdiv in a run."""
    for part in ("results", "by_classes", "by_rows", "threads"):
        for r in getattr(run, part):
            where = (part, r["loss"], r["dtype"], f"{size_of(r)}, {r['threads']} threads")
            for phase in PHASES:
                times = r.get(f"{phase}_ms", {})
                units = {
                    "copies": r["copy_ms"],
                    **({"eager": times["eager"]} if "eager" in times else {}),
                }
                for name, time in times.items():
                    if name in FASTDIV:
                        yield (
                            (*where, f"{phase} {name}"),
                            {u: Interval.of(time, v) for u, v in units.items()},
                        )
            yield from _memory(where, r)
    for r in run.overhead:
        where = ("overhead", r["loss"], "f32", size_of(r))
        yield (*where, "training"), {"eager": Interval.of(r["fused_ms"], r["eager_ms"])}
    for r in run.instructions:
        where = ("instructions", r["loss"], r["dtype"], r["isa"])
        yield (*where, r["phase"]), {"an element": Interval(*[r["per_element"]] * 3)}
    for r in run.linear:
        size = f"{r['rows']}×{r['hidden']}×{r['classes']}"
        where = ("linear", "linear_cross_entropy", r["dtype"], size)
        for name, time in r["ms"].items():
            if name in (*FASTDIV, *NAMED):
                yield (*where, name), {"products": Interval.of(time, r["ms"]["products"])}
        yield from _memory(where, r)


def _memory(where: tuple[str, str, str, str], r: Record) -> Iterator[tuple[What, Figure]]:
    for name, count in r["extra_bytes"].items():
        if name in FASTDIV and count is not None:
            megabytes = Interval(*((count + n) / 1e6 for n in (-MEGABYTE, 0, MEGABYTE)))
            yield (*where, f"memory {name}"), {"MB": megabytes}


def _origin(machine: Record) -> str:
    return f"fastdiv {machine['fastdiv']} of {machine['date']} on {machine_line(machine)}"
