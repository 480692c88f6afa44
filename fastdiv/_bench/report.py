"""Results as tables, as JSON and as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .console import Cell, print_table
from .machine import describe_machine
from .overhead import SHAPE, Overhead
from .run import Result
from .timing import Timing

CAPTION = """\
Medians of interleaved rounds; f+b: forward and backward; ±: half the interquartile range of that.
GB/s: of the least traffic, every matrix read once in the forward and again in the backward, and one
gradient written. Copies: time of f+b over that of a copy of the logits into memory in use.
Faster: time of f+b in eager torch and under torch.compile over that of fastdiv, not in place.
Extra MB: peak memory of f+b beyond the logits, the target and the gradient.\
"""


def machine_line(machine: Mapping[str, Any]) -> str:
    """What a table was measured on, in one line."""
    load = machine["load_average"]
    return (
        f"{machine['cpu']}, {machine['threads']} of {machine['cpu_count']} cores, "
        f"{machine.get('cpu_isa', 'no kernels')}, torch {machine['torch']}"
        + (f", load average {load[0]:.1f}" if load else "")
    )


def busy_line(machine: Mapping[str, Any]) -> str:
    """A warning where other programs took part of the cores."""
    load, cores = machine["load_average"], machine["cpu_count"]
    if not load or not cores or load[0] < cores / 2:
        return ""
    return (
        f"\nOther programs keep this machine busy (load average {load[0]:.1f}): do not trust times."
    )


def print_results(results: Sequence[Result], machine: Mapping[str, Any]) -> None:
    """The table of losses, and the copy that its units are."""
    columns = [
        "loss",
        "dtype",
        "shape",
        "forward\nms",
        "f+b\nms",
        "±\n%",
        "in place\nms",
        "f+b\nGB/s",
        "f+b\ncopies",
        "in place\ncopies",
        "faster\nthan eager",
        "than\ncompile",
        "extra\nMB",
        "eager's\nextra MB",
    ]
    rows = [_row(result) for result in results]
    print_table(
        f"fastdiv {machine['fastdiv']} on {machine_line(machine)}",
        columns,
        rows,
        names=3,
        caption=f"{CAPTION}\n{_copies(results)}{busy_line(machine)}",
    )


def _row(result: Result) -> list[str | Cell]:
    fused, in_place = result.training["fused"], result.training.get("in_place")
    return [
        result.loss,
        result.dtype,
        "×".join(map(str, result.shape)),
        _milliseconds(result.forward["fused"]),
        _milliseconds(fused),
        f"{100 * fused.spread / fused.median:.0f}",
        _milliseconds(in_place),
        f"{result.bandwidth():.1f}",
        f"{result.copies():.2f}",
        f"{result.copies('in_place'):.2f}" if in_place else "–",
        _speedup(result, "eager"),
        _speedup(result, "compile"),
        _megabytes(result.extra_bytes.get("fused")),
        _megabytes(result.extra_bytes.get("eager")),
    ]


def _milliseconds(timing: Timing | None) -> str:
    return f"{timing.median * 1e3:.2f}" if timing else "–"


def _speedup(result: Result, over: str) -> Cell:
    if over not in result.training:
        return Cell("–")
    return _ratio(result.speedup(over))


def _ratio(ratio: float) -> Cell:
    return Cell(f"{ratio:.1f}×", "green" if ratio > 1 else "red")


def _megabytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e6:.1f}"


def _copies(results: Sequence[Result]) -> str:
    """The median of the copies of each dtype and shape."""
    groups: dict[tuple[str, tuple[int, int]], list[Result]] = {}
    for result in results:
        groups.setdefault((result.dtype, result.shape), []).append(result)
    texts = []
    for (dtype, shape), group in groups.items():
        middle = sorted(group, key=lambda r: r.copy.median)[len(group) // 2]
        texts.append(
            f"{dtype} {shape[0]}×{shape[1]} {middle.copy.median * 1e3:.2f} ms "
            f"({middle.copy_bandwidth:.1f} GB/s)"
        )
    return f"One copy: {', '.join(texts)}"


def print_overhead(overheads: Sequence[Overhead], machine: Mapping[str, Any]) -> None:
    """The table of calls on tiny inputs."""
    print_table(
        f"f+b of {SHAPE[0]}×{SHAPE[1]} f32 on one thread: {machine_line(machine)}",
        ["loss", "fastdiv µs", "eager torch µs", "faster"],
        [
            [
                o.loss,
                _microseconds(o.fused),
                _microseconds(o.eager),
                _ratio(o.eager.median / o.fused.median),
            ]
            for o in overheads
        ],
        caption=f"Medians ± half the interquartile range of rounds.{busy_line(machine)}",
    )


def _microseconds(timing: Timing) -> str:
    return f"{timing.median * 1e6:.1f} ±{timing.spread * 1e6:.1f}"


def to_json(
    machine: Mapping[str, Any], results: Sequence[Result], overheads: Sequence[Overhead]
) -> dict[str, Any]:
    """All that was measured; the load average is also that of the end."""
    return {
        "machine": {**machine, "load_average_after": describe_machine()["load_average"]},
        "results": [result.to_json() for result in results],
        "overhead": [overhead.to_json() for overhead in overheads],
    }


def plot(results: Sequence[Result], machine: Mapping[str, Any], path: Path) -> None:
    """Draws the time of forward and backward in units of one copy, as one group of bars a loss."""
    from matplotlib.figure import Figure

    names = {
        "in_place": ("fastdiv, in place", "#1b7837"),
        "fused": ("fastdiv", "#7fbf7b"),
        "compile": ("torch.compile", "#9970ab"),
        "eager": ("eager torch", "#bdbdbd"),
    }
    shown = [v for v in names if any(v in result.training for result in results)]
    figure = Figure(figsize=(8, 1.2 + 0.2 * (len(shown) + 1) * len(results)), layout="constrained")
    axes = figure.add_subplot()
    for i, variant in enumerate(shown):
        having = [n for n, result in enumerate(results) if variant in result.training]
        bars = axes.barh(
            [n + (i - (len(shown) - 1) / 2) / (len(shown) + 1) for n in having],
            [results[n].copies(variant) for n in having],
            height=1 / (len(shown) + 1),
            color=names[variant][1],
            label=names[variant][0],
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
