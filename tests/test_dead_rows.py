"""Rows that do not count, rows that are not there, and NaN, which stays in its row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastdiv
from helpers.cases import KERNELS, Case, TopKCase, make_inputs
from helpers.values import same, value_and_gradients

pytestmark = pytest.mark.usefixtures("backend")

INF, NAN = torch.inf, torch.nan
# Those with token weights.
WEIGHTED = [
    case for case in KERNELS if not case.name.startswith("log_prob") and case.target != "none"
]


@pytest.mark.parametrize("junk", [NAN, INF, -INF])
@pytest.mark.parametrize("case", WEIGHTED, ids=str)
def test_rows_that_do_not_count_are_zero_whatever_they_hold(case: Case, junk: float) -> None:
    x, logits = make_inputs((5, 600), torch.float32)
    t = case.make_target(x, logits)
    weight = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.5])
    if case.target == "labels":
        t[3] = -100  # ignored by label as well as by weight
    dead = weight == 0
    expected = value_and_gradients(
        lambda x, t: case.call(x, t, reduction="sum", token_weight=weight[~dead]),
        x[~dead],
        t[~dead],
    )
    x[dead] = junk
    if t.is_floating_point():
        t[dead] = junk
    for reduction, divisor in (("none", 1.0), ("sum", 1.0), ("mean", 3.5), ("batchmean", 5.0)):
        value, *grads = value_and_gradients(
            lambda x, t, r=reduction: case.call(x, t, reduction=r, token_weight=weight), x, t
        )
        if reduction == "none":
            assert (value[dead] == 0).all()
        same(value.sum() * divisor, expected[0], 1e-5)
        for grad, want in zip(grads, expected[1:], strict=True):
            assert (grad[dead] == 0).all()
            same(grad[~dead] * divisor, want)


@pytest.mark.parametrize("smoothed", [0.0, 0.1])
def test_an_ignored_label_is_enough(smoothed: float) -> None:
    x, _ = make_inputs((4, 20), torch.float32)
    y = torch.tensor([3, 255, 0, 255])
    clean = F.cross_entropy(x, y, ignore_index=255, label_smoothing=smoothed)
    x[1], x[3] = NAN, -INF
    value, dx = value_and_gradients(
        lambda x: fastdiv.cross_entropy(x, y, ignore_index=255, label_smoothing=smoothed), x
    )
    same(value, clean)
    assert (dx[[1, 3]] == 0).all() and dx.isfinite().all()


def test_statistics_of_rows_that_do_not_count() -> None:
    """They have them, of the logits; the log-probability of a label that is not looked at is 0."""
    x, _ = make_inputs((4, 20), torch.float32)
    y, weight = torch.tensor([3, -100, 0, 7]), torch.tensor([1.0, 1.0, 0.0, 2.0])
    expected = x.log_softmax(-1)
    for loss in (
        fastdiv.cross_entropy(x, y, token_weight=weight, return_stats=True),
        fastdiv.linear_cross_entropy(x, torch.eye(20), y, token_weight=weight, return_stats=True),
    ):
        stats = loss[1]
        same(stats.log_prob, torch.stack([expected[0, 3], *expected.new_zeros(2), expected[3, 7]]))
        same(stats.lse, x.logsumexp(-1))
    _, stats = fastdiv.cross_entropy(x, x.softmax(-1), token_weight=weight, return_stats=True)
    same(stats.log_prob, -stats.entropy)


@pytest.mark.parametrize("case", WEIGHTED, ids=str)
def test_no_row_counts(case: Case) -> None:
    x, logits = make_inputs((3, 9), torch.float32)
    t = case.make_target(x, logits)
    for reduction in ("mean", "sum", "batchmean", "none"):
        value, *grads = value_and_gradients(
            lambda x, t, r=reduction: case.call(x, t, reduction=r, token_weight=torch.zeros(3)),
            x,
            t,
        )
        assert value.isnan() if reduction == "mean" else (value == 0).all()
        assert all((grad == 0).all() for grad in grads)


def test_every_label_ignored() -> None:
    x, _ = make_inputs((3, 9), torch.float32)
    y = torch.full((3,), -100)
    for weight in (None, torch.rand(9)):
        value, dx = value_and_gradients(lambda x, w=weight: fastdiv.cross_entropy(x, y, w), x)
        assert value.isnan() and (dx == 0).all()


@pytest.mark.parametrize("case", KERNELS, ids=str)
def test_empty_batch(case: Case) -> None:
    x, logits = torch.zeros(0, 7), torch.zeros(0, 7)
    t = case.make_target(x, logits)
    if case.name.startswith("log_prob"):
        value, dx = value_and_gradients(lambda x: case.call(x, t), x)
        assert value.shape[-1] == 0 and dx.shape == (0, 7)
        return
    for reduction in ("none", "sum", "mean", "batchmean"):
        value, *grads = value_and_gradients(
            lambda x, t, r=reduction: case.call(x, t, reduction=r), x, t
        )
        assert all(grad.shape == (0, 7) for grad in grads)
        if reduction == "none":
            assert value.shape == (0,)
        else:  # 0/0 of a mean is NaN, as torch's
            assert value.item() == 0 if reduction == "sum" else value.isnan()


@pytest.mark.parametrize("soft", [False, True])
def test_statistics_of_an_empty_batch(soft: bool) -> None:
    x, w = torch.zeros(0, 7, requires_grad=True), torch.zeros(7, 7)
    y = torch.zeros(0, 7) if soft else torch.zeros(0, dtype=torch.int64)
    for function, tensors in (
        (fastdiv.cross_entropy, (x, y)),
        (fastdiv.linear_cross_entropy, (x, w, y)),
    ):
        value, stats = function(*tensors, return_stats=True, reduction="sum")
        value.backward()
        assert value == 0 and all(s.shape == (0,) for s in stats)


# --- NaN stays in its row ---


def junk_of(case: Case) -> list[str]:
    """What makes a row NaN: a softcap makes infinities finite, of probabilities they are no row."""
    finite = case.options.get("softcap") or case.target in ("log_probs", "probs")
    return ["nan"] if finite else ["nan", "+inf", "all -inf"]


NAN_ROWS = [
    pytest.param(case, side, junk, id=f"{case}-{side}-{junk}")
    for case in KERNELS
    for side in (("input", "target") if case.soft else ("input",))
    for junk in junk_of(case)
]


@pytest.mark.parametrize(("case", "side", "junk"), NAN_ROWS)
def test_nan_stays_in_its_row(case: Case, side: str, junk: str) -> None:
    x, logits = make_inputs((4, 700), torch.float32)
    t = case.make_target(x, logits)
    expected = value_and_gradients(lambda x, t: case.call(x, t, **case.per_row), x, t)
    row = x[2] if side == "input" else t[2]
    if junk == "all -inf":
        row.fill_(-INF)
    else:
        row[600] = NAN if junk == "nan" else INF
    actual = value_and_gradients(lambda x, t: case.call(x, t, **case.per_row), x, t)
    assert actual[0][..., 2].isnan().all()
    clean = torch.tensor([0, 1, 3])
    assert actual[0][..., clean].equal(expected[0][..., clean])
    for a, b in zip(actual[1:], expected[1:], strict=True):
        assert a[clean].equal(b[clean])
    assert actual[1][2].isnan().any()
    # A loss that is linear in its target has a gradient that does not depend on it.
    linear = case.name == "cross_entropy" or (case.name, case.target) == (
        "reverse_kl_div",
        "log_probs",
    )
    if len(actual) == 3 and not (side == "target" and linear):
        assert actual[2][2].isnan().any()


@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_no_upstream_gradient_no_gradient_of_a_nan_row() -> None:
    """Torch's own derivatives, where 0 times NaN is NaN, do otherwise: those of a top-k teacher."""
    wrong = []
    for case in [c for c in KERNELS if not isinstance(c, TopKCase)]:
        x, logits = make_inputs((3, 20), torch.float32)
        t = case.make_target(x, logits)
        x[1] = NAN
        leaves = [v.requires_grad_() for v in (x, t) if v is not None and v.is_floating_point()]
        value = case.call(x, t, **case.per_row)
        upstream = torch.ones_like(value)
        upstream[..., 1] = 0
        grads = torch.autograd.grad(value, leaves, upstream)
        if not all((grad[1] == 0).all() and grad.isfinite().all() for grad in grads):
            wrong.append(str(case))
    assert not wrong
