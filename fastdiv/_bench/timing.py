"""Times of several calls next to each other: a machine that slows down slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch

Call = Callable[[], object]
Clock = Callable[[Call, int], float]  # seconds of one of so many calls
Key = TypeVar("Key", bound=Hashable)


class After(NamedTuple):
    """A call that takes what another one returned, of which only the second is timed."""

    first: Call
    then: Callable[[Any], object]


@dataclass(frozen=True)
class Budget:
    """How long to measure: at least ``min_rounds``, then until the time is up."""

    seconds: float
    min_rounds: int
    max_rounds: int = 50


@dataclass(frozen=True)
class Timing:
    """Seconds of one call over all rounds."""

    median: float
    lower_quartile: float
    upper_quartile: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Sums up single measurements."""
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1)
        lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, lower, upper, len(seconds))

    @property
    def spread(self) -> float:
        """Half of the interquartile range."""
        return (self.upper_quartile - self.lower_quartile) / 2

    def in_milliseconds(self) -> dict[str, float]:
        """For the JSON file."""
        values = {k: float(f"{v * 1e3:.6g}") for k, v in asdict(self).items() if k != "rounds"}
        return {**values, "rounds": self.rounds}

    @classmethod
    def from_milliseconds(cls, written: Mapping[str, float]) -> Timing:
        """From the JSON file."""
        seconds = {k: v * 1e-3 for k, v in written.items() if k != "rounds"}
        return cls(**seconds, rounds=int(written["rounds"]))


def interleave(
    calls: Mapping[Key, Call | After],
    before_each: Call,
    budget: Budget,
    repeats: int = 1,
    clock: Clock | None = None,
) -> dict[Key, Timing]:
    """Runs every call once in each round, and returns the medians of the rounds.

    Every round begins with another call, so that nobody always follows the same neighbour.
    ``before_each`` is not timed; it brings every call into the same state of memory and caches.
    What a call returns is freed after its clock stopped.  Times are of one of ``repeats`` calls.
    """
    clock = clock or host_seconds
    order = list(calls)
    seconds: dict[Key, list[float]] = {name: [] for name in calls}
    for name in order:  # warm up
        before_each()
        _prepared(calls[name])()
    start = time.perf_counter()
    for number in range(budget.max_rounds):
        if number >= budget.min_rounds and time.perf_counter() - start > budget.seconds:
            break
        for name in order:
            before_each()
            seconds[name].append(clock(_prepared(calls[name]), repeats))
        order.append(order.pop(0))
    return {name: Timing.of(values) for name, values in seconds.items()}


def _prepared(call: Call | After) -> Call:
    return partial(call.then, call.first()) if isinstance(call, After) else call


def host_seconds(call: Call, repeats: int, settle: Call = lambda: None) -> float:
    """By the clock of the host; ``settle`` waits for what the calls have begun."""
    start = time.perf_counter()
    for _ in range(repeats - 1):
        call()
    result = call()
    settle()
    elapsed = (time.perf_counter() - start) / repeats
    del result
    return elapsed


class GpuClock:
    """By events on the stream of the GPU.

    Before the first event the cache is filled with something else, and the GPU is kept waiting
    while the host queues up the call, so that the time the host takes does not count.
    """

    WAIT = 2_000_000  # cycles, a millisecond

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties().L2_cache_size
        self.something_else = torch.zeros(4 * cache, dtype=torch.uint8, device="cuda")
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call: Call, repeats: int) -> float:
        """Seconds of one of so many calls."""
        self.something_else.max()  # read, so that nothing is left to be written back
        torch.cuda._sleep(self.WAIT)
        self.begin.record()
        for _ in range(repeats - 1):
            call()
        result = call()
        self.end.record()
        self.end.synchronize()
        del result
        return 1e-3 * self.begin.elapsed_time(self.end) / repeats
