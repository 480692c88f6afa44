"""Random problems: loss, shape, strides, dtype, weights, options; and what mathematics promises."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastdiv
from helpers.cases import LOSSES, Case, rand, randn
from helpers.values import uneven, value_and_gradients

# One instruction set a test, drawn outside of hypothesis.
pytestmark = pytest.mark.usefixtures("isa")
UNCHECKED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
quick = settings(max_examples=60, suppress_health_check=UNCHECKED)
TOLERANCE = {  # of values, and of gradients in the dtype they are stored in
    torch.float64: (1e-11, 1e-11),
    torch.float32: (3e-6, 1e-5),
    torch.float16: (3e-6, 2e-3),
    torch.bfloat16: (3e-6, 1.6e-2),
}


def strided(v: Tensor, how: str) -> Tensor:
    """The same numbers (or, expanded, those of the first entry) in other places of memory."""
    if how == "transposed":
        return v.movedim(0, -1).contiguous().movedim(-1, 0)
    if how == "sliced":
        wide = v.new_zeros(*v.shape[:-1], v.shape[-1] + 3)
        return wide[..., 1:-2].copy_(v)
    if how == "expanded" and v.shape[0]:
        return v[:1].expand_as(v)
    if how == "every other row":
        return v.repeat_interleave(2, 0)[::2]
    return v


LAYOUTS = st.sampled_from(["plain", "transposed", "sliced", "expanded", "every other row"])
NUMBERS = {
    "temperature": st.floats(0.2, 5),
    "softcap": st.floats(5, 50),
    "z_loss": st.floats(1e-4, 0.1),
    "label_smoothing": st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    "beta": st.sampled_from([0.0, 0.02, 0.3, 0.5, 0.97, 1.0]),
    "skew": st.sampled_from([0.0, 0.02, 0.1, 0.5, 0.97, 1.0]),
    "reverse": st.booleans(),
    "alpha": st.sampled_from([0.02, 0.3, 0.5, 0.97, 1.0]),  # others overflow where rows differ
    "missing": st.sampled_from(["ignore", "renormalize", "tail", "uniform"]),
}
REQUIRES = {"alpha_div": ["alpha"], "renyi_div": ["alpha"]}
ACCEPTS = {
    "cross_entropy": ["temperature", "softcap", "z_loss", "label_smoothing"],
    "js_div": ["temperature", "beta"],
    "log_prob": ["temperature"],
    "log_prob_and_entropy": ["temperature"],
    "skew_kl_div": ["temperature", "skew", "reverse"],
    "topk_js_div": ["temperature", "beta", "missing"],
    "topk_kl_div": ["temperature", "missing"],
    "topk_reverse_kl_div": ["temperature", "missing"],
}


@st.composite
def problems(draw: st.DrawFn) -> tuple[Case, Tensor, Tensor | None, dict[str, Any]]:
    case = draw(st.sampled_from(LOSSES))
    case = replace(case, options={})  # ours instead
    rows = draw(st.lists(st.integers(0, 5), min_size=1, max_size=2))
    # Whole and broken tiles and vectors are drawn as often as all other sizes.
    classes = draw(st.one_of(st.integers(1, 600), st.sampled_from([1, 2, 7, 31, 511, 512, 513])))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def random(scale: float) -> Tensor:
        v = randn(*rows, classes, generator=generator, dtype=torch.float64) * scale
        return v.to(dtype)

    scale = draw(st.sampled_from([0.01, 1.0, 4.0]))
    offset = draw(st.sampled_from([0.0, -300.0, 50.0]))
    x, teacher = random(scale) + offset, random(scale)
    if draw(st.booleans()):
        teacher = x + random(0.01)
    if draw(st.booleans()) and classes > 2:  # a class that both rows exclude
        excluded = draw(st.integers(0, classes - 1))
        x[..., excluded] = teacher[..., excluded] = -math.inf
    t = case.make_target(x, teacher)
    x = strided(x, draw(LAYOUTS))
    if t is not None:
        t = strided(t, draw(LAYOUTS)) if t.dim() else t
    names = ACCEPTS.get(case.name, ["temperature"])
    chosen = [*sorted(draw(st.sets(st.sampled_from(names)))), *REQUIRES.get(case.name, [])]
    options = {n: draw(NUMBERS[n]) for n in chosen}
    if options.get("missing") == "uniform" and case.name != "topk_kl_div":
        options["missing"] = "tail"
    if case.target == "labels" and case.name == "cross_entropy":
        if t.numel() and draw(st.booleans()):
            t = t.contiguous()
            t.view(-1)[:: draw(st.integers(1, 3))] = -100
        if classes > 1 and draw(st.booleans()):
            options["smoothing"] = "others"
    if case.name == "cross_entropy":
        options["dim"] = -1
        if draw(st.booleans()):
            options["weight"] = rand(classes, generator=generator) + 0.1
    if "log_prob" not in case.name:
        options["reduction"] = draw(st.sampled_from(["none", "sum", "mean", "batchmean"]))
    if case.divergence or case.name == "cross_entropy":
        if draw(st.booleans()):
            weights = rand(rows, generator=generator)
            options["token_weight"] = torch.where(weights < 0.3, 0.0, weights)
    return case, x, t, options


def gradients(
    case: Case, x: Tensor, t: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, list[Tensor]]:
    value, *grads = value_and_gradients(
        lambda x, t: case.call(x, t, **options), x, t, upstream=uneven
    )
    return value, grads


def assert_near(got: Tensor, expected: Tensor, relative: float, what: str, size: float) -> None:
    assert got.shape == expected.shape
    got, expected = got.double(), expected.double()
    equal = (got == expected) | (got.isnan() & expected.isnan())
    error = torch.where(equal, 0.0, (got - expected).abs())
    allowed = relative * (expected.abs() + size)
    worst = torch.where(equal, 0.0, (error / allowed).nan_to_num(math.inf)).flatten()
    if worst.numel() and worst.max() > 1:
        i = int(worst.argmax())
        raise AssertionError(f"{what}: {got.flatten()[i]} where {expected.flatten()[i]} is right")


@given(problems())
@settings(quick, max_examples=250)
def test_kernels_agree_with_the_reference(problem: Any) -> None:
    case, x, t, options = problem
    of_values, of_gradients = TOLERANCE[x.dtype]
    with fastdiv.backend("native"):
        value, grads = gradients(case, x, t, options)
    with fastdiv.backend("reference"):
        exact = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
        t64 = t.double() if t is not None and t.is_floating_point() else t
        truth, expected = gradients(case, x.double(), t64, exact)
    rows = max(1, x.numel() // x.shape[-1]) if options.get("reduction") == "sum" else 1
    # A float32 logit of 300 has no digits below 3e-5, nor has its lse; z_loss squares that.
    lse = 20.0 + (1.3 * float(x[x.isfinite()].abs().max()) if x.isfinite().any() else 0.0)
    size = rows * lse * (1 + lse * options.get("z_loss", 0.0))
    assert_near(value, truth, of_values, "value", size)
    inverse = max(1.0, 1 / options.get("temperature", 1.0))
    steep = lse / 100 * inverse**2 * (1 + lse * options.get("z_loss", 0.0))
    for name, g, e in zip(("dx", "dt"), grads, expected, strict=False):
        largest = float(e[e.isfinite()].abs().max()) if e.numel() and e.isfinite().any() else 0.0
        e = torch.where(e.to(g.dtype).isinf(), e.to(g.dtype).double(), e)  # beyond what g can hold
        assert_near(g, e, of_gradients, name, 0.1 * largest + steep)


# --- properties -----------------------------------------------------------------------------------


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    rows, classes = draw(st.integers(1, 4)), draw(st.integers(2, 700))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = randn(rows, classes, generator=generator) * draw(st.sampled_from([0.1, 3.0, 30.0]))
    t = randn(rows, classes, generator=generator) * draw(st.sampled_from([0.1, 3.0, 30.0]))
    nearness = draw(st.sampled_from([None, 1e-1, 1e-3, 1e-6, 0.0]))
    return x.to(dtype), (t if nearness is None else x + nearness * t).to(dtype)


@given(pairs())
@quick
def test_divergences_are_never_negative_and_zero_at_equality(pair: tuple[Tensor, Tensor]) -> None:
    x, t = pair
    for case in (c for c in LOSSES if c.divergence and c.target == "logits"):
        value = case.call(x, t, reduction="none")
        assert (value >= 0).all(), f"{case}: {value}"
        same = case.call(x, x, reduction="none")
        assert (same == 0).all(), f"{case} of equal rows: {same}"


@given(pairs())
@quick
def test_jensen_shannon(pair: tuple[Tensor, Tensor]) -> None:
    x, t = pair
    forward = fastdiv.js_div(x, t, target_type="logits", reduction="none")
    backward = fastdiv.js_div(t, x, target_type="logits", reduction="none")
    torch.testing.assert_close(forward, backward, rtol=1e-5, atol=1e-12)
    assert (forward <= math.log(2) * (1 + 1e-6)).all()
    kl = fastdiv.kl_div(x, t, target_type="logits", reduction="none")
    reverse = fastdiv.reverse_kl_div(t, x, target_type="logits", reduction="none")
    torch.testing.assert_close(kl, reverse, rtol=1e-5, atol=1e-12)
    assert (forward <= (kl + reverse) / 4 * (1 + 1e-5) + 1e-7).all()


@given(pairs())
@quick
def test_entropy_and_cross_entropy(pair: tuple[Tensor, Tensor]) -> None:
    x, t = pair
    entropy = fastdiv.entropy(x)
    assert (entropy <= math.log(x.shape[-1]) * (1 + 1e-6) + 1e-6).all()
    assert (entropy >= -1e-5).all()
    # Gibbs: cross entropy = entropy + KL.
    p = t.double().softmax(-1)
    cross = fastdiv.cross_entropy(x.double(), p, reduction="none")
    kl = fastdiv.kl_div(x.double(), t.double(), target_type="logits", reduction="none")
    torch.testing.assert_close(cross, fastdiv.entropy(t.double()) + kl, rtol=1e-9, atol=1e-9)


@given(pairs(), st.sampled_from([-64.0, 32.0, 512.0]))
@quick
def test_shift_invariance(pair: tuple[Tensor, Tensor], shift: float) -> None:
    """A constant added to all logits of a row (exactly: powers of two on a coarse grid)."""
    x, t = ((v.float() * 64).round() / 64 for v in pair)
    for case in LOSSES:
        if case.options.keys() & {"softcap", "z_loss"}:
            continue
        target = case.make_target(x, t)
        moved = case.make_target(x, t + shift)
        expected = case.call(x, target)
        torch.testing.assert_close(case.call(x + shift, moved), expected, rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["kl_div", "reverse_kl_div", "js_div"])
@pytest.mark.parametrize("offset", [0.0, 10.0, 50.0, -300.0])
def test_logits_of_student_and_teacher_apart(name: str, offset: float) -> None:
    """Logits of two models seldom have the same mean, which costs their gradients no digit.

    Each is a difference of three numbers that are exact to an ulp, times a probability: six ulps of
    the largest gradient are enough for the largest error, however far the rows are apart.
    """
    case = next(c for c in LOSSES if c.name == name and c.target == "logits")
    t = torch.randn(64, 1000) * 0.1
    x = t + 0.01 * torch.randn(64, 1000) + offset
    right = gradients(case, x.double(), t.double(), {"reduction": "sum"})[1]
    ours = gradients(case, x, t, {"reduction": "sum"})[1]
    leaves = [x.requires_grad_(), t.requires_grad_()]
    eager = torch.autograd.grad(case.eager_rows(x, t).sum(), leaves)
    for got, plain, truth in zip(ours, eager, right, strict=True):
        error, theirs = (got - truth).abs().max(), (plain - truth).abs().max()
        allowed = 6 * torch.finfo(torch.float32).eps * truth.abs().max()
        assert error <= allowed, f"error {error:.1e} > {allowed:.1e}; of eager torch {theirs:.1e}"


@given(pairs())
@quick
def test_gradients_of_a_row_sum_to_zero(pair: tuple[Tensor, Tensor]) -> None:
    """As adding a constant to the logits changes nothing."""
    x, t = (v.double() for v in pair)
    for case in LOSSES:
        if case.options.keys() & {"softcap", "z_loss"}:
            continue
        value, grads = gradients(case, x, case.make_target(x, t), {})
        size = 1 + value.abs().max()  # of the terms that cancel, for powers
        for g in grads[: 2 if case.target == "logits" else 1]:
            assert (g.sum(-1).abs() <= 1e-12 * (size + g.abs().sum(-1))).all(), case
