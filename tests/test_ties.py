"""Derivatives where two sides agree exactly: they must not hang on torch's convention for a tie.

The truth is textbook formulas in float64 without ``clamp``, ``abs``, ``max`` or ``min``.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiv
from helpers.cases import DIVERGENCES, LOSSES, Case, TopKCase, _alpha, _renyi

F64 = torch.float64


def tv_rows(x: Tensor, lp: Tensor) -> Tensor:
    """The slope is 0 where both sides agree, as the kernels define it."""
    difference = lp.exp() - torch.log_softmax(x, -1).exp()
    slope = (difference.detach() > 0).to(F64) - (difference.detach() < 0).to(F64)
    return (slope * difference).sum(-1) / 2


ALPHAS = (-0.5, 0.5, 2.0)
CASES = [
    *[
        Case(name, target, tv_rows if name == "tv_distance" else eager, options)
        for name, eager, options in DIVERGENCES
        if "alpha" not in options
        for target in ("logits", "log_probs", "probs")
    ],
    *[
        Case(name, target, rows(alpha), {"alpha": alpha})
        for name, rows in (("alpha_div", _alpha), ("renyi_div", _renyi))
        for alpha in ALPHAS
        for target in ("logits", "log_probs", "probs")
        if name == "alpha_div" or alpha > 0
    ],
    *[c for c in LOSSES if not c.divergence and not isinstance(c, TopKCase)],
]

# Student and teacher, in whole logits, of which several classes of the second row agree.
A, B = [0.0, 0.0, 2.0, -1.0, 0.5], [3.0, -2.0, 0.0, 0.0, 1.0]
ROWS = {
    "identical": (torch.tensor([A, B], dtype=F64), torch.tensor([A, B], dtype=F64)),
    "some classes": (
        torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]], dtype=F64),
        torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0]], dtype=F64),
    ),
    "one class": (
        torch.tensor([[0.3], [-2.0]], dtype=F64),
        torch.tensor([[1.7], [0.0]], dtype=F64),
    ),
    "uniform": (torch.full((2, 4), 0.5, dtype=F64), torch.zeros(2, 4, dtype=F64)),
}


def derivatives(
    loss: Callable[..., Tensor], inputs: list[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Rows, gradients of their sum, and the whole Hessian."""
    inputs = [v.detach().clone().requires_grad_() for v in inputs]
    value = loss(*inputs)
    first = torch.autograd.grad(value.sum(), inputs, create_graph=True)
    second = [
        d
        for g in first
        for entry in g.flatten()
        if entry.requires_grad
        for d in torch.autograd.grad(
            entry, inputs, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    ]
    return value.detach(), [g.detach() for g in first], second


def agree(ours: Callable[..., Tensor], truth: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    got, expected = derivatives(ours, inputs), derivatives(truth, inputs)
    for name, a, b in zip(("value", "gradient", "Hessian"), got, expected, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


def has_derivatives(case: Case, rows: str) -> bool:
    """Not where rounding in the softmax decides which side is larger, nor without other classes."""
    if case.name == "tv_distance" and case.target != "logits":
        return rows != "identical"
    return case.options.get("smoothing") != "others" or rows != "one class"


@pytest.mark.parametrize(
    ("case", "rows"), [(c, r) for c in CASES for r in ROWS if has_derivatives(c, r)], ids=str
)
def test_every_loss(case: Case, rows: str, backend: str) -> None:
    x, logits = ROWS[rows]
    target = case.make_target(x, logits)
    if target is not None and target.is_floating_point():
        if case.divergence and case.target != "logits" and rows == "identical":
            lq = torch.log_softmax(x, -1)  # to the last bit
            target = lq if case.target == "log_probs" else lq.exp()
        agree(lambda x, t: case.call(x, t, reduction="none"), case.eager_rows, [x, target])
    else:
        options = {} if case.name.startswith("log_prob") else {"reduction": "none"}
        agree(lambda x: case.call(x, target, **options), lambda x: case.eager_rows(x, target), [x])


@pytest.mark.parametrize("alpha", [0.3, 2.0])
@pytest.mark.parametrize("name", ["alpha_div", "renyi_div"])
def test_transforms(name: str, alpha: float, backend: str) -> None:
    x = ROWS["identical"][0]
    rows = {"alpha_div": _alpha, "renyi_div": _renyi}[name](alpha)
    ours = getattr(fastdiv, name)

    def loss(v: Tensor) -> Tensor:
        return ours(v, x, target_type="logits", alpha=alpha, reduction="sum")

    got = torch.func.hessian(loss)(x)
    expected = torch.func.hessian(lambda v: rows(v, torch.log_softmax(x, -1)).sum())(x)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


LINEAR = ["linear_kl_div", "linear_reverse_kl_div", "linear_js_div"]


@pytest.mark.parametrize("name", LINEAR)
def test_linear(name: str, backend: str) -> None:
    """A student that is its teacher."""
    torch.manual_seed(1)
    hidden, weight = torch.randn(3, 4, dtype=F64), torch.randn(6, 4, dtype=F64)
    case = next(c for c in CASES if c.name == name.removeprefix("linear_") and c.target == "logits")

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return getattr(fastdiv, name)(
            x, w, F.linear(hidden, weight), target_type="logits", reduction="sum", **case.options
        )

    def truth(x: Tensor, w: Tensor) -> Tensor:
        return case.eager_rows(F.linear(x, w), F.linear(hidden, weight)).sum()

    agree(ours, truth, [hidden, weight])


# --- functions of probabilities ---------------------------------------------------------------


STATS = {"entropy": 1.0, "kl_div": 1.0, "js_div": 0.25}  # the slope of the slope


@pytest.mark.parametrize("name", [*STATS, "jensenshannon"])
@pytest.mark.parametrize("v", [[0.1, 0.2, 0.7], [0.25] * 4, [3.0]], ids=str)
def test_functions_of_probabilities(name: str, v: list[float]) -> None:
    """Of a vector and itself; neither adds up to 1 but is normalised."""
    counts = torch.tensor(v, dtype=F64)
    function = getattr(fastdiv.stats, name)
    value, first, second = derivatives(
        lambda p, q: function(p.softmax(0), q.softmax(0)), [counts, counts]
    )
    assert value == 0 and all((g.abs() < 1e-15).all() for g in first)
    if name in STATS:
        p = counts.softmax(0)
        fisher = STATS[name] * (p.diag() - p.outer(p))
        expected = torch.cat([torch.cat([fisher, -fisher], 1), torch.cat([-fisher, fisher], 1)])
        n = len(v)
        got = torch.stack([torch.cat(second[2 * i : 2 * i + 2]) for i in range(2 * n)])
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


# --- a teacher of k classes -------------------------------------------------------------------


INDICES = torch.tensor([[2, 0, 4]])
MASS = {
    "exactly 1": [0.5, 0.25, 0.25],
    "more, by rounding": [0.5, 0.25, 0.25 * (1 + 2**-40)],
    "one class": [1.0, 0.0, 0.0],
}


@pytest.mark.parametrize("missing", ["ignore", "renormalize", "uniform"])
@pytest.mark.parametrize(
    ("mass", "values_type"),
    # The log of a probability of 0 has no derivative.
    [*product(MASS, ["probs"]), *product(list(MASS)[:2], ["log_probs"])],
)
def test_topk_without_a_rest(mass: str, values_type: str, missing: str, backend: str) -> None:
    """A rest of 0 adds nothing, to derivatives either."""
    p = torch.tensor([MASS[mass]], dtype=F64)
    x = torch.tensor([[0.3, -1.0, 2.0, 0.7, -0.2]], dtype=F64)
    values = p if values_type == "probs" else p.log()
    if mass == "exactly 1":
        assert (values if values_type == "probs" else values.exp()).sum() == 1

    def ours(x: Tensor, values: Tensor) -> Tensor:
        return fastdiv.topk_kl_div(
            x, values, INDICES, values_type=values_type, missing=missing, reduction="none"
        )

    def truth(x: Tensor, values: Tensor) -> Tensor:
        p = values if values_type == "probs" else values.exp()
        if missing == "renormalize":
            p = torch.where(p == 0, p.detach(), p)
            p = p / p.sum(-1, keepdim=True)
        some = torch.where(p == 0, 1.0, p)  # a probability of 0 adds nothing
        lq = torch.log_softmax(x, -1).gather(-1, INDICES)
        return torch.where(p == 0, 0.0, p * (some.log() - lq)).sum(-1)

    agree(ours, truth, [x, values])


def test_topk_of_all_classes_that_agree(backend: str) -> None:
    x = torch.tensor([A], dtype=F64)
    indices = torch.arange(5).unsqueeze(0)
    for missing in ("ignore", "renormalize", "uniform"):
        agree(
            lambda x, t, how=missing: fastdiv.topk_kl_div(
                x, t, indices, values_type="logits", missing=how, reduction="none"
            ),
            lambda x, t: (t.softmax(-1) * (t.log_softmax(-1) - x.log_softmax(-1))).sum(-1),
            [x, x],
        )
