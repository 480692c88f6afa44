"""Rows at the edge: masked classes, mass on one side only, probabilities of 0, a single class.

docs/numerics.md says what must come out.  Everything runs on the kernels and on the
reference: both are held to the rule, not only to one another.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastdiv
from helpers.cases import LOSSES, TARGET_TYPES, Case, as_type, make_inputs
from helpers.values import same, value_and_gradients

pytestmark = pytest.mark.usefixtures("backend")

INF, NAN = torch.inf, torch.nan
FUNCTIONS = [fastdiv.kl_div, fastdiv.reverse_kl_div, fastdiv.js_div]


# --- masked classes: 0 * inf = 0 ---

# Smoothing gives a masked class mass, as does a uniform rest; a softcap makes its logit finite.
MASKABLE = [
    case
    for case in LOSSES
    if not case.options.keys() & {"label_smoothing", "softcap"}
    and case.options.get("missing") != "uniform"
]


@pytest.mark.parametrize("mask", [-INF, torch.finfo(torch.float32).min], ids=["-inf", "finfo.min"])
@pytest.mark.parametrize("case", MASKABLE, ids=str)
def test_a_class_masked_on_both_sides_is_as_if_it_were_not_there(case: Case, mask: float) -> None:
    x, logits = make_inputs((4, 1100), torch.float32)
    # The whole first tile, one class further on and the last one; the labels are elsewhere.
    masked = torch.zeros(1100, dtype=torch.bool)
    masked[:512] = masked[700] = masked[-1] = True
    logits[:, masked] = -INF
    small = case.make_target(x[:, ~masked], logits[:, ~masked])
    t = case.make_target(x, logits)
    expected = value_and_gradients(
        lambda x, t: case.call(x, t, **case.per_row), x[:, ~masked], small
    )
    if case.target == "labels":
        same(t, torch.arange(1100)[~masked][small])
    x[:, masked] = mask
    if case.target == "logits":
        t[:, masked] = mask
    value, *grads = value_and_gradients(lambda x, t: case.call(x, t, **case.per_row), x, t)
    # A square magnifies rounding, and on a GPU the classes behind the mask change places.
    tolerance = 2e-5 if case.options.get("alpha") == 2.0 else 2e-6
    same(value, expected[0], tolerance)
    for grad, want in zip(grads, expected[1:], strict=True):
        same(grad[:, ~masked], want, tolerance)
    assert (grads[0][:, masked] == 0).all()
    if case.divergence:  # the target of a cross entropy may grow there, at an infinite price
        assert (grads[1][:, masked] == 0).all()


@pytest.mark.parametrize("masked", [512, 8192, 9000])
def test_first_block_all_masked(masked: int) -> None:
    # An online softmax that starts at max = -inf computes e^(-inf + inf).
    x, t = make_inputs((2, 9500), torch.float32)
    x[:, :masked] = t[:, :masked] = -INF
    y = torch.tensor([masked, 9499])
    same(fastdiv.cross_entropy(x, y), F.cross_entropy(x[:, masked:], y - masked))
    same(fastdiv.entropy(x), fastdiv.entropy(x[:, masked:]))
    for function in FUNCTIONS:
        want = function(x[:, masked:], t[:, masked:], target_type="logits")
        same(function(x, t, target_type="logits"), want)


@pytest.mark.parametrize("alpha", [-1.0, 2.0, 3.0])
def test_a_first_block_of_finfo_min_at_a_low_temperature(alpha: float) -> None:
    """Its logits times the scale are infinite, and so is what a maximum then changes by."""
    x, t = make_inputs((2, 1500), torch.float32)
    options = {"alpha": alpha, "temperature": 0.25, "target_type": "logits"}
    want = fastdiv.alpha_div(x[:, 1200:], t[:, 1200:], **options)
    x[:, :1200] = t[:, :1200] = torch.finfo(torch.float32).min
    same(fastdiv.alpha_div(x, t, **options), want, 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_mixture_smaller_than_any_normal_number(dtype: torch.dtype) -> None:
    """p is normal, q is 0, their mixture is subnormal: an approximate logarithm takes it for 0."""
    x, t = torch.tensor([[2.0, 0.0, -200.0]]), torch.tensor([[0.0, 3.0, -84.0]])
    for function in (fastdiv.js_div, fastdiv.skew_kl_div, fastdiv.kl_div):
        found = value_and_gradients(
            lambda x, t, f=function: f(x, t, target_type="logits"), x.to(dtype), t.to(dtype)
        )
        want = value_and_gradients(
            lambda x, t, f=function: f(x, t, target_type="logits"), x.double(), t.double()
        )
        for ours, truth in zip(found, want, strict=True):
            same(ours.double(), truth, 2e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("rows", [1, 4095, 4096, 4097, 8191, 8193])
def test_means_of_many_rows(rows: int) -> None:
    """A GPU sums rows in sections of 4096."""
    x, y = torch.randn(rows, 5), torch.randint(0, 5, (rows,))
    y[1::3] = -100
    want = F.cross_entropy(x.double(), y)
    same(fastdiv.cross_entropy(x, y).double(), want)


def test_js_of_log_probs_that_underflow() -> None:
    # Both log-probabilities below -104: e^x is 0 in float32 for both, and m is 0.
    x = torch.tensor([[0.0, -120.0, -150.0]])
    t = torch.tensor([[-1e-7, -130.0, -110.0]])
    for kind in ("logits", "log_probs"):
        value, dx, dt = value_and_gradients(
            lambda x, t, k=kind: fastdiv.js_div(x, t, target_type=k), x, t
        )
        assert abs(value) < 1e-7
        assert dx.isfinite().all() and dt.isfinite().all()


def test_target_gradient_at_probability_zero() -> None:
    # The derivative of p log p at 0 is -inf, and 0 * inf in the chain is NaN.
    x, p = torch.randn(1, 3), torch.tensor([[0.0, 0.5, 0.5]])
    for function in FUNCTIONS:
        dp = value_and_gradients(lambda x, p, f=function: f(x, p, target_type="probs"), x, p)[2]
        assert dp.isfinite().all() and dp[0, 0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", TARGET_TYPES)
def test_teacher_mass_where_the_student_has_none(kind: str, dtype: torch.dtype) -> None:
    x, logits = make_inputs((3, 40), dtype)
    x[1, 5] = -INF
    t = as_type(logits.double(), kind).to(dtype)
    value, dx, dt = value_and_gradients(
        lambda x, t: fastdiv.kl_div(x, t, target_type=kind, reduction="none"), x, t
    )
    assert value[1] == INF and value[[0, 2]].isfinite().all()
    assert dx.isfinite().all() and dt.isfinite().all()
    # The finite part of the gradient stays: q - p.
    same(
        dx[1].double(),
        x[1].double().softmax(-1) - logits[1].double().softmax(-1),
        1e-2 if dtype == torch.bfloat16 else 1e-6,
    )
    # The other direction knows nothing of the class, and JS is bounded.
    for function in (fastdiv.reverse_kl_div, fastdiv.js_div):
        value, dx, dt = value_and_gradients(
            lambda x, t, f=function: f(x, t, target_type=kind, reduction="none"), x, t
        )
        assert value.isfinite().all() and dx.isfinite().all() and dt.isfinite().all()
        assert dx[1, 5] == 0


@pytest.mark.parametrize("kind", TARGET_TYPES)
def test_student_mass_where_the_teacher_has_none(kind: str) -> None:
    x, logits = make_inputs((3, 40), torch.float32)
    logits[1, 5] = -INF
    t = as_type(logits, kind)
    for function in FUNCTIONS:
        value, dx, dt = value_and_gradients(
            lambda x, t, f=function: f(x, t, target_type=kind, reduction="none"), x, t
        )
        assert value[[0, 2]].isfinite().all()
        assert value[1].item() == INF if function is fastdiv.reverse_kl_div else value[1].isfinite()
        assert dx.isfinite().all() and dt.isfinite().all()
        if kind == "logits" and function is fastdiv.reverse_kl_div:
            # p - q: to give the class mass is what the loss asks for, as in the other direction.
            same(dt[1], logits[1].softmax(-1) - x[1].softmax(-1))
        elif kind == "probs" or function is not fastdiv.reverse_kl_div:
            assert dt[1, 5] == 0


@pytest.mark.parametrize("case", [c for c in LOSSES if c.divergence], ids=str)
def test_mass_on_one_side_of_every_divergence(case: Case) -> None:
    x, logits = make_inputs((3, 40), torch.float32)
    x[1, 5] = logits[1, 5] = x[0, 5] = logits[2, 5] = -INF
    t = case.make_target(x, logits)
    value, dx, dt = value_and_gradients(lambda x, t: case.call(x, t, **case.per_row), x, t)
    same(value.double(), case.truth(x, t, **case.per_row), 1e-5)  # infinite or not
    assert not value.isnan().any() and dx.isfinite().all() and dt.isfinite().all()


def test_js_of_distributions_that_share_nothing_is_ln_2() -> None:
    x = torch.tensor([[0.0, -INF, 1.0, -INF]])
    t = torch.tensor([[-INF, 3.0, -INF, 0.0]])
    for kind in TARGET_TYPES:
        value, dx, dt = value_and_gradients(
            lambda x, t, kind=kind: fastdiv.js_div(x, t, target_type=kind), x, as_type(t, kind)
        )
        same(value, torch.tensor(2.0).log())
        assert dx.isfinite().all() and dt.isfinite().all()


def test_probabilities_of_exactly_zero() -> None:
    x, _ = make_inputs((2, 5), torch.float32)
    p = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]])
    for function in FUNCTIONS:
        value, dx, dp = value_and_gradients(
            lambda x, p, f=function: f(x, p, target_type="probs", reduction="none"), x, p
        )
        infinite = function is fastdiv.reverse_kl_div
        assert (value == INF).all() if infinite else value.isfinite().all()
        assert dx.isfinite().all() and dp.isfinite().all() and (dp[p == 0] == 0).all()
    value, dx, dp = value_and_gradients(
        lambda x, p: fastdiv.cross_entropy(x, p, reduction="none"), x, p
    )
    lq = x.log_softmax(-1)
    same(value, -(p * lq).sum(-1))
    same(dx, lq.exp() - p)
    same(dp, -lq)  # linear in p: defined at 0 as well


def test_soft_target_of_zero_where_the_input_is_masked() -> None:
    x = torch.tensor([[1.0, -INF, 2.0]])
    p = torch.tensor([[0.5, 0.0, 0.5]])
    value, dx, dp = value_and_gradients(lambda x, p: fastdiv.cross_entropy(x, p), x, p)
    same(value, F.cross_entropy(x[:, [0, 2]], p[:, [0, 2]]))
    assert dx.isfinite().all() and dp.isfinite().all() and dx[0, 1] == 0


def test_entropy_and_log_prob_with_masked_classes() -> None:
    x = torch.tensor([[0.0, -INF, 0.0, -INF], [2.0, -INF, -INF, -INF]])
    value, dx = value_and_gradients(lambda x: fastdiv.entropy(x), x)
    same(value, torch.tensor([2.0, 1.0]).log())
    assert (dx == 0).all()
    value, dx = value_and_gradients(lambda x: fastdiv.log_prob(x, torch.tensor([1, 0])), x)
    assert value.tolist() == [-INF, 0.0] and dx.isfinite().all()


@pytest.mark.parametrize("smoothing", ["all", "others"])
def test_smoothing_over_a_masked_class_is_infinite_but_an_ignored_row_is_zero(
    smoothing: str,
) -> None:
    x, _ = make_inputs((3, 9), torch.float32)
    x[1:, 4] = -INF
    y = torch.tensor([4, 2, -100])
    value, dx = value_and_gradients(
        lambda x: fastdiv.cross_entropy(
            x, y, label_smoothing=0.1, smoothing=smoothing, reduction="none"
        ),
        x,
    )
    assert value[0].isfinite() and value[1] == INF and value[2] == 0
    if smoothing == "all":
        same(value[:2], F.cross_entropy(x, y, label_smoothing=0.1, reduction="none")[:2])
    assert dx.isfinite().all() and (dx[2] == 0).all() and (dx[1] != 0).any()


@pytest.mark.parametrize(
    "case", [c for c in LOSSES if c.options.get("smoothing") != "others"], ids=str
)
def test_a_single_class(case: Case) -> None:
    x, logits = torch.tensor([[3.0], [-5.0]]), torch.tensor([[1.0], [2.0]])
    t = case.make_target(x, logits)
    value, *grads = value_and_gradients(lambda x, t: case.call(x, t, **case.per_row), x, t)
    z = case.options.get("z_loss", 0.0)
    same(value, (z * x.squeeze(-1) ** 2).expand(value.shape))
    same(grads[0], 2 * z * x, 1e-7)
