"""The comparison of every loss with the reference in float64: ``python -m fastdiv check``."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import fastdiv

from .. import reference
from .._engine import backend
from .check_cases import CheckedLoss, Combination, combinations, make_inputs

# The error of a sum of rounded terms is at most a few dozen roundings of its size.  Where the sum
# cancels, a few roundings of 1 come on top, since probabilities are at most 1.  In float32 the two
# bounds are 1.2e-5 and 9.5e-7.
RELATIVE, ABSOLUTE = 100, 8
TOLERANCE = """\
Errors are in units of the tolerance: 100 ulp of the value, or of the row's largest gradient, plus
8 ulp of 1, in the dtype of the loss (float32 for half-precision logits). The rounding of
half-precision gradients does not count.\
"""


@dataclass(frozen=True)
class Place:
    """A place that computes losses: a device, or a CPU with one of its instruction sets."""

    name: str
    device: str = "cpu"
    isa: str | None = None


@dataclass(frozen=True)
class Outcome:
    """The worst errors of a combination at a place, in units of the tolerance."""

    combination: Combination
    place: Place
    value_error: float = math.inf
    gradient_error: float = math.inf
    exception: str = ""

    @property
    def passed(self) -> bool:
        return self.value_error <= 1 and self.gradient_error <= 1


def places() -> list[Place]:
    """Return all instruction sets and GPUs with kernels here; the reference if there are none."""
    native = backend._C
    if native is None:
        return [Place("reference")]
    found = [Place(isa, isa=isa) for isa in native.cpu_isas()]
    if fastdiv.build_info().get("cuda") and torch.cuda.is_available():
        found.append(Place("cuda", device="cuda"))
    return found


def values_and_gradients(
    loss: CheckedLoss, x: Tensor, t: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the rows of a loss, and gradients of their weighted sum by all floating tensors."""
    x = x.detach().requires_grad_()
    leaves = [x]
    if t is not None and t.is_floating_point():
        t = t.detach().requires_grad_()
        leaves.append(t)
    value = loss.rows(x, t)
    upstream = torch.linspace(0.5, 1.5, value.numel()).to(value)  # none of them is 1, the default
    gradients = torch.autograd.grad(value, leaves, upstream.reshape(value.shape))
    return value.detach(), gradients


@dataclass(frozen=True)
class Truth:
    """The exact entries of a tensor, and their tolerances."""

    exact: Tensor
    tolerance: Tensor
    rounding: Tensor | float = 0.0  # which does not count as error

    @classmethod
    def of_values(cls, exact: Tensor, dtype: torch.dtype) -> Truth:
        """Return the truth of row losses for logits of this dtype."""
        unit = torch.finfo(reference.value_dtype(dtype)).eps
        return cls(exact, unit * (RELATIVE * exact.abs() + ABSOLUTE))

    @classmethod
    def of_gradient(cls, exact: Tensor, dtype: torch.dtype) -> Truth:
        """Return the truth of a gradient of this dtype, with a tolerance for each row."""
        rounded = exact.to(dtype).double()  # may be infinite where the truth is not
        exact = exact.where(rounded.isfinite(), rounded)
        largest = exact.where(rounded.isfinite(), 0.0).abs().amax(-1, keepdim=True)
        unit = torch.finfo(reference.value_dtype(dtype)).eps
        tolerance = unit * (RELATIVE * largest + ABSOLUTE)
        if dtype not in (torch.float16, torch.bfloat16):
            return cls(exact, tolerance)
        half = torch.finfo(dtype)
        return cls(exact, tolerance, half.eps / 2 * exact.abs().clamp_min(half.smallest_normal))

    def error_of(self, value: Tensor) -> float:
        """Return the worst error in units of the tolerance; equal infinities and NaN count 0."""
        value = value.to("cpu", torch.float64)
        same = (value == self.exact) | (value.isnan() & self.exact.isnan())
        error = ((value - self.exact).abs() - self.rounding).clamp_min(0.0) / self.tolerance
        worst = float(error.masked_fill(same, 0.0).max())
        return math.inf if math.isnan(worst) else worst


def try_everywhere(combination: Combination, where: Sequence[Place]) -> Iterator[Outcome]:
    """Yield an outcome for each place."""
    x, t = make_inputs(combination)
    with fastdiv.backend("reference"):
        exact_t = t.double() if t is not None and t.is_floating_point() else t
        value, gradients = values_and_gradients(combination.loss, x.double(), exact_t)
    value_truth = Truth.of_values(value, x.dtype)
    gradient_truths = [Truth.of_gradient(gradient, x.dtype) for gradient in gradients]
    for place in where:
        try:
            value, gradients = _computed_at(place, combination.loss, x, t)
        except Exception as error:  # any exception is a finding
            yield Outcome(combination, place, exception=f"{type(error).__name__}: {error}")
            continue
        pairs = zip(gradient_truths, gradients, strict=True)
        yield Outcome(
            combination,
            place,
            value_truth.error_of(value),
            max(truth.error_of(gradient) for truth, gradient in pairs),
        )


def _computed_at(
    place: Place, loss: CheckedLoss, x: Tensor, t: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    native = backend._C
    if native is None:
        return values_and_gradients(loss, x, t)
    before = native.cpu_isa()
    if place.isa and not native.set_cpu_isa(place.isa):
        raise RuntimeError(f"the instruction set {place.isa} is not available")
    try:
        with fastdiv.backend("native"):
            t = None if t is None else t.to(place.device)
            return values_and_gradients(loss, x.to(place.device), t)
    finally:
        native.set_cpu_isa(before)


def check(names: Sequence[str] = (), quick: bool = False, verbose: bool = False) -> bool:
    """Print the table, and return whether every kernel agrees with the reference."""
    where = places()
    tried = combinations(names, quick)
    outcomes: list[Outcome] = []
    for done, combination in enumerate(tried):
        _show(f"check {done}/{len(tried)} {combination}")
        outcomes += try_everywhere(combination, where)
    _show("")
    _print_outcomes(outcomes, where, verbose)
    failed = sum(not outcome.passed for outcome in outcomes)
    if backend._C is None:
        print(f"The kernels are missing, only the reference was checked: {backend.load_error}")
    print(f"{len(outcomes) - failed} passed, {failed} failed")
    return not failed and backend._C is not None


def _show(progress: str) -> None:
    """Write over the last line of the terminal, if there is one."""
    if sys.stderr.isatty():
        print(f"\r\033[K{progress}", end="", file=sys.stderr, flush=True)


def _print_outcomes(outcomes: Sequence[Outcome], where: Sequence[Place], verbose: bool) -> None:
    names = ["loss", "target", *(["dtype", "shape"] if verbose else [])]
    groups: dict[tuple[str, ...], list[Outcome]] = {}
    for outcome in outcomes:
        c = outcome.combination
        key = [c.loss.name, c.loss.target, c.dtype_name, "×".join(map(str, c.shape))]
        groups.setdefault(tuple(key[: len(names)]), []).append(outcome)
    lines = [[*names, "value error", "gradient error", *(place.name for place in where)]]
    for group_key, group in groups.items():
        worst = max(o.value_error for o in group), max(o.gradient_error for o in group)
        failed = [sum(o.place == place and not o.passed for o in group) for place in where]
        verdicts = (f"{count} FAILED" if count else "ok" for count in failed)
        lines.append([*group_key, *(f"{error:.2f}" for error in worst), *verdicts])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"fastdiv {fastdiv.__version__} and its reference in float64")
    for line in lines:
        print("  ".join(map(str.ljust, line, widths)).rstrip())
    print(TOLERANCE)
    for message in sorted({f"{o.combination}: {o.exception}" for o in outcomes if o.exception}):
        print(message)
