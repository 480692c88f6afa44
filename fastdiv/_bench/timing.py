"""Interleaved timing of several calls: a machine that slows down slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch

Advance = Callable[[str], None]  # reports that a step of a part is done, and which
Call = Callable[[], object]
Clock = Callable[[Call, int], float]  # returns the seconds of one of so many calls
Key = TypeVar("Key", bound=Hashable)


class After(NamedTuple):
    """A call with the result of another one as its argument; only the second one is timed."""

    first: Call
    then: Callable[[Any], object]


class Budget(NamedTuple):
    """The time of a measurement: at least ``min_rounds``, then more until the time is up."""

    seconds: float
    min_rounds: int
    max_rounds: int = 50


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call over all rounds, with six digits."""

    median: float
    lower_quartile: float
    upper_quartile: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Summarise single measurements."""
        enough = seconds if len(seconds) > 1 else 2 * seconds
        quartiles = statistics.quantiles(enough, n=4, method="inclusive")
        lower, median, upper = (float(f"{1e3 * quartile:.6g}") for quartile in quartiles)
        return cls(median, lower, upper, len(seconds))

    @property
    def spread(self) -> float:
        """Return half of the interquartile range."""
        return (self.upper_quartile - self.lower_quartile) / 2


def interleave(
    calls: Mapping[Key, Call | After],
    before_each: Call,
    budget: Budget,
    repeats: int = 1,
    clock: Clock | None = None,
) -> dict[Key, Timing]:
    """Run every call once per round, and summarise the rounds.

    Each round begins with another call, so that neighbours change.  ``before_each`` is not timed;
    it brings memory and caches into the same state before each call.  The result of a call is freed
    after the clock has stopped.  Times are of one of ``repeats`` calls.
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
    """Time calls by the clock of the host; ``settle`` waits for the work that they began."""
    start = time.perf_counter()
    for _ in range(repeats - 1):
        call()
    result = call()
    settle()
    elapsed = (time.perf_counter() - start) / repeats
    del result
    return elapsed


class GpuClock:
    """A clock of events on the stream of the GPU.

    Before the first event the cache is filled with other data.  The GPU also waits while the host
    queues the call, so that the host's time does not count.
    """

    WAIT = 2_000_000  # cycles, a millisecond

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties().L2_cache_size
        self.other_data = torch.zeros(4 * cache, dtype=torch.uint8, device="cuda")
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call: Call, repeats: int) -> float:
        """Return the seconds of one of so many calls."""
        self.other_data.max()  # only read, so that no dirty line is left to write back
        torch.cuda._sleep(self.WAIT)
        self.begin.record()
        for _ in range(repeats - 1):
            call()
        result = call()
        self.end.record()
        self.end.synchronize()
        del result
        return 1e-3 * self.begin.elapsed_time(self.end) / repeats


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
