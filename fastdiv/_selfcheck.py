"""Every loss against the reference in float64, on this machine: ``python -m fastdiv check``."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import fastdiv

from . import _backend, reference
from ._autograd import row_loss
from ._bench.console import Cell, print_table, progress
from ._check import FLOATS, TARGET_TYPES

RowLoss = Callable[[Tensor, Any], Tensor]  # (logits, target), where there is a target

# Less than a vector; more than a tile; more than a segment; the vocabulary of GPT-2.
SHAPES = ((3, 7), (5, 1021), (2, 8193), (1, 50257))

# A sum of rounded terms is off by a few dozen roundings of its size at most, and by a few of 1
# where it cancels: probabilities are fractions of 1.  In float32 these are 1.2e-5 and 9.5e-7.
RELATIVE, ABSOLUTE = 100, 8
TOLERANCE = """\
Errors are in units of the tolerance: 100 ulp of the value, or of the row's largest gradient, plus
8 ulp of 1, in the dtype of the loss (float32 for half logits). Half gradients are rounded besides.\
"""


@dataclass(frozen=True)
class CheckedLoss:
    """A public function of logits and target that returns a value for every row."""

    name: str
    target: str
    rows: RowLoss


@dataclass(frozen=True)
class Place:
    """Where a loss is computed: on a device, on a CPU with one of its instruction sets."""

    name: str
    device: str = "cpu"
    isa: str | None = None


@dataclass(frozen=True)
class Combination:
    """A loss with inputs it is tried on."""

    loss: CheckedLoss
    dtype: torch.dtype
    shape: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.loss.name} {self.loss.target} {_dtype_name(self.dtype)}"


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


def checked_losses(names: Sequence[str] = ()) -> list[CheckedLoss]:
    """Every public loss with every kind of target; a new divergence is found in the reference."""
    cross_entropy = partial(fastdiv.cross_entropy, reduction="none")
    smoothed = partial(cross_entropy, label_smoothing=0.1, z_loss=1e-3)

    def topk(x: Tensor, t: Tensor, **options: Any) -> Tensor:
        values, indices = t.topk(min(64, t.shape[-1] - 1))
        return fastdiv.topk_kl_div(x, values, indices, reduction="none", **options)

    uniform = partial(topk, values_type="probs", missing="uniform")

    def log_prob_and_entropy(x: Tensor, y: Tensor) -> Tensor:
        return torch.stack(fastdiv.log_prob_and_entropy(x, y))

    losses = [
        CheckedLoss("cross_entropy", "labels", cross_entropy),
        CheckedLoss("cross_entropy", "labels, smoothed", smoothed),
        CheckedLoss("cross_entropy", "probs", cross_entropy),
        CheckedLoss("entropy", "none", lambda x, _: fastdiv.entropy(x)),
        CheckedLoss("log_prob", "labels", fastdiv.log_prob),
        CheckedLoss("log_prob_and_entropy", "labels", log_prob_and_entropy),
        *(
            CheckedLoss(name, target_type, _divergence(name, target_type))
            for name in reference.DIVERGENCES
            for target_type in TARGET_TYPES
        ),
        *(CheckedLoss("topk_kl_div", v, partial(topk, values_type=v)) for v in TARGET_TYPES),
        CheckedLoss("topk_kl_div", "probs, uniform", uniform),
        CheckedLoss("linear_cross_entropy", "labels", _of_layer(fastdiv.linear_cross_entropy)),
        CheckedLoss("linear_cross_entropy", "probs", _of_layer(fastdiv.linear_cross_entropy)),
        CheckedLoss("linear_log_prob_and_entropy", "labels", _of_layer(_linear_policy)),
        *(
            CheckedLoss(
                name,
                target_type,
                _of_layer(partial(getattr(fastdiv, name), target_type=target_type)),
            )
            for name in ("linear_kl_div", "linear_reverse_kl_div", "linear_js_div")
            for target_type in TARGET_TYPES
        ),
    ]
    return [loss for loss in losses if not names or loss.name in names]


def _of_layer(function: Callable[..., Tensor]) -> RowLoss:
    """A linear loss as one of logits: the hidden states are rows of one, the weight is logits."""

    def rows(x: Tensor, t: Tensor) -> Tensor:
        x = x.where(x.isfinite(), -60.0)  # 0 times infinity is no logit
        hidden = torch.eye(x.shape[0], dtype=x.dtype, device=x.device)
        return function(hidden, x.t(), t, reduction="none")

    return rows


def _linear_policy(hidden: Tensor, weight: Tensor, y: Tensor, reduction: str) -> Tensor:
    return torch.stack(fastdiv.linear_log_prob_and_entropy(hidden, weight, y))


def _divergence(name: str, target_type: str) -> RowLoss:
    function = getattr(fastdiv, name, None)
    if function is None:  # reached through an option of another function
        spec = reference.Spec(name, target_type=target_type, shape=0.5)
        return lambda x, t: row_loss(spec, x, t)
    options = {
        p.name: 0.5  # of the alphas, betas and skews, one that is the limit of no other divergence
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.default is p.empty and p.name != "target_type"
    }
    return partial(function, target_type=target_type, reduction="none", **options)


def places() -> list[Place]:
    """Every instruction set and GPU that has kernels here; the reference where nothing has."""
    native = _backend._C
    if native is None:
        return [Place("reference")]
    found = [Place(isa, isa=isa) for isa in native.cpu_isas()]
    if fastdiv.build_info().get("cuda") and torch.cuda.is_available():
        found.append(Place("cuda", device="cuda"))
    return found


@cache
def _logits(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The first rows have classes at -inf on both sides, on one, on the other."""
    generator = torch.Generator().manual_seed(shape[1])
    x, t = torch.randn(2, *shape, generator=generator, dtype=torch.float64) * 3
    x[:1, -3:] = t[:1, -3:] = -torch.inf
    x[1:2, 2] = t[2:3, 4] = -torch.inf
    return x, t


def make_inputs(combination: Combination) -> tuple[Tensor, Tensor | None]:
    """Logits and target."""
    x, t = (v.to(combination.dtype) for v in _logits(combination.shape))
    target = combination.loss.target
    if target == "none":
        return x, None
    if target.startswith("labels"):
        y = t.argmax(-1)
        y[1:2] = 2  # at -inf
        return x, y
    if target == "logits":
        return x, t
    log_p = t.double().log_softmax(-1)
    return x, (log_p if target == "log_probs" else log_p.exp()).to(combination.dtype)


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
    native = _backend._C
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
    combinations = [
        Combination(loss, dtype, shape)
        for loss in checked_losses(names)
        for dtype in FLOATS
        for shape in (SHAPES[:2] if quick else SHAPES)
    ]
    outcomes: list[Outcome] = []
    with progress("check", len(combinations)) as advance:
        for combination in combinations:
            outcomes += try_everywhere(combination, where)
            advance(str(combination))
    _print_outcomes(outcomes, where, verbose)
    failed = sum(not outcome.passed for outcome in outcomes)
    if _backend._C is None:
        print(f"The kernels are missing, only the reference was checked: {_backend.load_error}")
    print(f"{len(outcomes) - failed} passed, {failed} failed")
    return not failed and _backend._C is not None


def _print_outcomes(outcomes: Sequence[Outcome], where: Sequence[Place], verbose: bool) -> None:
    groups: dict[tuple[str, ...], list[Outcome]] = {}
    for outcome in outcomes:
        c = outcome.combination
        key: tuple[str, ...] = (c.loss.name, c.loss.target)
        if verbose:
            key += (_dtype_name(c.dtype), "×".join(map(str, c.shape)))
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


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
