"""Times of every loss as it is, in place, in eager torch and under ``torch.compile``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .console import Advance
from .losses import DTYPES, LOSSES, BenchmarkedLoss, Loss
from .memory import Job, extra_memory
from .timing import Budget, Call, Timing, interleave

Shape = tuple[int, int]

VARIANTS = ("fused", "in_place", "eager", "compile")
MEASURED_FOR_MEMORY = ("fused", "in_place", "eager")


@dataclass(frozen=True)
class Plan:
    """What to run."""

    losses: Sequence[str]
    dtypes: Sequence[str]
    shapes: Sequence[Shape]
    budget: Budget
    compile: bool

    def __iter__(self) -> Iterator[tuple[BenchmarkedLoss, str, Shape]]:
        for shape in self.shapes:
            for dtype in self.dtypes:
                for name in self.losses:
                    yield LOSSES[name], dtype, shape

    @property
    def jobs(self) -> list[Job]:
        """All measurements of memory."""
        return [
            Job(loss.name, variant, dtype, *shape)
            for loss, dtype, shape in self
            for variant in MEASURED_FOR_MEMORY
            if getattr(loss, variant) is not None
        ]

    @property
    def steps(self) -> int:
        """How often ``run`` reports progress."""
        return len(self.jobs) + len(self.dtypes) * len(self.shapes) * len(self.losses)


@dataclass(frozen=True)
class Result:
    """Times and memory of one loss.

    ``forward`` and ``training`` (forward and backward) are by variant; not every loss has all.
    """

    loss: str
    dtype: str
    shape: Shape
    copy: Timing
    forward: dict[str, Timing]
    training: dict[str, Timing]
    extra_bytes: dict[str, int | None] = field(default_factory=dict)

    @property
    def logits_bytes(self) -> int:
        """Size of one matrix."""
        return self.shape[0] * self.shape[1] * DTYPES[self.dtype].itemsize

    @property
    def copy_bandwidth(self) -> float:
        """GB/s of a copy, which reads a matrix and writes one."""
        return 2e-9 * self.logits_bytes / self.copy.median

    def bandwidth(self, variant: str = "fused") -> float:
        """GB/s of the least traffic that forward and backward can do with."""
        minimum = LOSSES[self.loss].training_bytes(self.logits_bytes)
        return 1e-9 * minimum / self.training[variant].median

    def copies(self, variant: str = "fused") -> float:
        """Time of forward and backward in units of one copy of the logits."""
        return self.training[variant].median / self.copy.median

    def speedup(self, over: str) -> float:
        """How many times faster than a variant forward and backward are."""
        return self.training[over].median / self.training["fused"].median

    def to_json(self) -> dict[str, Any]:
        """The measurements, and what follows from them."""
        loss = LOSSES[self.loss]
        return {
            "loss": self.loss,
            "dtype": self.dtype,
            "rows": self.shape[0],
            "classes": self.shape[1],
            "logits_bytes": self.logits_bytes,
            "minimum_bytes": {
                "forward": loss.forward_bytes(self.logits_bytes),
                "training": loss.training_bytes(self.logits_bytes),
            },
            "copy_ms": self.copy.in_milliseconds(),
            "forward_ms": {k: v.in_milliseconds() for k, v in self.forward.items()},
            "training_ms": {k: v.in_milliseconds() for k, v in self.training.items()},
            "training_gb_per_s": {k: round(self.bandwidth(k), 3) for k in self.training},
            "training_copies": {k: round(self.copies(k), 3) for k in self.training},
            "extra_bytes": self.extra_bytes,
        }


def run(plan: Plan, advance: Advance) -> list[Result]:
    """Measures memory first, all of it, since nothing else may run while a call is timed."""
    memory: dict[tuple[str, str, Shape], dict[str, int | None]] = {}
    for job, extra in zip(plan.jobs, extra_memory(plan.jobs), strict=True):
        key = (job.loss, job.dtype, (job.rows, job.classes))
        memory.setdefault(key, {})[job.variant] = extra
        advance(f"memory of {job.loss} {job.dtype}")
    results = []
    for loss, dtype, shape in plan:
        times = interleave(*_calls(loss, dtype, shape, plan.compile), plan.budget)
        results.append(
            Result(
                loss.name,
                dtype,
                shape,
                times["copy"],
                {v: times[f"{v} forward"] for v in VARIANTS if f"{v} forward" in times},
                {v: times[v] for v in VARIANTS if v in times},
                memory[loss.name, dtype, shape],
            )
        )
        advance(f"time of {loss.name} {dtype}")
    return results


def _calls(
    loss: BenchmarkedLoss, dtype: str, shape: Shape, compiled: bool
) -> tuple[dict[str, Call], Call]:
    """The calls to time, and what restores before each the logits that some of them overwrite."""
    original, target = loss.make_inputs(shape, DTYPES[dtype])
    x, copy = original.clone(), original.clone()
    calls: dict[str, Call] = {
        "copy": lambda: copy.copy_(original),
        "fused forward": _forward(loss.fused, x, target),
        "fused": _training(loss.fused, x, target),
        "eager forward": _forward(loss.eager, x, target),
        "eager": _training(loss.eager, x, target),
    }
    if loss.in_place is not None:
        calls["in_place"] = _training(loss.in_place, x, target)
    if compiled:
        torch.compiler.reset()  # other dtypes and shapes must not count as recompilations
        inductor = torch.compile(loss.eager, dynamic=False)
        calls["compile forward"] = _forward(inductor, x, target)
        calls["compile"] = _training(inductor, x, target)
    return calls, lambda: x.copy_(original)


def _forward(loss: Loss, x: Tensor, target: Tensor) -> Call:
    def call() -> Tensor:
        with torch.no_grad():
            return loss(x, target)

    return call


def _training(loss: Loss, x: Tensor, target: Tensor) -> Call:
    leaf = x.detach().requires_grad_()

    def call() -> Tensor:
        logits = leaf.view_as(leaf)  # no leaf, as the logits of a model: may be overwritten
        return torch.autograd.grad(loss(logits, target), logits)[0]

    return call
