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


def inputs(case: Case, shape: tuple[int, int] = (4, 601)) -> tuple[Tensor, Tensor | None]:
    x, logits = make_inputs(shape, torch.float32)
    return x, case.make_target(x, logits)


# --- minus infinity ---


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


# --- padding lanes ---


@pytest.mark.parametrize("classes", [1, 3, 7, 9, 15, 17, 31, 33, 63, 65, 511, 513, 1000, 8193])
def test_softcap_before_padding_lanes(classes: int) -> None:
    # Capping a lane that was padded with -inf gives it the mass e^-softcap.
    x, _ = make_inputs((3, classes), torch.float32)
    y = torch.arange(3) % classes
    value, dx = value_and_gradients(lambda x: fastdiv.cross_entropy(x, y, softcap=1.0), x)
    expected = value_and_gradients(lambda x: F.cross_entropy(torch.tanh(x), y), x)
    same(value, expected[0])
    same(dx, expected[1])


# --- 32-bit offsets ---


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


# --- odd sizes, alignment, strides ---


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
