"""The process of a kernel variant: it checks its losses, then times what it is asked for.

``gpu_compare.py`` starts one for each variant.  A request and an answer are a line of JSON each.
"""

from __future__ import annotations

import argparse
import inspect
import json
import signal
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

import fastdiv
from fastdiv._bench import linear, losses
from fastdiv._bench.machine import describe_machine
from fastdiv._bench.memory import peak_of
from fastdiv._bench.run import time_loss
from fastdiv._bench.timing import Budget, GpuClock, interleave
from gpu_variants import LOSSES

Shape = tuple[int, int]
Found = dict[str, Any]

PHASES = ("forward", "backward", "training", "forward_grad")
# The relative error of a value, and of a gradient in the norm of L2.  Rounding gives 3e-3 and 3e-6
# on a CPU; approximate exponentials may add to it, and a race is far above.
CLOSE = {"bf16": 1e-2, "f32": 1e-4}
ACCUMULATIONS = ("weight", "rows")


class Plan(NamedTuple):
    """A plan says what is measured, and how long for each case."""

    device: str
    dtypes: Sequence[str]
    shapes: Sequence[Shape]
    checked: Sequence[Shape]
    linear: Sequence[int]  # rows, hidden features, classes
    budget: Budget


FULL = Plan(
    "cuda",
    ("bf16", "f32"),
    [(4096, 32768), (16384, 8192), (1024, 131072), (2670, 50257)],
    # Rows for a warp, for one block, for clusters, and off alignment.
    [(9, 512), (5, 8192), (3, 50257), (2, 131072)],
    (2048, 4096, 128256),  # a language model of 8 billion weights
    Budget(0.1, 3),
)
DRY_RUN = Plan("cpu", ("f32",), [(64, 1024)], [(3, 300)], (32, 16, 300), Budget(0, 2))


def wrong(name: str, dtype: str, shape: Shape, device: str) -> str:
    """Return how a loss differs from its formula in float64, or an empty text."""
    loss = losses.LOSSES[name]
    x, *target = loss.make_inputs(shape, losses.DTYPES[dtype], device)
    exact = [v.double() if v.is_floating_point() else v for v in (x, *target)]
    results = []
    for function, (logits, *others) in ((loss.fused, (x, *target)), (loss.eager, exact)):
        logits.requires_grad_()
        value = function(logits, *others)
        (grad,) = torch.autograd.grad(value, logits)
        results.append((value.detach().double(), grad.double()))
    with torch.no_grad():
        over = x.detach().clone()
        loss.forward_grad(over, *target)
    (value, grad), (expected, slope) = results
    errors = {
        "value": abs(value - expected) / abs(expected).clamp_min(1e-3),
        "gradient": (grad - slope).norm() / slope.norm(),
        "gradient in one pass": (over.double() - slope).norm() / slope.norm(),
    }
    # Not "greater than", which NaN is not.
    far = [f"{what}: {float(e):.1e}" for what, e in errors.items() if not e <= CLOSE[dtype]]
    return f"{name} {dtype} {shape}, relative error of {', '.join(far)}" if far else ""


def time_linear(plan: Plan) -> Found:
    """Cross entropy of a layer, with each way to accumulate that it has."""
    job = linear.LinearJob("fused", plan.dtypes[0], *plan.linear, plan.device)
    calls = {name: call for name, call in linear._calls(job, False).items() if name != "per_row"}
    h, w, y = job.make_inputs()
    accepted = inspect.signature(fastdiv.linear_cross_entropy).parameters
    for way in ACCUMULATIONS if "accumulate" in accepted else ():
        loss = partial(fastdiv.linear_cross_entropy, accumulate=way)
        calls[f"accumulate={way}"] = partial(linear.step, loss, h, w, y)
    clock = GpuClock() if plan.device == "cuda" else None
    budget = plan.budget._replace(seconds=10 * plan.budget.seconds)
    times = interleave(calls, lambda: None, budget, clock=clock)
    extra = {}
    if plan.device == "cuda":
        for name, call in calls.items():
            torch.cuda.synchronize()
            extra[name] = peak_of(call, plan.device)[1]
    return job.record(logits_bytes=job.logits_bytes, ms=times, extra_bytes=extra)


def work(plan: Plan) -> None:
    """Answers requests, one JSON text per line: first what is wrong, then a record for each."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what else is printed goes to the log

    def answer(found: Found) -> None:
        print(json.dumps(found, default=vars), file=answers, flush=True)

    cases = [(name, d, s) for s in plan.checked for d in plan.dtypes for name in LOSSES]
    with fastdiv.backend("native"):
        problems = [why for case in cases if (why := wrong(*case, plan.device))]
        machine = describe_machine(plan.device)
        answer({"wrong": problems, "machine": machine, "package": fastdiv.__file__})
        for line in sys.stdin:
            request = json.loads(line)
            try:
                if request == "linear":
                    answer(time_linear(plan))
                else:
                    name, dtype, shape = request
                    variants = ("fused", "in_place")
                    how = (plan.budget, variants, PHASES, plan.device, {})
                    answer(time_loss(losses.LOSSES[name], dtype, tuple(shape), *how))
            except Exception as error:
                answer({"error": f"{type(error).__name__}: {error}"})
            if plan.device == "cuda":
                torch.cuda.empty_cache()  # for the other processes


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # gpu_compare.py ends this process
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true")
    work(DRY_RUN if parser.parse_args().dry_run else FULL)
