"""Times of every loss as it is, in place, in eager torch, under ``torch.compile`` and elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .console import Advance
from .losses import DTYPES, LOSSES, BenchmarkedLoss, Loss
from .memory import Job, extra_memory
from .peers import peers
from .timing import After, Budget, Call, GpuClock, Timing, interleave

Shape = tuple[int, int]
Key = tuple[str, str]  # phase, variant
COPY = ("copy", "")

PHASES = ("forward", "backward", "training", "forward_grad")  # training: forward and backward
VARIANTS = ("fused", "in_place", "eager", "compile", "liger", "quack")
MEASURED_FOR_MEMORY = ("fused", "in_place", "eager")


@dataclass(frozen=True)
class Plan:
    """What to run."""

    losses: Sequence[str]
    dtypes: Sequence[str]
    shapes: Sequence[Shape]
    budget: Budget
    compile: bool
    device: str = "cpu"
    every_phase: bool = False  # the backward alone as well, and forward_grad
    compiled_classes: Sequence[int] = ()  # none: all
    seconds: float = float("inf")  # for everything: what does not fit is left out

    def __iter__(self) -> Iterator[tuple[BenchmarkedLoss, str, Shape]]:
        for shape in self.shapes:
            for dtype in self.dtypes:
                for name in self.losses:
                    yield LOSSES[name], dtype, shape

    @property
    def jobs(self) -> list[Job]:
        """All measurements of memory."""
        return [
            Job(loss.name, variant, dtype, *shape, self.device)
            for loss, dtype, shape in self
            for variant in MEASURED_FOR_MEMORY
            if getattr(loss, variant) is not None
        ]

    @property
    def steps(self) -> int:
        """How often ``run`` reports progress."""
        return len(self.jobs) + len(self.dtypes) * len(self.shapes) * len(self.losses)

    def compiles(self, shape: Shape) -> bool:
        """Whether torch.compile is timed on a shape."""
        return self.compile and (not self.compiled_classes or shape[1] in self.compiled_classes)


@dataclass(frozen=True)
class Result:
    """Times and memory of one loss; the times by phase and variant, of which not all exist."""

    loss: str
    dtype: str
    shape: Shape
    copy: Timing
    times: Mapping[str, Mapping[str, Timing]]
    extra_bytes: dict[str, int | None] = field(default_factory=dict)

    @property
    def training(self) -> Mapping[str, Timing]:
        """Times of forward and backward."""
        return self.times["training"]

    @property
    def logits_bytes(self) -> int:
        """Size of one matrix."""
        return self.shape[0] * self.shape[1] * DTYPES[self.dtype].itemsize

    @property
    def copy_bandwidth(self) -> float:
        """GB/s of a copy, which reads a matrix and writes one."""
        return 2e-9 * self.logits_bytes / self.copy.median

    def bandwidth(self, variant: str = "fused", phase: str = "training") -> float:
        """GB/s of the least traffic that a phase can do with."""
        minimum = LOSSES[self.loss].minimum_bytes(phase, self.logits_bytes)
        return 1e-9 * minimum / self.times[phase][variant].median

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
            "minimum_bytes": {p: loss.minimum_bytes(p, self.logits_bytes) for p in self.times},
            "copy_ms": self.copy.in_milliseconds(),
            **{
                f"{phase}_ms": {k: v.in_milliseconds() for k, v in times.items()}
                for phase, times in self.times.items()
            },
            "copy_gb_per_s": round(self.copy_bandwidth, 3),
            **{
                f"{phase}_gb_per_s": {k: round(self.bandwidth(k, phase), 3) for k in times}
                for phase, times in self.times.items()
            },
            "training_copies": {k: round(self.copies(k), 3) for k in self.training},
            "extra_bytes": self.extra_bytes,
        }


def run(plan: Plan, advance: Advance) -> list[Result]:
    """Measures memory first, all of it, since nothing else may run while a call is timed."""
    start = time.perf_counter()
    memory: dict[tuple[str, str, Shape], dict[str, int | None]] = {}
    for job, extra in zip(plan.jobs, extra_memory(plan.jobs), strict=True):
        key = (job.loss, job.dtype, (job.rows, job.classes))
        memory.setdefault(key, {})[job.variant] = extra
        advance(f"memory of {job.loss} {job.dtype}")
    clock = GpuClock() if plan.device == "cuda" else None
    results = []
    for loss, dtype, shape in plan:
        if time.perf_counter() - start > plan.seconds:
            print(f"out of time before {loss.name} {dtype} {shape}", file=sys.stderr)
            break
        times = interleave(*_calls(plan, loss, dtype, shape), plan.budget, clock=clock)
        by_phase = {
            phase: {v: times[phase, v] for v in VARIANTS if (phase, v) in times} for phase in PHASES
        }
        by_phase = {phase: variants for phase, variants in by_phase.items() if variants}
        extra_bytes = memory[loss.name, dtype, shape]
        results.append(Result(loss.name, dtype, shape, times[COPY], by_phase, extra_bytes))
        advance(f"time of {loss.name} {dtype}")
    return results


def _calls(
    plan: Plan, loss: BenchmarkedLoss, dtype: str, shape: Shape
) -> tuple[dict[Key, Call | After], Call]:
    """The calls to time, and what restores before each the logits that some of them overwrite."""
    original, target = loss.make_inputs(shape, DTYPES[dtype], plan.device)
    x, copy = original.clone(), original.clone()
    variants = {"fused": loss.fused, "eager": loss.eager}
    if plan.compiles(shape):
        torch.compiler.reset()  # other dtypes and shapes must not count as recompilations
        variants["compile"] = torch.compile(loss.eager, dynamic=False)
    if plan.device == "cuda":
        variants |= peers(loss.name)
    calls: dict[Key, Call | After] = {COPY: lambda: copy.copy_(original)}
    for name, variant in variants.items():
        if name not in ("fused", "eager") and not _works(name, variant, loss, x, target):
            continue
        calls["forward", name] = _forward(variant, x, target)
        if plan.every_phase:
            calls["backward", name] = _backward(variant, x, target)
        calls["training", name] = _training(variant, x, target)
    if loss.in_place is not None:
        calls["training", "in_place"] = _training(loss.in_place, x, target)
    if plan.every_phase:
        calls["forward_grad", "fused"] = lambda: loss.forward_grad(x, target)
    return calls, lambda: x.copy_(original)


def _works(name: str, variant: Loss, loss: BenchmarkedLoss, x: Tensor, target: Tensor) -> bool:
    """Whether an implementation that is not ours computes this loss, here and at this size."""
    try:
        # In this order: Liger's writes over the logits.
        expected, value = (_forward(v, x, target)() for v in (loss.eager, variant))
        torch.testing.assert_close(value, expected, rtol=0.1, atol=1e-3, check_dtype=False)
    except Exception as error:  # it does not fit, does not compile, or is something else
        print(
            f"{name} left out of {loss.name} {x.dtype} {tuple(x.shape)}: {error}", file=sys.stderr
        )
        return False
    return True


def _forward(loss: Loss, x: Tensor, target: Tensor) -> Call:
    def call() -> Tensor:
        with torch.no_grad():
            return loss(x, target)

    return call


def _training(loss: Loss, x: Tensor, target: Tensor) -> Call:
    both = _backward(loss, x, target)
    return lambda: both.then(both.first())


def _backward(loss: Loss, x: Tensor, target: Tensor) -> After:
    leaf = x.detach().requires_grad_()

    def forward() -> tuple[Tensor, Tensor]:
        logits = leaf.view_as(leaf)  # no leaf, as the logits of a model: may be overwritten
        return loss(logits, target), logits

    def backward(made: tuple[Tensor, Tensor]) -> Tensor:
        return torch.autograd.grad(*made)[0]

    return After(forward, backward)
