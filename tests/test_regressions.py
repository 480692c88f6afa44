"""One test for each trap that fused losses elsewhere have fallen into, by kind of trap."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiv
from helpers.cases import LOSSES, Case, make_inputs
from helpers.values import same, value_and_gradients

INF = torch.inf
FUNCTIONS = [fastdiv.kl_div, fastdiv.reverse_kl_div, fastdiv.js_div]
SOFT = [case for case in LOSSES if case.target != "labels" and case.target != "none"]
# Those with an in-place backward.
IN_PLACE = [c for c in LOSSES if not c.name.startswith("log_prob") and c.target != "none"]


def inputs(case: Case, shape: tuple[int, int] = (4, 601)) -> tuple[Tensor, Tensor | None]:
    x, logits = make_inputs(shape, torch.float32)
    return x, case.make_target(x, logits)


# --- A: minus infinity ---


@pytest.mark.parametrize("masked", [512, 8192, 9000])
def test_first_block_all_masked(masked: int, backend: str) -> None:
    # An online softmax that starts at max = -inf computes e^(-inf + inf).
    x, t = make_inputs((2, 9500), torch.float32)
    x[:, :masked] = t[:, :masked] = -INF
    y = torch.tensor([masked, 9499])
    same(fastdiv.cross_entropy(x, y), F.cross_entropy(x[:, masked:], y - masked))
    same(fastdiv.entropy(x), fastdiv.entropy(x[:, masked:]))
    for function in FUNCTIONS:
        want = function(x[:, masked:], t[:, masked:], target_type="logits")
        same(function(x, t, target_type="logits"), want)


def test_js_of_log_probs_that_underflow(backend: str) -> None:
    # Both log-probabilities below -104: e^x is 0 in float32 for both, and m is 0.
    x = torch.tensor([[0.0, -120.0, -150.0]])
    t = torch.tensor([[-1e-7, -130.0, -110.0]])
    for kind in ("logits", "log_probs"):
        value, dx, dt = value_and_gradients(
            lambda x, t, k=kind: fastdiv.js_div(x, t, target_type=k), x, t
        )
        assert abs(value) < 1e-7
        assert dx.isfinite().all() and dt.isfinite().all()


def test_target_gradient_at_probability_zero(backend: str) -> None:
    # The derivative of p log p at 0 is -inf, and 0 * inf in the chain is NaN.
    x, p = torch.randn(1, 3), torch.tensor([[0.0, 0.5, 0.5]])
    for function in FUNCTIONS:
        dp = value_and_gradients(lambda x, p, f=function: f(x, p, target_type="probs"), x, p)[2]
        assert dp.isfinite().all() and dp[0, 0] == 0


# --- B: padding lanes ---


@pytest.mark.parametrize("classes", [1, 3, 7, 9, 15, 17, 31, 33, 63, 65, 511, 513, 1000, 8193])
def test_softcap_before_padding_lanes(classes: int) -> None:
    # Capping a lane that was padded with -inf gives it the mass e^-softcap.
    x, _ = make_inputs((3, classes), torch.float32)
    y = torch.arange(3) % classes
    value, dx = value_and_gradients(lambda x: fastdiv.cross_entropy(x, y, softcap=1.0), x)
    expected = value_and_gradients(lambda x: F.cross_entropy(torch.tanh(x), y), x)
    same(value, expected[0])
    same(dx, expected[1])


# --- C: gradients in place, and in the forward ---


@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_second_backward_gives_the_same_again(case: Case) -> None:
    # A gradient that is stored in the forward and scaled in the backward is scaled twice.
    x, t = inputs(case)
    x.requires_grad_()
    value = case.call(x, t, **case.per_row).sum() * 3
    first = torch.autograd.grad(value, x, retain_graph=True)[0]
    assert torch.autograd.grad(value, x, retain_graph=True)[0].equal(first)
    value.backward(retain_graph=True)
    value.backward()
    assert x.grad is not None and x.grad.equal(2 * first)


@pytest.mark.parametrize("case", IN_PLACE, ids=str)
def test_second_backward_in_place_raises(case: Case) -> None:
    x, t = inputs(case)
    logits = x.requires_grad_() * 1
    value = case.call(logits, t, inplace_backward=True)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("producer", [torch.softmax, torch.log_softmax, lambda x, _: x.exp()])
@pytest.mark.parametrize("case", IN_PLACE, ids=str)
def test_in_place_below_a_producer_that_saved_its_output_raises(case: Case, producer) -> None:
    # Its backward would compute with gradients in place of its output, without a word.
    x, t = inputs(case)
    logits = producer(x.requires_grad_(), -1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        case.call(logits, t, inplace_backward=True).backward()


def test_in_place_with_another_user_of_the_logits_raises() -> None:
    x, y = torch.randn(4, 9, requires_grad=True), torch.arange(4)
    logits = x * 1
    other = logits.square().sum()  # has saved the logits
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (fastdiv.cross_entropy(logits, y, inplace_backward=True) + other).backward()


@pytest.mark.parametrize("case", IN_PLACE, ids=str)
def test_in_place_of_a_leaf_is_refused(case: Case) -> None:
    x, t = inputs(case)
    with pytest.raises(ValueError, match="inplace_backward"):
        case.call(x.requires_grad_(), t, inplace_backward=True)


@pytest.mark.parametrize("case", IN_PLACE, ids=str)
def test_in_place_moves_the_version_counter(case: Case) -> None:
    # What writes behind autograd's back cannot be caught by it.
    x, t = inputs(case)
    big = x.requires_grad_() * 1
    logits = big[1:3]
    value = case.call(logits, None if t is None else t[1:3], inplace_backward=True)
    before = big._version
    assert before == 0, "the forward wrote to its input"
    value.backward()
    assert big._version > before and logits._version > before
    with pytest.raises(RuntimeError, match="second derivative"):
        again = case.call(x * 1, t, inplace_backward=True)
        torch.autograd.grad(again, x, create_graph=True)


@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("case", IN_PLACE, ids=str)
def test_the_forward_writes_to_no_input(case: Case, grad_mode: bool) -> None:
    # Rows that are ignored were zeroed in the caller's memory, even under no_grad.
    x, t = inputs(case)
    weight = torch.tensor([1.0, 0.0, 1.0, 0.0])
    copies = x.clone(), t.clone()
    with torch.set_grad_enabled(grad_mode):
        logits = x.clone().requires_grad_() * 1
        case.call(logits, t, inplace_backward=True, token_weight=weight)
        case.call(x, t, token_weight=weight)
    assert logits.detach().equal(copies[0]) and x.equal(copies[0]) and t.equal(copies[1])


@pytest.mark.parametrize("in_place", [False, True])
def test_the_upstream_gradient_is_not_written_to(in_place: bool) -> None:
    x, y = torch.randn(3, 9), torch.tensor([0, -100, 2])
    logits = x.requires_grad_() * 1
    value = fastdiv.cross_entropy(logits, y, reduction="none", inplace_backward=in_place)
    upstream = torch.ones(3)
    value.backward(upstream)
    assert (upstream == 1).all()


# --- D: 32-bit offsets ---


def test_rows_further_apart_than_32_bits_reach() -> None:
    # Only the pages of two rows are touched.
    stride, classes = 2**31 + 64, 1000
    try:
        big = torch.empty(stride + classes, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"address space: {error}")
    rows = big.as_strided((2, classes), (stride, 1))
    rows.copy_(make_inputs((2, classes), torch.bfloat16)[0])
    y = torch.tensor([1, 2])
    same(fastdiv.cross_entropy(rows, y), F.cross_entropy(rows.float(), y))
    same(
        fastdiv.kl_div(rows, rows.flip(0), target_type="logits"),
        fastdiv.kl_div(rows.clone(), rows.flip(0), target_type="logits"),
    )


# --- E: odd sizes, alignment, strides ---


@pytest.mark.parametrize("classes", [2, 5, 10, 11, 14, 18, 521, 8195])
@pytest.mark.parametrize("case", [case for case in LOSSES if not case.options], ids=str)
def test_every_tail_length(case: Case, classes: int) -> None:
    # A tail loop with the wrong step leaves classes out, or takes them twice.
    x, t = inputs(case, (3, classes))
    actual = value_and_gradients(lambda x, t: case.call(x, t, **case.per_row), x, t)
    with fastdiv.backend("reference"):
        expected = value_and_gradients(lambda x, t: case.call(x, t, **case.per_row), x, t)
    for a, b in zip(actual, expected, strict=True):
        same(a, b, 5e-5 if case.target == "probs" else 5e-6)


def test_labels_and_logits_that_begin_at_an_odd_address(backend: str) -> None:
    # 16-byte loads of labels[1:].
    labels = torch.randint(0, 11, (8,))
    for start in range(4):
        y = labels[start:]
        x = torch.randn(len(y) * 11 + 3)[3:].view(len(y), 11)
        same(fastdiv.cross_entropy(x, y), F.cross_entropy(x, y))
        same(fastdiv.log_prob(x, y.int()), -F.cross_entropy(x, y, reduction="none"))


@pytest.mark.parametrize("case", SOFT, ids=str)
def test_teacher_with_a_row_stride_of_its_own(case: Case) -> None:
    # The student's stride was used for the teacher.
    x, t = inputs(case)
    wide = torch.cat([t, t.new_zeros(4, 13)], -1)[:, : t.shape[1]]
    assert wide.stride() != x.stride()
    for a, b in zip(
        value_and_gradients(lambda x, t: case.call(x, t), x, wide),
        value_and_gradients(lambda x, t: case.call(x, t), x, t),
        strict=True,
    ):
        assert a.equal(b)
