"""What a call costs where there is next to nothing to compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .._cli.console import Advance
from .losses import DTYPES, LOSSES
from .timing import Budget, Call, Timing, host_seconds, interleave

SHAPE = (8, 128)
REPEATS = 50  # calls behind one reading of the clock


@dataclass(frozen=True)
class Overhead:
    """Times of forward and backward of one loss on a tiny input."""

    loss: str
    fused: Timing
    eager: Timing

    def to_json(self) -> dict[str, Any]:
        """For the JSON file."""
        return {
            "loss": self.loss,
            "rows": SHAPE[0],
            "classes": SHAPE[1],
            "fused_ms": self.fused.in_milliseconds(),
            "eager_ms": self.eager.in_milliseconds(),
        }

    @classmethod
    def from_json(cls, written: Mapping[str, Any]) -> Overhead:
        """From the JSON file."""
        return cls(
            written["loss"],
            Timing.from_milliseconds(written["fused_ms"]),
            Timing.from_milliseconds(written["eager_ms"]),
        )


def run_overhead(
    names: Sequence[str], budget: Budget, advance: Advance, device: str = "cpu"
) -> list[Overhead]:
    """Measures the losses one after another, each against eager torch.

    On one thread: torch would share out even these rows (log_softmax does), and then what is timed
    is how fast the system wakes up a thread.
    """
    results = []
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    clock = partial(host_seconds, settle=wait)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in names:
            times = interleave(_calls(name, device), lambda: None, budget, REPEATS, clock)
            results.append(Overhead(name, times["fused"], times["eager"]))
            advance(name)
    finally:
        torch.set_num_threads(threads)
    return results


def _calls(name: str, device: str) -> dict[str, Call]:
    loss = LOSSES[name]
    x, *target = loss.make_inputs(SHAPE, DTYPES["f32"], device)
    x.requires_grad_()
    return {
        "fused": lambda: torch.autograd.grad(loss.fused(x, *target), x),
        "eager": lambda: torch.autograd.grad(loss.eager(x, *target), x),
    }
