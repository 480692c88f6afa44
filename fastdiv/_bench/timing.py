"""Times of several calls next to each other: a machine that slows down slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

Call = Callable[[], object]


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
        values = {k: round(v * 1e3, 5) for k, v in asdict(self).items() if k != "rounds"}
        return {**values, "rounds": self.rounds}


def interleave(
    calls: Mapping[str, Call], before_each: Call, budget: Budget, repeats: int = 1
) -> dict[str, Timing]:
    """Runs every call once in each round, and returns the medians of the rounds.

    Every round begins with another call, so that nobody always follows the same neighbour.
    ``before_each`` is not timed; it brings every call into the same state of memory and caches.
    What a call returns is freed after its clock stopped.  Times are of one of ``repeats`` calls.
    """
    order = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for name in order:  # warm up
        before_each()
        calls[name]()
    start = time.perf_counter()
    for number in range(budget.max_rounds):
        if number >= budget.min_rounds and time.perf_counter() - start > budget.seconds:
            break
        for name in order:
            before_each()
            seconds[name].append(_time(calls[name], repeats))
        order.append(order.pop(0))
    return {name: Timing.of(values) for name, values in seconds.items()}


def _time(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats - 1):
        call()
    result = call()
    elapsed = (time.perf_counter() - start) / repeats
    del result
    return elapsed
