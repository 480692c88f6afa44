"""Skewed KL, alpha and Rényi divergences, total variation, Hellinger: limits, identities, edges.

What all divergences have in common is tested through the table of cases.
"""

from __future__ import annotations

import math
from decimal import Context, Decimal, localcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial import distance
from torch import Tensor

import fastdiv
from helpers.cases import TARGET_TYPES, as_type, make_inputs
from helpers.values import same, value_and_gradients

INF, NAN = torch.inf, torch.nan
NEW = [
    ("skew_kl_div", {}),
    ("skew_kl_div", {"skew": 0.5, "reverse": True}),
    ("alpha_div", {"alpha": -0.5}),
    ("alpha_div", {"alpha": 0.3}),
    ("alpha_div", {"alpha": 2.0}),
    ("renyi_div", {"alpha": 0.5}),
    ("renyi_div", {"alpha": 2.0}),
    ("tv_distance", {}),
    ("hellinger_distance", {}),
]
EVERY = pytest.mark.parametrize(("name", "options"), NEW, ids=str)


def rows(name: str, x: Tensor, t: Tensor, kind: str = "logits", **options: Any) -> Tensor:
    return getattr(fastdiv, name)(x, t, target_type=kind, reduction="none", **options)


inputs = partial(make_inputs, (6, 40), torch.float64, scale=1.0)


# --- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [-1e-4, 1e-4, 1 - 1e-4, 1 + 1e-4, -3.0, 0.5, 4.0])
def test_digits_next_to_the_limits(alpha: float, backend: str) -> None:
    """Against 50 digits."""
    x, t = inputs()
    names = ["alpha_div", "renyi_div"] if alpha > 0 else ["alpha_div"]
    values = torch.stack([rows(name, x, t, alpha=alpha) for name in names], -1).tolist()
    for logits, of_row in zip(zip(x.tolist(), t.tolist(), strict=True), values, strict=True):
        with localcontext(Context(prec=50)):
            a = Decimal(alpha)
            masses = [[Decimal(v).exp() for v in side] for side in logits]
            lq, lp = ([(v / sum(side)).ln() for v in side] for side in masses)
            powers = sum((a * v + (1 - a) * u).exp() for u, v in zip(lq, lp, strict=True))
            right = [float((powers - 1) / (a * (a - 1))), float(powers.ln() / (a - 1))]
        np.testing.assert_allclose(of_row, right[: len(of_row)], rtol=1e-9)


@pytest.mark.parametrize("kind", TARGET_TYPES)
@pytest.mark.parametrize(
    ("name", "limit", "options", "near"),
    [
        ("alpha_div", "kl_div", {"alpha": 1}, {"alpha": 1 - 1e-6}),
        ("alpha_div", "kl_div", {"alpha": 1}, {"alpha": 1 + 1e-6}),
        ("alpha_div", "reverse_kl_div", {"alpha": 0}, {"alpha": 1e-6}),
        ("alpha_div", "reverse_kl_div", {"alpha": 0}, {"alpha": -1e-6}),
        ("renyi_div", "kl_div", {"alpha": 1}, {"alpha": 1 - 1e-6}),
        ("renyi_div", "kl_div", {"alpha": 1}, {"alpha": 1 + 1e-6}),
        ("skew_kl_div", "kl_div", {"skew": 0}, {"skew": 1e-7}),
        ("skew_kl_div", "reverse_kl_div", {"skew": 0, "reverse": True}, {"skew": 1e-7}),
    ],
)
def test_limits(
    name: str, limit: str, options: dict[str, Any], near: dict[str, Any], kind: str, backend: str
) -> None:
    """At the limit the very bits of the other divergence, next to it about its values."""
    x, logits = inputs()
    t = as_type(logits, kind)
    expected = value_and_gradients(lambda x, t: rows(limit, x, t, kind), x, t)
    at = value_and_gradients(lambda x, t: rows(name, x, t, kind, **options), x, t)
    assert all(a.equal(b) for a, b in zip(at, expected, strict=True))
    by = value_and_gradients(lambda x, t: rows(name, x, t, kind, **{**options, **near}), x, t)
    # The formula's slope along p itself, which logits do not see, has no limit at alpha = 1.
    sides = 3 if kind == "logits" or limit == "reverse_kl_div" or name == "skew_kl_div" else 2
    for a, b in zip(by[:sides], expected[:sides], strict=True):
        same(a, b, 3e-5)


def test_js_jumps_at_the_ends_of_beta(backend: str) -> None:
    x, t = inputs()
    for beta, end in ((1e-9, 0.0), (1 - 1e-9, 1.0)):
        assert (rows("js_div", x, t, beta=beta) < 1e-6).all()
        assert (rows("js_div", x, t, beta=end) > 0.1).all()


@pytest.mark.parametrize("kind", TARGET_TYPES)
@pytest.mark.parametrize("reverse", [False, True])
def test_all_skew_is_zero(kind: str, reverse: bool, backend: str) -> None:
    x, t = inputs(scale=5.0)
    x[0, 1] = t[0, 2] = x[0, 3] = t[0, 3] = -INF
    all_skew = partial(rows, "skew_kl_div", kind=kind, skew=1, reverse=reverse)
    assert all((result == 0).all() for result in value_and_gradients(all_skew, x, as_type(t, kind)))


# --- identities -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TARGET_TYPES)
def test_identities(kind: str, backend: str) -> None:
    x, logits = inputs(scale=2.0)
    t = as_type(logits, kind)
    of = partial(rows, x=x, t=t, kind=kind)
    close = partial(same, tolerance=1e-12)
    hellinger, tv, kl = of("hellinger_distance"), of("tv_distance"), of("kl_div")
    close(of("alpha_div", alpha=0.5), 4 * hellinger)
    close(of("renyi_div", alpha=0.5), -2 * (1 - hellinger).log())
    for alpha in (0.2, 0.9, 1.5, 3.0):
        powers = 1 + alpha * (alpha - 1) * of("alpha_div", alpha=alpha)
        close(of("renyi_div", alpha=alpha), powers.log() / (alpha - 1))
        # The other side's view of the same classes.
        turned = rows("alpha_div", logits, x, "logits", alpha=1 - alpha)
        close(of("alpha_div", alpha=alpha), turned)
    for beta in (0.1, 0.5, 0.8):
        student = of("skew_kl_div", skew=1 - beta, reverse=True)
        close(of("js_div", beta=beta), beta * of("skew_kl_div", skew=beta) + (1 - beta) * student)
    close(tv, rows("tv_distance", logits, x))
    close(hellinger, rows("hellinger_distance", logits, x))
    # Pinsker, Le Cam, Bretagnolle and Huber; Rényi's grows with alpha.
    assert (tv <= (kl / 2).sqrt()).all() and (tv <= (1 - (-kl).exp()).sqrt()).all()
    assert (hellinger <= tv).all() and (tv <= (hellinger * (2 - hellinger)).sqrt()).all()
    growing = torch.stack([of("renyi_div", alpha=a) for a in (0.1, 0.5, 1, 2, 9)])
    assert (growing.diff(dim=0) > 0).all()


@pytest.mark.parametrize("kind", TARGET_TYPES)
def test_values_of_scipy(kind: str, backend: str) -> None:
    x, logits = inputs()
    q, p = (v.softmax(-1).cpu().numpy() for v in (x, logits))
    t = as_type(logits, kind)
    for alpha in (-1.0, -0.5, 0.5, 2.0, 5 / 3):  # Neyman, -, Freeman-Tukey, Pearson, Cressie-Read
        power = stats.power_divergence(p, q, axis=-1, lambda_=alpha - 1).statistic
        np.testing.assert_allclose(2 * rows("alpha_div", x, t, kind, alpha=alpha).cpu(), power)
    tv = [distance.cityblock(*sides) / 2 for sides in zip(q, p, strict=True)]
    np.testing.assert_allclose(rows("tv_distance", x, t, kind).cpu(), tv)
    squared = [distance.sqeuclidean(*sides) / 2 for sides in zip(q**0.5, p**0.5, strict=True)]
    np.testing.assert_allclose(rows("hellinger_distance", x, t, kind).cpu(), squared)


def test_probabilities_that_do_not_add_up_to_one(backend: str) -> None:
    x, logits = inputs()
    q, p = x.softmax(-1), 1.7 * logits.softmax(-1)
    of = partial(rows, x=x, t=p, kind="probs")
    for alpha in (-0.5, 0.3, 1.001, 2.0):
        powers = (p**alpha * q ** (1 - alpha)).sum(-1)
        same(of("alpha_div", alpha=alpha), (powers - 1) / (alpha * (alpha - 1)), 1e-9)
        if alpha > 0:
            same(of("renyi_div", alpha=alpha), powers.log() / (alpha - 1), 1e-9)
    same(of("tv_distance"), (p - q).abs().sum(-1) / 2, 1e-12)
    same(of("hellinger_distance"), ((p.sqrt() - q.sqrt()) ** 2).sum(-1) / 2, 1e-12)
    same(of("skew_kl_div"), (p * (p / (0.1 * p + 0.9 * q)).log()).sum(-1), 1e-12)


# --- edges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TARGET_TYPES)
@pytest.mark.parametrize("alone", ["teacher", "student", "both"])
@pytest.mark.parametrize(
    ("name", "alpha"),
    [*(("alpha_div", a) for a in (-0.5, 0.3, 2.0)), *(("renyi_div", a) for a in (0.3, 2.0))],
)
def test_an_infinite_power_is_a_constant(
    name: str, alpha: float, alone: str, kind: str, backend: str
) -> None:
    x, logits = inputs()
    x[:, 7] = logits[:, 7] = -INF
    if alone in ("teacher", "both"):
        x[:, 2] = -INF
    if alone in ("student", "both"):
        logits[:, 5] = -INF
    shared = x[0].isfinite() & logits[0].isfinite()

    def finite(x: Tensor, t: Tensor) -> Tensor:
        log_p = {"logits": partial(torch.log_softmax, dim=-1), "log_probs": lambda t: t}
        lp = t[:, shared].log() if kind == "probs" else log_p[kind](t)[:, shared]
        total = (alpha * lp + (1 - alpha) * x.log_softmax(-1)[:, shared]).exp().sum(-1)
        if name == "renyi_div":
            return total.log() / (alpha - 1)
        return (total - 1) / (alpha * (alpha - 1))

    t = as_type(logits, kind)
    value, *expected = value_and_gradients(finite, x, t)
    if (alpha > 1 and alone != "student") or (alpha < 0 and alone != "teacher"):
        value = torch.full_like(value, INF)
    actual = value_and_gradients(lambda x, t: rows(name, x, t, kind, alpha=alpha), x, t)
    for got, want in zip(actual, (value, *expected), strict=True):
        same(got, want, 1e-10)


@pytest.mark.parametrize("kind", TARGET_TYPES)
@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("skew_kl_div", {"skew": 0.5}, math.log(2)),
        ("skew_kl_div", {"skew": 0.1, "reverse": True}, math.log(10)),
        ("alpha_div", {"alpha": 0.2}, 1 / 0.16),
        ("alpha_div", {"alpha": 2}, INF),
        ("alpha_div", {"alpha": -1}, INF),
        ("renyi_div", {"alpha": 0.2}, INF),
        ("renyi_div", {"alpha": 2}, INF),
        ("tv_distance", {}, 1),
        ("hellinger_distance", {}, 1),
    ],
)
def test_nothing_shared(
    name: str, options: dict[str, Any], expected: float, kind: str, backend: str
) -> None:
    """Neither side sees the other, so there is nothing to be gained by moving a little."""
    x = torch.tensor([[0.0, -INF, 1.0, -INF, -INF]])
    t = as_type(torch.tensor([[-INF, 3.0, -INF, 0.0, -INF]]), kind)
    value, dx, dt = value_and_gradients(lambda x, t: rows(name, x, t, kind, **options), x, t)
    same(value, torch.tensor([expected]))
    same(dx, torch.zeros_like(dx))
    assert dt.isfinite().all()
    if kind == "logits" or "alpha" in options:
        same(dt, torch.zeros_like(dt))


@EVERY
def test_equal_classes(name: str, options: dict[str, Any], backend: str) -> None:
    """Total variation has a kink at p = q: no slope there, nor anywhere else for equal rows."""
    x, _ = inputs(scale=3.0)
    for result in value_and_gradients(lambda x, t: rows(name, x, t, **options), x, x.clone()):
        same(result, torch.zeros_like(result), 1e-14)
    if name == "tv_distance":
        q = torch.tensor([[0.5, 0.25, 0.25]])
        p = torch.tensor([[0.5, 0.125, 0.375]])
        _, dx, dp = value_and_gradients(lambda x, t: rows(name, x, t, "probs"), q.log(), p)
        same(dx, q / 2 * torch.tensor([0.0, 1, -1]))
        assert dp.tolist() == [[0, -0.5, 0.5]]


@pytest.mark.parametrize("alpha", [0.5, 2.0, 7.0])
def test_renyi_does_not_overflow(alpha: float, backend: str) -> None:
    x = torch.tensor([[200.0, -200, 0, 3], [-200, 200, 200, 0], [200, 199, -200, -200]])
    t = torch.tensor([[-200.0, 200, 1, 3], [200, 200, -200, 0], [199, 200, 200, -200]])
    actual = value_and_gradients(partial(rows, "renyi_div", alpha=alpha), x, t)
    with fastdiv.backend("reference"):
        exact = value_and_gradients(
            lambda x, t: rows("renyi_div", x, t, alpha=alpha), x.double(), t.double()
        )
    for got, want in zip(actual, exact, strict=True):
        assert got.isfinite().all()
        same(got, want.float(), 3e-6)


@EVERY
def test_next_to_zero(name: str, options: dict[str, Any]) -> None:
    """KL about 1e-7, from logits near 50, whose differences in float32 have two digits."""
    x, noise = make_inputs((4, 5000), torch.float32, scale=1.0)
    x = x + 50
    t = x + 4e-4 * noise
    function = partial(rows, name, **options)
    with fastdiv.backend("reference"):
        truth = value_and_gradients(function, x.double(), t.double())
    results = zip(value_and_gradients(function, x, t), truth, strict=True)
    for got, want in list(results)[: 1 if name == "tv_distance" else 3]:  # whose slope is a sign
        error, size = (v.reshape(len(x), -1).norm(dim=-1) for v in (got - want, want))
        assert (error <= 1e-5 * size).all()


def test_bad_options() -> None:
    x, t = inputs()
    for name, options, says in (
        ("skew_kl_div", {"skew": -0.1}, "skew must be between 0 and 1, got -0.1"),
        ("skew_kl_div", {"skew": NAN}, "skew must be between 0 and 1, got nan"),
        ("alpha_div", {"alpha": INF}, "alpha must be finite, got inf"),
        ("alpha_div", {"alpha": NAN}, "alpha must be finite, got nan"),
        ("renyi_div", {"alpha": 0.0}, "alpha must be a positive finite number, got 0.0"),
        ("renyi_div", {"alpha": INF}, "alpha must be a positive finite number, got inf"),
    ):
        with pytest.raises(ValueError, match=says):
            rows(name, x, t, **options)
    for alpha in (0.5, 1.0):
        with pytest.raises(ValueError, match="'pointwise': renyi_div is not a sum"):
            fastdiv.renyi_div(x, t, target_type="logits", alpha=alpha, reduction="pointwise")
    with pytest.raises(TypeError, match="temprature"):
        fastdiv.nn.AlphaDivLoss(target_type="logits", alpha=2, temprature=2.0)
