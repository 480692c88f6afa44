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
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiv
from fastdiv._linear.tiles import product_dtype

from .._cli.console import Advance
from .losses import DTYPES
from .memory import measured_apart, peak_of, serve
from .timing import Budget, Call, GpuClock, Timing, interleave

LinearLoss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of hidden states, weight and labels

FACTORS = (1 / 4, 1 / 2, 1, 2, 4, 8)  # of the rows, for memory over rows
SLOW = ("eager", "compile", "chunked")  # on a CPU without products of halves: minutes


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
        return self.rows * self.classes * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """As torch has it."""
        return DTYPES.get(self.dtype) or getattr(torch, self.dtype)

    def size(self) -> dict[str, Any]:
        """All but the variant, for the JSON file."""
        return {k: v for k, v in self._asdict().items() if k != "variant"}

    @classmethod
    def of(cls, written: Mapping[str, Any]) -> LinearJob:
        """A size from the JSON file."""
        return cls("fused", **{k: written[k] for k in cls._fields[1:]})

    def make_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, weight and labels, always the same."""
        generator = torch.Generator(self.device).manual_seed(0)
        options: dict[str, Any] = {"generator": generator, "device": self.device}
        h = torch.randn(self.rows, self.hidden, **options).to(self.torch_dtype)
        w = torch.randn(self.classes, self.hidden, **options).mul_(self.hidden**-0.5)
        y = torch.randint(self.classes, (self.rows,), **options)
        return h.requires_grad_(), w.to(self.torch_dtype).requires_grad_(), y


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


def step(loss: LinearLoss, h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(h, w, y), (h, w))


# --- memory -----------------------------------------------------------------------------------


def extra_memory(jobs: Sequence[LinearJob]) -> Iterator[int | None]:
    """Bytes at the peak of each beyond arguments and gradients, if the system tells them."""
    return measured_apart(__name__, jobs, _measure)


def _measure(job: LinearJob) -> int | None:
    loss = losses()[job.variant]
    small = job._replace(rows=64, hidden=64, classes=512)
    step(loss, *small.make_inputs())  # loads what is loaded lazily, starts the threads
    inputs = job.make_inputs()
    gradients, peak = peak_of(lambda: step(loss, *inputs), job.device)
    return None if peak is None else max(0, peak - sum(g.nbytes for g in gradients))


# --- time -------------------------------------------------------------------------------------


def left_out(job: LinearJob) -> tuple[str, ...]:
    """Variants that would take minutes."""
    if job.device == "cuda":
        return ()
    return SLOW if product_dtype(torch.empty(0, dtype=job.torch_dtype)) != job.torch_dtype else ()


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
            **self.job.size(),
            "logits_bytes": self.job.logits_bytes,
            "ms": {k: v.in_milliseconds() for k, v in self.times.items()},
            "products": {k: round(self.products(k), 3) for k in self.times},
            "extra_bytes": dict(self.extra_bytes),
        }

    @classmethod
    def from_json(cls, written: Mapping[str, Any]) -> LinearResult:
        """From the JSON file."""
        times = {k: Timing.from_milliseconds(v) for k, v in written["ms"].items()}
        return cls(LinearJob.of(written), times, written["extra_bytes"])


class LinearMemory(NamedTuple):
    """Memory of one size, by variant."""

    job: LinearJob
    extra_bytes: Mapping[str, int | None]

    def to_json(self) -> dict[str, Any]:
        """For the JSON file."""
        return {**self.job.size(), "extra_bytes": dict(self.extra_bytes)}

    @classmethod
    def from_json(cls, written: Mapping[str, Any]) -> LinearMemory:
        """From the JSON file."""
        return cls(LinearJob.of(written), written["extra_bytes"])


def run_linear(
    sizes: Sequence[LinearJob], budget: Budget, compiled: bool, advance: Advance
) -> list[LinearResult]:
    """Measures every size: memory first, as nothing else may run while a call is timed."""
    results = []
    for size in sizes:
        extra = _memory_of(size, _variants(size))
        advance(f"memory of {size.rows} rows, {size.dtype}")
        clock = GpuClock() if size.device == "cuda" else None
        times = interleave(_calls(size, compiled), lambda: None, budget, clock=clock)
        results.append(LinearResult(size, times, extra))
        advance(f"time of {size.rows} rows, {size.dtype}")
    return results


def memory_by_rows(size: LinearJob, advance: Advance) -> list[LinearMemory]:
    """Memory for a quarter of the rows up to eight times as many, for the plot."""
    plan = []
    for factor in FACTORS:
        at = size._replace(rows=max(1, int(size.rows * factor)))
        slow = ("chunked",) if size.device == "cpu" and factor > 2 else ()
        plan.append((at, [v for v in _variants(at) if v not in slow]))
    peaks = extra_memory([at._replace(variant=v) for at, variants in plan for v in variants])
    points = []
    for at, variants in plan:
        points.append(LinearMemory(at, {v: next(peaks) for v in variants}))
        advance(f"memory of {at.rows} rows, {at.dtype}")
    return points


def _variants(size: LinearJob) -> list[str]:
    return [v for v in losses() if v not in left_out(size)]


def _memory_of(size: LinearJob, variants: Sequence[str]) -> dict[str, int | None]:
    jobs = [size._replace(variant=v) for v in variants]
    return dict(zip(variants, extra_memory(jobs), strict=True))


def _calls(size: LinearJob, compiled: bool) -> dict[str, Call]:
    h, w, y = size.make_inputs()
    # Without products of halves the fastest way is that of floats, whose sizes are the same.
    dtype = torch.float32 if left_out(size) else size.torch_dtype
    x, weight = h.detach().to(dtype), w.detach().to(dtype)
    logits = x.new_empty(size.rows, size.classes)
    dx, dw = torch.empty_like(x), torch.empty_like(weight)

    def products() -> None:
        torch.mm(x, weight.t(), out=logits)
        torch.mm(logits, weight, out=dx)
        torch.mm(logits.t(), x, out=dw)

    torch.compiler.reset()
    steps = {
        name: lambda loss=loss: step(loss, h, w, y)
        for name, loss in losses(compiled).items()
        if name not in left_out(size)
    }
    return {"products": products, **steps}


if __name__ == "__main__":
    serve([LinearJob(*fields) for fields in json.loads(sys.argv[1])], _measure)
