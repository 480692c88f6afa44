"""Times of every loss as it is, in place, in eager torch, under ``torch.compile`` and elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._cli.console import Advance
from .losses import DTYPES, LOSSES, BenchmarkedLoss, Loss, as_computed
from .memory import Job, extra_memory
from .peers import peers
from .result import PHASES, VARIANTS, Result, Shape
from .timing import After, Budget, Call, GpuClock, interleave

Key = tuple[str, str]  # phase, variant
COPY = ("copy", "")

MEASURED_FOR_MEMORY = ("fused", "in_place", "eager")


@dataclass(frozen=True)
class Plan:
    """What to run."""

    losses: Sequence[str]
    dtypes: Sequence[str]
    shapes: Sequence[Shape]
    budget: Budget
    variants: Sequence[str] = VARIANTS
    phases: Sequence[str] = ("forward", "backward", "training")
    device: str = "cpu"
    threads: int | None = None  # None: as torch is set
    memory: bool = False
    compiled_classes: Sequence[int] = ()  # none: all
    stop_at: float = float("inf")  # on time.perf_counter: what comes later is left out

    def __iter__(self) -> Iterator[tuple[BenchmarkedLoss, str, Shape]]:
        for shape in self.shapes:
            for dtype in self.dtypes:
                for name in self.losses:
                    yield LOSSES[name], dtype, shape

    @property
    def jobs(self) -> list[Job]:
        """All measurements of memory: at the first shape, for it grows like the logits."""
        return [
            Job(loss.name, variant, dtype, *shape, self.device)
            for loss, dtype, shape in (self if self.memory else ())
            for variant in MEASURED_FOR_MEMORY
            if shape == self.shapes[0]
            if variant in self.variants and getattr(loss, variant) is not None
        ]

    @property
    def steps(self) -> int:
        """How often ``run`` reports progress."""
        return len(self.jobs) + len(self.dtypes) * len(self.shapes) * len(self.losses)

    def compiles(self, shape: Shape) -> bool:
        """Whether torch.compile is timed on a shape."""
        chosen = not self.compiled_classes or shape[1] in self.compiled_classes
        return "compile" in self.variants and chosen


def run(plan: Plan, advance: Advance) -> list[Result]:
    """Measures memory first, all of it, since nothing else may run while a call is timed."""
    memory: dict[tuple[str, str, Shape], dict[str, int | None]] = {}
    for job, extra in zip(plan.jobs, extra_memory(plan.jobs), strict=True):
        key = (job.loss, job.dtype, (job.rows, job.classes))
        memory.setdefault(key, {})[job.variant] = extra
        advance(f"memory of {job.loss} {job.dtype}")
    threads = torch.get_num_threads()
    torch.set_num_threads(plan.threads or threads)
    try:
        return list(_results(plan, memory, advance))
    finally:
        torch.set_num_threads(threads)


def _results(
    plan: Plan, memory: dict[tuple[str, str, Shape], dict[str, int | None]], advance: Advance
) -> Iterator[Result]:
    clock = GpuClock() if plan.device == "cuda" else None
    for loss, dtype, shape in plan:
        if time.perf_counter() > plan.stop_at:
            print(f"out of time before {loss.name} {dtype} {shape}", file=sys.stderr)
            return
        times = interleave(*_calls(plan, loss, dtype, shape), plan.budget, clock=clock)
        by_phase = {
            phase: {v: times[phase, v] for v in VARIANTS if (phase, v) in times} for phase in PHASES
        }
        by_phase = {phase: variants for phase, variants in by_phase.items() if variants}
        extra_bytes = memory.get((loss.name, dtype, shape), {})
        threads = torch.get_num_threads()
        yield Result(loss.name, dtype, shape, threads, times[COPY], by_phase, extra_bytes)
        advance(f"time of {loss.name} {dtype} {shape[0]}×{shape[1]}")


def _calls(
    plan: Plan, loss: BenchmarkedLoss, dtype: str, shape: Shape
) -> tuple[dict[Key, Call | After], Call]:
    """The calls to time, and what restores before each the logits that some of them overwrite."""
    original, *target = loss.make_inputs(shape, DTYPES[dtype], plan.device)
    x, copy = original.clone(), original.clone()
    variants: dict[str, Loss] = {"fused": loss.fused, "eager": loss.eager}
    if plan.compiles(shape):
        torch.compiler.reset()  # other dtypes and shapes must not count as recompilations
        variants["compile"] = torch.compile(loss.eager, dynamic=False)
    if plan.device == "cuda":
        variants |= peers(loss.name)
    calls: dict[Key, Call | After] = {COPY: lambda: copy.copy_(original)}
    for name, variant in variants.items():
        if name not in plan.variants:
            continue
        if name not in ("fused", "eager") and not _works(name, variant, loss, x, target):
            continue
        both = _backward(variant, x, target)
        calls["forward", name] = _forward(variant, x, target)
        calls["backward", name] = both
        calls["training", name] = _training(both)
    if loss.in_place is not None and "in_place" in plan.variants:
        calls["training", "in_place"] = _training(_backward(loss.in_place, x, target))
    if loss.spec:
        calls["forward_grad", "fused"] = lambda: loss.forward_grad(x, *target)
    wanted = {key: call for key, call in calls.items() if key == COPY or key[0] in plan.phases}
    return wanted, lambda: x.copy_(original)


def _works(
    name: str, variant: Loss, loss: BenchmarkedLoss, x: Tensor, target: Sequence[Tensor]
) -> bool:
    """Whether an implementation that is not ours computes this loss, here and at this size."""
    try:
        # In this order: Liger's writes over the logits.
        with torch.no_grad():
            expected, value = (v(x, *target) for v in (loss.eager, variant))
        # Where float16 is too narrow for eager torch, its NaN says nothing about the other.
        expected = torch.where(expected.isnan(), value, expected)
        close: dict[str, Any] = {"rtol": 0.1, "atol": 1e-3, "equal_nan": True}
        torch.testing.assert_close(value, expected, **close, check_dtype=False)
    except Exception as error:  # it does not fit, does not compile, or is something else
        print(
            f"{name} left out of {loss.name} {x.dtype} {tuple(x.shape)}: {error}", file=sys.stderr
        )
        return False
    return True


def _forward(loss: Loss, x: Tensor, target: Sequence[Tensor]) -> Call:
    def call() -> Tensor:
        with torch.no_grad():
            return loss(x, *target)

    return call


def _training(both: After) -> Call:
    return lambda: both.then(both.first())


def _backward(loss: Loss, x: Tensor, target: Sequence[Tensor]) -> After:
    def forward() -> tuple[Tensor, Tensor]:
        logits = as_computed(x)
        return loss(logits, *target), logits

    def backward(made: tuple[Tensor, Tensor]) -> Tensor:
        return torch.autograd.grad(*made)[0]

    return After(forward, backward)
