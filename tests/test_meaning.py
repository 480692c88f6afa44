"""Traps of meaning that fused losses elsewhere fell into: labels, dtypes, directions, gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastdiv
from helpers.cases import LOSSES, Case, make_inputs
from helpers.values import same, value_and_gradients

pytestmark = pytest.mark.usefixtures("backend")

FUNCTIONS = [fastdiv.kl_div, fastdiv.reverse_kl_div, fastdiv.js_div]


# --- nothing to average ---


def test_mean_over_no_row_is_nan_and_has_a_graph() -> None:
    # 0.0 elsewhere, or a fresh zero without a graph that hangs distributed training.
    x = torch.randn(3, 5, requires_grad=True)
    value = fastdiv.cross_entropy(x, torch.full((3,), -100))
    assert value.isnan() and value.requires_grad
    value.backward()
    assert x.grad is not None and (x.grad == 0).all()


@pytest.mark.parametrize("ignore_index", [-1, 5, 7, 10**12])
def test_ignore_index_outside_the_classes_with_class_weights(ignore_index: int) -> None:
    # weight[label] of an ignored label reads outside of the weights.
    x, weight = torch.randn(3, 5), torch.rand(5)
    y = torch.tensor([1, ignore_index, 4])
    value, dx = value_and_gradients(
        lambda x: fastdiv.cross_entropy(x, y, weight, ignore_index=ignore_index), x
    )
    same(value, F.cross_entropy(x[[0, 2]], y[[0, 2]], weight))
    assert (dx[1] == 0).all()


# --- labels out of range ---


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("label", [-1, 5, -100, 2**31, 2**40, -(2**63)])
@pytest.mark.usefixtures("checked_labels")
def test_label_out_of_range_raises(label: int, smoothing: float, weighted: bool) -> None:
    # A loss of 0 elsewhere, or a read outside of the row.
    x, weight = torch.randn(3, 5), torch.rand(5) if weighted else None
    y = torch.tensor([1, label, 4])
    options = {"ignore_index": 300, "label_smoothing": smoothing}
    logits = x.clone().requires_grad_() * 1
    with pytest.raises(IndexError, match=str(label)):
        fastdiv.cross_entropy(logits, y, weight, inplace_backward=True, **options)
    assert logits.detach().equal(x)
    with pytest.raises(IndexError, match=str(label)):
        fastdiv.cross_entropy(x, y, weight, return_stats=True, **options)
    with pytest.raises(IndexError, match=str(label)):  # of a row that does not count, too
        fastdiv.cross_entropy(x, y, weight, token_weight=torch.tensor([1.0, 0, 1]), **options)
    if label != -1:  # which is padding
        with pytest.raises(IndexError, match=str(label)):
            fastdiv.log_prob(x, y)


def test_class_zero_is_not_ignored() -> None:
    # A padding index that is 0 by default.
    x = torch.randn(2, 5)
    same(fastdiv.cross_entropy(x, torch.tensor([0, 0])), F.cross_entropy(x, torch.tensor([0, 0])))


# --- dtypes ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_loss_of_half_logits_is_float32(case: Case, dtype: torch.dtype) -> None:
    # 11.125 for 11.1466.
    x, logits = make_inputs((3, 1000), dtype)
    t = case.make_target(x, logits)
    value, *grads = value_and_gradients(lambda x, t: case.call(x, t, **case.per_row), x, t)
    assert value.dtype == torch.float32 and all(grad.dtype == dtype for grad in grads)
    same(value, case.truth(x, t, **case.per_row), 2e-5)


@pytest.mark.parametrize("kind", ["logits", "log_probs", "probs"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradient_is_zero_where_both_are_equal(function, kind: str) -> None:
    # -0.25 for a total variation; and nothing but rounding for these.
    p = torch.tensor([[0.125, 0.5, 0.25, 0.125]])
    t = p if kind == "probs" else p.log()
    value, dx, dt = value_and_gradients(lambda x, t: function(x, t, target_type=kind), p.log(), t)
    assert abs(value) < 1e-7 and dx.abs().max() < 1e-7
    # Of unnormalised rows the derivative of KL(p || q) is 1 and of KL(q || p) -1, times p for logs.
    # JS is homogeneous with f = 0 at p = q.
    slope = {fastdiv.kl_div: 1.0, fastdiv.reverse_kl_div: -1.0, fastdiv.js_div: 0.0}[function]
    slope = 0.0 if kind == "logits" else slope
    same(dt, slope * p if kind == "log_probs" else torch.full_like(p, slope), 1e-6)


# --- meaning ---


def test_soft_targets_that_do_not_sum_to_one() -> None:
    # The gradient is (sum p) q - p.  Loss 6.32 for 3.15 where sum p = 1 is taken for granted.
    x, p = torch.randn(3, 7), torch.rand(3, 7)
    value, dx, dp = value_and_gradients(
        lambda x, p: fastdiv.cross_entropy(x, p, reduction="none"), x, p
    )
    same(value, F.cross_entropy(x, p, reduction="none"))
    same(dx, p.sum(-1, keepdim=True) * x.softmax(-1) - p)
    same(dp, -x.log_softmax(-1))


def test_direction_is_that_of_torch() -> None:
    # F.kl_div(input, target) is KL(target || input); arguments have been swapped elsewhere.
    x, t = torch.randn(4, 7), torch.randn(4, 7)
    lq, lp = x.log_softmax(-1), t.log_softmax(-1)
    forward = F.kl_div(lq, lp, reduction="batchmean", log_target=True)
    reverse = F.kl_div(lp, lq, reduction="batchmean", log_target=True)
    assert abs(forward - reverse) > 0.01
    for kind, target in (("logits", t), ("log_probs", lp), ("probs", lp.exp())):
        same(fastdiv.kl_div(x, target, target_type=kind), forward)
        same(fastdiv.reverse_kl_div(x, target, target_type=kind), reverse)
        # GKD's ends of the generalised JS.
        same(fastdiv.js_div(x, target, target_type=kind, beta=0.0), forward)
        same(fastdiv.js_div(x, target, target_type=kind, beta=1.0), reverse)


def test_beta_weighs_the_teacher() -> None:
    p, q = torch.tensor([[0.1, 0.2, 0.7]]), torch.tensor([[0.5, 0.3, 0.2]])
    m = 0.1 * p + 0.9 * q
    expected = 0.1 * (p * (p / m).log()).sum() + 0.9 * (q * (q / m).log()).sum()
    same(fastdiv.js_div(q.log(), p, target_type="probs", beta=0.1), expected)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_kl_is_not_the_soft_cross_entropy(function) -> None:
    # Dropping the teacher's entropy leaves the gradient right and the value wrong.
    x = torch.randn(3, 9)
    same(function(x, x, target_type="logits"), torch.tensor(0.0), 1e-7)


@pytest.mark.parametrize(
    ("function", "module"),
    [
        (fastdiv.kl_div, fastdiv.nn.KLDivLoss),
        (fastdiv.reverse_kl_div, fastdiv.nn.ReverseKLDivLoss),
        (fastdiv.js_div, fastdiv.nn.JSDivLoss),
    ],
)
def test_temperature_is_not_squared_unless_asked(function, module) -> None:
    x, t = torch.randn(3, 9), torch.randn(3, 9)
    plain = value_and_gradients(lambda x, t: function(x / 2, t / 2, target_type="logits"), x, t)
    loss = value_and_gradients(
        lambda x, t: function(x, t, target_type="logits", temperature=2.0), x, t
    )
    options = {"target_type": "logits", "temperature": 2.0}
    scaled = value_and_gradients(module(**options, scale_by_temperature=True), x, t)
    for a, b, c in zip(plain, loss, scaled, strict=True):
        same(b, a)
        same(c, 4 * a)  # value and gradient: scaling the one only is another trap
    # Probabilities are taken as they are.
    same(
        function(x, t.softmax(-1), target_type="probs", temperature=2.0),
        function(x / 2, t.log_softmax(-1), target_type="log_probs"),
    )


def test_vocabularies_of_different_size_are_refused() -> None:
    for function in FUNCTIONS:
        with pytest.raises(ValueError, match=r"\(3, 9\).*\(3, 10\)"):
            function(torch.randn(3, 9), torch.randn(3, 10), target_type="logits")


@pytest.mark.parametrize("case", [case for case in LOSSES if case.divergence], ids=str)
def test_the_teacher_gets_its_gradient(case: Case) -> None:
    x, logits = make_inputs((3, 20), torch.float64)
    t = case.make_target(x, logits)
    with fastdiv.backend("reference"):
        want = value_and_gradients(lambda t: case.call(x, t), t)[1]
    assert want.abs().max() > 1e-3
    same(
        value_and_gradients(lambda t: case.call(x, t), t)[1], want, 1e-12
    )  # alone, without that of x
    assert not case.call(x, t.requires_grad_()).detach().requires_grad


def test_z_loss_is_differentiable() -> None:
    x, y = torch.randn(3, 9), torch.tensor([0, 4, -100])
    actual = value_and_gradients(
        lambda x: fastdiv.cross_entropy(x, y, z_loss=0.5, reduction="sum"), x
    )
    expected = value_and_gradients(
        lambda x: F.cross_entropy(x, y, reduction="sum") + 0.5 * (x[:2].logsumexp(-1) ** 2).sum(), x
    )
    same(actual[0], expected[0], 1e-5)
    same(actual[1], expected[1])


@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_an_upstream_gradient_of_zero(case: Case) -> None:
    x, logits = make_inputs((3, 20), torch.float32)
    t = case.make_target(x, logits)
    x.requires_grad_()
    (case.call(x, t, **case.per_row) * 0).sum().backward()
    assert x.grad is not None and (x.grad == 0).all()


@pytest.mark.parametrize("linear", [False, True])
def test_log_probs_and_entropies_may_be_overwritten(linear: bool) -> None:
    """As trainers do with the tokens of a prompt; autograd forbids it where one call made both."""
    x, index = torch.randn(6, 5, requires_grad=True), torch.tensor([0, 4, 2, 1, 3, 0])
    both = (
        fastdiv.linear_log_prob_and_entropy(x, torch.eye(5), index)
        if linear
        else fastdiv.log_prob_and_entropy(x, index)
    )
    for v in both:
        v[:3] = 0.0
    sum(both).sum().backward()
    assert x.grad is not None and (x.grad[:3] == 0).all() and (x.grad[3:] != 0).all()
