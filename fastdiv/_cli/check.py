"""Every loss against the reference in float64, on this machine: ``python -m fastdiv check``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import fastdiv

from .. import reference
from .._engine import backend
from .check_cases import CheckedLoss, Combination, combinations, make_inputs
from .console import Cell, print_table, progress

# A sum of rounded terms is off by a few dozen roundings of its size at most, and by a few of 1
# where it cancels: probabilities are fractions of 1.  In float32 these are 1.2e-5 and 9.5e-7.
RELATIVE, ABSOLUTE = 100, 8
TOLERANCE = """\
Errors are in units of the tolerance: 100 ulp of the value, or of the row's largest gradient, plus
8 ulp of 1, in the dtype of the loss (float32 for half logits). Half gradients are rounded besides.\
"""


@dataclass(frozen=True)
class Place:
    """Where a loss is computed: on a device, on a CPU with one of its instruction sets."""

    name: str
    device: str = "cpu"
    isa: str | None = None


@dataclass(frozen=True)
class Outcome:
    """Worst errors of a combination at a place, in units of the tolerance."""

    combination: Combination
    place: Place
    value_error: float = math.inf
    gradient_error: float = math.inf
    exception: str = ""

    @property
    def passed(self) -> bool:
        return self.value_error <= 1 and self.gradient_error <= 1


def places() -> list[Place]:
    """Every instruction set and GPU that has kernels here; the reference where nothing has."""
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
    """Values of the rows, and gradients of a weighted sum of them by all that is floating."""
    x = x.detach().requires_grad_()
    leaves = [x]
    if t is not None and t.is_floating_point():
        t = t.detach().requires_grad_()
        leaves.append(t)
    value = loss.rows(x, t)
    upstream = torch.linspace(0.5, 1.5, value.numel()).to(value)  # no row's is the default of 1
    gradients = torch.autograd.grad(value, leaves, upstream.reshape(value.shape))
    return value.detach(), gradients


@dataclass(frozen=True)
class Truth:
    """What a tensor should hold, and how far off its entries may be."""

    exact: Tensor
    tolerance: Tensor
    rounding: Tensor | float = 0.0  # does not count as error

    @classmethod
    def of_values(cls, exact: Tensor, dtype: torch.dtype) -> Truth:
        """Of the losses of rows of logits of this dtype."""
        unit = torch.finfo(reference.value_dtype(dtype)).eps
        return cls(exact, unit * (RELATIVE * exact.abs() + ABSOLUTE))

    @classmethod
    def of_gradient(cls, exact: Tensor, dtype: torch.dtype) -> Truth:
        """Of a gradient of this dtype; every row has a tolerance of its own."""
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
        """Worst error in units of the tolerance; the same infinity or NaN is no error."""
        value = value.to("cpu", torch.float64)
        same = (value == self.exact) | (value.isnan() & self.exact.isnan())
        error = ((value - self.exact).abs() - self.rounding).clamp_min(0.0) / self.tolerance
        worst = float(error.masked_fill(same, 0.0).max())
        return math.inf if math.isnan(worst) else worst


def try_everywhere(combination: Combination, where: Sequence[Place]) -> Iterator[Outcome]:
    """One outcome for every place."""
    x, t = make_inputs(combination)
    with fastdiv.backend("reference"):
        exact_t = t.double() if t is not None and t.is_floating_point() else t
        value, gradients = values_and_gradients(combination.loss, x.double(), exact_t)
    value_truth = Truth.of_values(value, x.dtype)
    gradient_truths = [Truth.of_gradient(gradient, x.dtype) for gradient in gradients]
    for place in where:
        try:
            value, gradients = _computed_at(place, combination.loss, x, t)
        except Exception as error:  # whatever a broken build throws is a finding
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
        raise RuntimeError(f"the instruction set {place.isa} is not there")
    try:
        with fastdiv.backend("native"):
            t = None if t is None else t.to(place.device)
            return values_and_gradients(loss, x.to(place.device), t)
    finally:
        native.set_cpu_isa(before)


def check(names: Sequence[str] = (), quick: bool = False, verbose: bool = False) -> bool:
    """Prints the table, and returns whether every kernel agrees with the reference."""
    where = places()
    tried = combinations(names, quick)
    outcomes: list[Outcome] = []
    with progress("check", len(tried)) as advance:
        for combination in tried:
            outcomes += try_everywhere(combination, where)
            advance(str(combination))
    _print_outcomes(outcomes, where, verbose)
    failed = sum(not outcome.passed for outcome in outcomes)
    if backend._C is None:
        print(f"The kernels are missing, only the reference was checked: {backend.load_error}")
    print(f"{len(outcomes) - failed} passed, {failed} failed")
    return not failed and backend._C is not None


def _print_outcomes(outcomes: Sequence[Outcome], where: Sequence[Place], verbose: bool) -> None:
    groups: dict[tuple[str, ...], list[Outcome]] = {}
    for outcome in outcomes:
        c = outcome.combination
        key: tuple[str, ...] = (c.loss.name, c.loss.target)
        if verbose:
            key += (c.dtype_name, "×".join(map(str, c.shape)))
        groups.setdefault(key, []).append(outcome)
    names = ["loss", "target", *(["dtype", "shape"] if verbose else [])]
    print_table(
        f"fastdiv {fastdiv.__version__} and its reference in float64",
        [*names, "worst\nvalue error", "worst\ngradient error", *(place.name for place in where)],
        [[*key, *_summary(group, where)] for key, group in groups.items()],
        names=len(names),
        caption=TOLERANCE,
    )
    for message in sorted({f"{o.combination}: {o.exception}" for o in outcomes if o.exception}):
        print(message)


def _summary(group: Sequence[Outcome], where: Sequence[Place]) -> list[Cell]:
    worst = [max(o.value_error for o in group), max(o.gradient_error for o in group)]
    cells = [Cell(f"{error:.2f}", "" if error <= 1 else "red") for error in worst]
    for place in where:
        failed = sum(o.place == place and not o.passed for o in group)
        cells.append(Cell(f"{failed} FAILED", "bold red") if failed else Cell("ok", "green"))
    return cells
