"""Derivatives of the kernels themselves, in double: both sides, every order, every reduction."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fastdiv
from helpers.cases import LOSSES, Case, make_inputs
from helpers.problems import SHAPE, problem

EVERY_CASE = pytest.mark.parametrize("case", LOSSES, ids=str)
REDUCIBLE = pytest.mark.parametrize(
    "case", [c for c in LOSSES if "log_prob" not in c.name], ids=str
)
WITH_TARGET = pytest.mark.parametrize(
    "case", [c for c in LOSSES if c.target not in ("labels", "none")], ids=str
)


pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.parametrize("backend", ["native"], indirect=True),
]


def reductions(case: Case) -> list[dict[str, object]]:
    """What to try: no reduction, the mean of weighted rows, batchmean."""
    if "log_prob" in case.name:
        return [{}]
    mean: dict[str, object] = {"reduction": "mean"}
    if case.name != "entropy":
        mean["token_weight"] = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    return [{"reduction": "none"}, mean, {"reduction": "batchmean"}]


@EVERY_CASE
def test_gradcheck(case: Case) -> None:
    for options in reductions(case):
        loss, inputs = problem(case, **options)
        assert gradcheck(loss, inputs, check_forward_ad=True, check_batched_grad=True)


@EVERY_CASE
def test_gradgradcheck(case: Case) -> None:
    for options in reductions(case):
        loss, inputs = problem(case, **options)
        # Every entry without a reduction, random directions with one.
        assert gradgradcheck(loss, inputs, fast_mode=options.get("reduction", "none") != "none")


SUMS = [c for c in LOSSES if c.divergence and c.name != "renyi_div"]


@pytest.mark.parametrize("case", SUMS, ids=str)
def test_pointwise(case: Case) -> None:
    """Every term of the divergence; computed by the reference, so not under "native"."""
    weight = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    with fastdiv.backend("auto"):
        loss, inputs = problem(case, reduction="pointwise", token_weight=weight)
        assert gradcheck(loss, inputs, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(loss, inputs, fast_mode=True)
        rows, _ = problem(case, reduction="none", token_weight=weight)
        torch.testing.assert_close(loss(*inputs).sum(-1), rows(*inputs))


@EVERY_CASE
def test_second_derivative_is_the_references(case: Case) -> None:
    """create_graph=True with an upstream gradient that has a gradient of its own."""

    def second(backend: str) -> list[Tensor]:
        with fastdiv.backend(backend):
            loss, inputs = problem(case)
            value = loss(*inputs)
            upstream = torch.linspace(-1, 2, value.numel(), dtype=torch.float64).view_as(value)
            upstream.requires_grad_()
            first = torch.autograd.grad(value, inputs, upstream, create_graph=True)
            norm = sum((g**2).sum() for g in first)
            return [*first, *torch.autograd.grad(norm, [*inputs, upstream])]

    for got, expected in zip(second("native"), second("reference"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@EVERY_CASE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_of_value_and_gradients(case: Case, dtype: torch.dtype) -> None:
    x, t = make_inputs(SHAPE, dtype)
    target = case.make_target(x, t)
    value = case.call(x.requires_grad_(), target)
    value.sum().backward()
    assert value.dtype == torch.float32
    assert x.grad is not None and x.grad.dtype == dtype


@EVERY_CASE
def test_accumulation_and_retain_graph(case: Case) -> None:
    loss, inputs = problem(case)
    value = loss(*inputs).sum() * 3  # a gradient of the forward must not be scaled twice
    value.backward(retain_graph=True)
    once = [v.grad.clone() for v in inputs]
    value.backward()
    for v, g in zip(inputs, once, strict=True):
        assert torch.equal(v.grad, 2 * g)  # the second backward gave the same bits
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        value.backward()


@EVERY_CASE
def test_upstream_gradient(case: Case) -> None:
    """Linear in the upstream gradient, also where that is strided, expanded or zero."""
    loss, inputs = problem(case)
    value = loss(*inputs)
    if not value.dim():
        for factor in (0.0, -3.0):
            one = torch.autograd.grad(value, inputs, retain_graph=True)
            upstream = torch.tensor(factor, dtype=torch.float64)
            for g, o in zip(torch.autograd.grad(value, inputs, upstream, True), one, strict=True):
                torch.testing.assert_close(g, factor * o)
        return
    upstream = torch.randn(*value.shape, 2, dtype=torch.float64)[..., 1]  # strided
    upstream[..., 0] = 0
    total = [torch.zeros_like(v) for v in inputs]
    for index in range(value.numel()):
        one = torch.autograd.grad(value.flatten()[index], inputs, retain_graph=True)
        total = [s + upstream.flatten()[index] * g for s, g in zip(total, one, strict=True)]
    for g, expected in zip(torch.autograd.grad(value, inputs, upstream, True), total, strict=True):
        torch.testing.assert_close(g, expected)


@WITH_TARGET
@pytest.mark.parametrize("create_graph", [False, True])
def test_one_side_only(case: Case, create_graph: bool) -> None:
    """Either gradient alone is the one that both together give."""
    loss, inputs = problem(case)
    both = torch.autograd.grad(loss(*inputs).sum(), inputs)
    for side, expected in enumerate(both):
        (asked,) = torch.autograd.grad(
            loss(*inputs).sum(), [inputs[side]], create_graph=create_graph
        )
        assert torch.equal(asked, expected)
        others = [v if i == side else v.detach() for i, v in enumerate(inputs)]
        (only,) = torch.autograd.grad(
            loss(*others).sum(), [inputs[side]], create_graph=create_graph
        )
        assert torch.equal(only, expected)
        assert asked.requires_grad == only.requires_grad == create_graph
