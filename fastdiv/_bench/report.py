"""Results as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .._cli.console import Cell, print_table
from .losses import LOSSES
from .overhead import SHAPE, Overhead
from .result import VARIANTS, Result
from .timing import Timing

CAPTION = """\
Medians of interleaved rounds; f+b: forward and backward; ±: half the interquartile range of that.
GB/s: of the least traffic, every matrix read once in the forward and again in the backward, and one
gradient written. Copies: time of f+b over that of a copy of the logits into memory in use.
Faster: time of f+b in eager torch and under torch.compile over that of fastdiv, not in place.
Extra MB: peak memory of f+b beyond the logits, the target and the gradient.\
"""

BANDWIDTH_CAPTION = """\
GB/s of the least traffic: every matrix read once in the forward and again in the backward, and one
gradient written; %: of the rate of a copy in the same rounds. Medians of interleaved rounds; f+b:
forward and backward; forward_grad: the op that does both in one pass, the gradient over the logits.
Faster: time of f+b over that of fastdiv, not in place. Extra MB: peak memory of f+b beyond logits,
target and gradient.\
"""


def machine_line(machine: Mapping[str, Any]) -> str:
    """What a table was measured on, in one line."""
    if gpu := machine.get("gpu"):
        return f"{gpu['name']}, driver {gpu['driver']}, torch {machine['torch']}"
    load = machine["load_average"]
    return (
        f"{machine['cpu']}, {machine['threads']} of {machine['cpu_count']} cores, "
        f"{machine.get('cpu_isa', 'no kernels')}, torch {machine['torch']}"
        + (f", load average {load[0]:.1f}" if load else "")
    )


def busy_line(machine: Mapping[str, Any]) -> str:
    """A warning where other programs took part of the cores."""
    load, cores = machine["load_average"], machine["cpu_count"]
    if "gpu" in machine or not load or not cores or load[0] < cores / 2:
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
        result.size,
        _milliseconds(result.times["forward"]["fused"]),
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


def print_bandwidths(results: Sequence[Result], machine: Mapping[str, Any]) -> None:
    """The table of losses by phase, and of all implementations."""
    results = sorted(results, key=lambda r: (list(LOSSES).index(r.loss), r.dtype, r.shape[1]))
    others = [v for v in VARIANTS[2:] if any(v in result.training for result in results)]
    columns = ["loss", "dtype", "shape", "copy\nGB/s"]
    columns += [f"{phase}\nGB/s, %" for phase in ("forward", "backward", "f+b", "f+b in place")]
    columns += ["forward_grad\nGB/s, %", *(f"faster than\n{other}" for other in others)]
    print_table(
        f"fastdiv {machine['fastdiv']} on {machine_line(machine)}",
        [*columns, "extra\nMB", "eager's\nextra MB"],
        [
            [
                result.loss,
                result.dtype,
                result.size,
                f"{result.copy_bandwidth:.0f}",
                _bandwidth(result, "forward"),
                _bandwidth(result, "backward"),
                _bandwidth(result, "training"),
                _bandwidth(result, "training", "in_place"),
                _bandwidth(result, "forward_grad"),
                *(_speedup(result, other) for other in others),
                _megabytes(result.extra_bytes.get("fused")),
                _megabytes(result.extra_bytes.get("eager")),
            ]
            for result in results
        ],
        names=3,
        caption=f"{BANDWIDTH_CAPTION}{busy_line(machine)}",
    )


def _bandwidth(result: Result, phase: str, variant: str = "fused") -> str:
    if variant not in result.times.get(phase, {}):
        return "–"
    rate = result.bandwidth(variant, phase)
    return f"{rate:.0f} {100 * rate / result.copy_bandwidth:3.0f}"


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
        f"f+b of {SHAPE[0]}×{SHAPE[1]} f32, one thread of the host: {machine_line(machine)}",
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
