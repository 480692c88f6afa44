"""Linear cross entropy: time in units of its three matrix products, and memory.

The products are what any way has to compute: logits, gradient of the hidden states, gradient of the
weight, each of the whole and by torch.mm.  Beside ours stand the loss of whole logits, as it is and
compiled, and torch's own in chunks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiv

from .console import Advance, print_table
from .losses import DTYPES
from .memory import RESET, STATUS, in_fresh_processes, peak_of, serve
from .report import busy_line, machine_line
from .timing import Budget, Call, GpuClock, Timing, interleave

LinearLoss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of hidden states, weight and labels

CAPTION = """\
Cross entropy of a linear layer, forward and backward. Products: time over that of the three matrix
products alone. Extra: peak memory beyond arguments and gradients, and that over the logits' size.
Medians of interleaved rounds; ±: half the interquartile range.\
"""
STYLES = {
    "eager": ("eager torch", "#bdbdbd"),
    "compile": ("torch.compile", "#9970ab"),
    "chunked": ("torch's chunks", "#d6604d"),
    "fused": ("fastdiv", "#1b7837"),
    "per_row": ("fastdiv, reduction='none'", "#7fbf7b"),
}
SLOW = ("eager", "chunked")  # with halves on a CPU


class LinearJob(NamedTuple):
    """One call to measure."""

    variant: str
    dtype: str  # a name, or torch's
    rows: int
    hidden: int
    classes: int
    device: str = "cpu"

    @property
    def logits_bytes(self) -> int:
        """What the whole logits would take."""
        return self.rows * self.classes * self._dtype.itemsize

    @property
    def _dtype(self) -> torch.dtype:
        return DTYPES.get(self.dtype) or getattr(torch, self.dtype)

    def make_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, weight and labels, always the same."""
        generator = torch.Generator(self.device).manual_seed(0)
        options: dict[str, Any] = {"generator": generator, "device": self.device}
        h = torch.randn(self.rows, self.hidden, **options).to(self._dtype)
        w = torch.randn(self.classes, self.hidden, **options).mul_(self.hidden**-0.5)
        y = torch.randint(self.classes, (self.rows,), **options)
        return h.requires_grad_(), w.to(self._dtype).requires_grad_(), y


def _eager(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w), y)


def _chunked(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(h, w, y, options=options)


def _per_row(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return fastdiv.linear_cross_entropy(h, w, y, reduction="none").mean()


def losses(compiled: bool = False) -> dict[str, LinearLoss]:
    """Every way there is with this torch."""
    found: dict[str, LinearLoss] = {"eager": _eager}
    if compiled:
        found["compile"] = torch.compile(_eager, dynamic=False)
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["chunked"] = _chunked
    return {**found, "fused": fastdiv.linear_cross_entropy, "per_row": _per_row}


def _step(loss: LinearLoss, h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(h, w, y), (h, w))


# --- memory -----------------------------------------------------------------------------------


def extra_memory(jobs: Sequence[LinearJob]) -> Iterator[int | None]:
    """Bytes at the peak of each beyond arguments and gradients; None where nobody tells."""
    if jobs and jobs[0].device == "cuda":
        yield from map(_measure, jobs)
    elif STATUS.exists() and RESET.exists():
        yield from in_fresh_processes(__name__, jobs)
    else:
        yield from (None for _ in jobs)


def _measure(job: LinearJob) -> int | None:
    loss = losses()[job.variant]
    small = job._replace(rows=64, hidden=64, classes=512)
    _step(loss, *small.make_inputs())  # loads what is loaded lazily, starts the threads
    h, w, y = job.make_inputs()
    if job.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients = _step(loss, h, w, y)
        peak: int | None = torch.cuda.max_memory_allocated() - before
        del gradients
    else:
        peak = peak_of(lambda: _step(loss, h, w, y))
    return None if peak is None else max(0, peak - h.nbytes - w.nbytes)


# --- time -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearResult:
    """Times and memory of one size, by variant; "products" is the three matrix products."""

    job: LinearJob
    times: Mapping[str, Timing]
    extra_bytes: Mapping[str, int | None]

    def products(self, variant: str) -> float:
        """Time in units of the matrix products."""
        return self.times[variant].median / self.times["products"].median

    def to_json(self) -> dict[str, Any]:
        """The measurements, and what follows from them."""
        return {
            **{k: v for k, v in self.job._asdict().items() if k != "variant"},
            "logits_bytes": self.job.logits_bytes,
            "ms": {k: v.in_milliseconds() for k, v in self.times.items()},
            "products": {k: round(self.products(k), 3) for k in self.times},
            "extra_bytes": dict(self.extra_bytes),
        }


def run_linear(
    sizes: Sequence[LinearJob], budget: Budget, compiled: bool, advance: Advance
) -> list[LinearResult]:
    """Measures every size: memory first, as nothing else may run while a call is timed."""
    results = []
    for size in sizes:
        extra = _memory_of(size, tuple(losses()))
        advance(f"memory of {size.rows} rows, {size.dtype}")
        clock = GpuClock() if size.device == "cuda" else None
        times = interleave(_calls(size, compiled), lambda: None, budget, clock=clock)
        results.append(LinearResult(size, times, extra))
        advance(f"time of {size.rows} rows, {size.dtype}")
    return results


def memory_by_rows(size: LinearJob, advance: Advance) -> list[tuple[LinearJob, dict[str, Any]]]:
    """Memory for a quarter of the rows up to eight times as many, for the plot."""
    points = []
    for factor in (1 / 4, 1 / 2, 1, 2, 4, 8):
        at = size._replace(rows=max(1, int(size.rows * factor)))
        slow = size.device == "cpu" and (at._dtype.itemsize == 2 or factor > 2)
        variants = [v for v in losses() if not (slow and v == "chunked")]
        if slow and at._dtype.itemsize == 2:
            variants = [v for v in variants if v not in SLOW]
        points.append((at, _memory_of(at, variants)))
        advance(f"memory of {at.rows} rows, {at.dtype}")
    return points


def _memory_of(size: LinearJob, variants: Sequence[str]) -> dict[str, int | None]:
    jobs = [size._replace(variant=v) for v in variants]
    return dict(zip(variants, extra_memory(jobs), strict=True))


def _calls(size: LinearJob, compiled: bool) -> dict[str, Call]:
    h, w, y = size.make_inputs()
    x, weight = h.detach(), w.detach()
    logits = x.new_empty(size.rows, size.classes)
    dx, dw = torch.empty_like(x), torch.empty_like(weight)

    def products() -> None:
        torch.mm(x, weight.t(), out=logits)
        torch.mm(logits, weight, out=dx)
        torch.mm(logits.t(), x, out=dw)

    torch.compiler.reset()
    steps = {
        name: lambda loss=loss: _step(loss, h, w, y) for name, loss in losses(compiled).items()
    }
    return {"products": products, **steps}


# --- tables and plots -------------------------------------------------------------------------


def print_linear(results: Sequence[LinearResult], machine: Mapping[str, Any]) -> None:
    """A row for every size and variant."""
    rows = []
    for result in results:
        job = result.job
        for name, timing in result.times.items():
            extra = result.extra_bytes.get(name)
            rows.append(
                [
                    STYLES[name][0] if name in STYLES else "three products",
                    job.dtype,
                    f"{job.rows}×{job.hidden}×{job.classes}",
                    f"{timing.median * 1e3:.0f}",
                    f"{100 * timing.spread / timing.median:.0f}",
                    f"{result.products(name):.2f}",
                    "" if extra is None else f"{extra / 1e6:.1f}",
                    "" if extra is None else f"{100 * extra / job.logits_bytes:.1f}",
                ]
            )
    print_table(
        f"fastdiv {machine['fastdiv']} on {machine_line(machine)}",
        ["", "dtype", "rows×hidden×classes", "f+b\nms", "±\n%", "products", "extra\nMB",
         "of logits\n%"],
        rows,
        names=3,
        caption=CAPTION + busy_line(machine),
    )  # fmt: skip


def plot_memory(
    points: Sequence[tuple[LinearJob, Mapping[str, Any]]], machine: Mapping[str, Any], path: Path
) -> None:
    """Draws memory over the number of rows, a panel for each dtype."""
    from matplotlib.figure import Figure

    dtypes = list(dict.fromkeys(job.dtype for job, _ in points))
    figure = Figure(figsize=(5 * len(dtypes), 4), layout="constrained")
    panels = figure.subplots(1, len(dtypes), squeeze=False, sharey=True)[0]
    for dtype, axes in zip(dtypes, panels, strict=True):
        chosen = [(job, extra) for job, extra in points if job.dtype == dtype]
        for name, (label, color) in STYLES.items():
            line = [(job.rows, v / 1e6) for job, extra in chosen if (v := extra.get(name))]
            if line:
                axes.plot(*zip(*line, strict=True), ".-", color=color, label=label)
        tenth = [(job.rows, job.logits_bytes / 1e7) for job, _ in chosen]
        axes.plot(*zip(*tenth, strict=True), "k:", lw=1, label="a tenth of the logits")
        axes.set(title=dtype, xlabel="rows", xscale="log", yscale="log")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("MB beyond arguments and gradients")
    panels[0].legend(fontsize=8)
    figure.suptitle(f"fastdiv {machine['fastdiv']} on {machine_line(machine)}", fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    serve([LinearJob(*fields) for fields in json.loads(sys.argv[1])], _measure)
