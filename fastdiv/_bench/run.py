"""Times of one loss: not in place and in place, its yardstick, eager torch and others."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from .limit.build import NoYardstickError
from .limit.yardstick import Yardstick
from .losses import DTYPES, LOSSES, BenchmarkedLoss, Loss, as_computed, peers
from .results import COPY, Record, Shape, make_result
from .timing import After, Budget, Call, GpuClock, host_seconds, interleave, torch_threads

OVERHEAD_SHAPE = (8, 128)
OVERHEAD_REPEATS = 50  # calls per reading of the clock


def time_loss(
    loss: BenchmarkedLoss,
    dtype: str,
    shape: Shape,
    budget: Budget,
    variants: Sequence[str],
    phases: Sequence[str],
    device: str,
    extra_bytes: Mapping[str, int | None],
) -> Record:
    """Time the variants of a loss in these phases."""
    original, *target = loss.make_inputs(shape, DTYPES[dtype], device)
    x, copy = original.clone(), original.clone()
    calls: dict[tuple[str, str], Call | After] = {COPY: lambda: copy.copy_(original)}
    for phase, variant, call in _calls(loss, variants, x, target):
        if phase in phases:
            calls[phase, variant] = call
    clock = GpuClock() if device == "cuda" else None
    # Some calls overwrite the logits.
    times = interleave(calls, lambda: x.copy_(original), budget, clock=clock)
    return make_result(loss.name, dtype, shape, torch.get_num_threads(), times, extra_bytes)


def _calls(
    loss: BenchmarkedLoss, variants: Sequence[str], x: Tensor, target: Sequence[Tensor]
) -> Iterator[tuple[str, str, Call | After]]:
    """Yield phases, variants and the calls to time."""
    found: dict[str, Loss] = {"fused": loss.fused, "eager": loss.eager}
    if "compile" in variants:
        torch.compiler.reset()  # other dtypes and shapes must not count as recompilations
        found["compile"] = loss.compile
    if x.is_cuda:
        found |= peers(loss.name)
    for name, variant in found.items():
        trusted = name in ("fused", "eager")
        if name in variants and (trusted or _works(name, variant, loss, x, target)):
            both = _backward(variant, x, target)
            yield "forward", name, partial(_forward, variant, x, target)
            yield "backward", name, both
            yield "training", name, partial(_training, both)
    if loss.in_place is not None and "in_place" in variants:
        yield "training", "in_place", partial(_training, _backward(loss.in_place, x, target))
    if "limit" in variants and not x.is_cuda:
        yield from _limit_calls(loss, x, target)
    if loss.spec:
        yield "forward_grad", "fused", lambda: loss.forward_grad(x, *target)


def _limit_calls(
    loss: BenchmarkedLoss, x: Tensor, target: Sequence[Tensor]
) -> Iterator[tuple[str, str, Call | After]]:
    try:
        yardstick = Yardstick(loss.name, x.dtype)
    except NoYardstickError:
        return
    forward = partial(yardstick.forward, x, *target)
    if _works("limit", lambda *_: forward()[0], loss, x, target):
        both = After(forward, lambda made: yardstick.backward(made[1], x, *target))
        yield "forward", "limit", forward
        yield "backward", "limit", both
        yield "training", "limit", partial(_training, both)


def _works(
    name: str, variant: Loss, loss: BenchmarkedLoss, x: Tensor, target: Sequence[Tensor]
) -> bool:
    """Tell whether another implementation computes this loss at this size."""
    try:
        # In this order: Liger's writes over the logits.
        with torch.no_grad():
            expected, value = (v(x, *target) for v in (loss.eager, variant))
        # Where float16 is too narrow for eager torch, its NaN says nothing about the other.
        expected = torch.where(expected.isnan(), value, expected)
        close = partial(torch.testing.assert_close, rtol=0.1, atol=1e-3, equal_nan=True)
        close(value, expected, check_dtype=False)
    except Exception as error:  # it does not fit, does not compile, or computes something else
        where = f"{loss.name} {x.dtype} {tuple(x.shape)}"
        print(f"{name} left out of {where}: {error}", file=sys.stderr)
        return False
    return True


def _forward(loss: Loss, x: Tensor, target: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        return loss(x, *target)


def _training(both: After) -> object:
    return both.then(both.first())


def _backward(loss: Loss, x: Tensor, target: Sequence[Tensor]) -> After:
    def forward() -> tuple[Tensor, Tensor]:
        logits = as_computed(x)
        return loss(logits, *target), logits

    def backward(made: tuple[Tensor, Tensor]) -> Tensor:
        return torch.autograd.grad(*made)[0]

    return After(forward, backward)


@torch_threads(1)
def time_overhead(name: str, budget: Budget, device: str = "cpu") -> Record:
    """Time forward and backward of a tiny input, beside eager torch, on one thread.

    With more threads torch splits even these few rows (in log_softmax), and the time would be that
    of waking up a thread.
    """
    loss = LOSSES[name]
    x, *target = loss.make_inputs(OVERHEAD_SHAPE, DTYPES["f32"], device)
    x.requires_grad_()
    calls = {
        "fused_ms": lambda: torch.autograd.grad(loss.fused(x, *target), x),
        "eager_ms": lambda: torch.autograd.grad(loss.eager(x, *target), x),
    }
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    clock = partial(host_seconds, settle=wait)
    times = interleave(calls, lambda: None, budget, OVERHEAD_REPEATS, clock)
    rows, classes = OVERHEAD_SHAPE
    return {"loss": name, "rows": rows, "classes": classes, **times}
