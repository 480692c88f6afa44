"""Derivatives of the kernels themselves, in double: both sides, every order, every reduction."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fastdiv
from helpers.cases import KERNELS, LOSSES, Case, make_inputs

EVERY_CASE = pytest.mark.parametrize("case", LOSSES, ids=str)
REDUCIBLE = pytest.mark.parametrize(
    "case", [c for c in LOSSES if "log_prob" not in c.name], ids=str
)
WITH_TARGET = pytest.mark.parametrize(
    "case", [c for c in LOSSES if c.target not in ("labels", "none")], ids=str
)
SHAPE = (3, 3)


@pytest.fixture(autouse=True)
def native_backend() -> Iterator[None]:
    with fastdiv.backend("native"):
        yield


def problem(case: Case, **options: object) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The loss as a function of logits of both sides, and where to differentiate it.

    Log-probabilities and probabilities come from logits inside the function: a perturbed target
    stays a distribution.
    """
    x, t = make_inputs(SHAPE, torch.float64, scale=1.5)
    x.requires_grad_()
    if case.target in ("labels", "none"):
        target = case.make_target(x, t)
        return lambda x: case.call(x, target, **options), [x]

    def loss(x: Tensor, t: Tensor) -> Tensor:
        as_target = {
            "logits": lambda: t,
            "log_probs": lambda: t.log_softmax(-1),
            "probs": lambda: t.softmax(-1),
        }
        return case.call(x, as_target[case.target](), **options)

    return loss, [x, t.requires_grad_()]


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
    value = loss(*inputs).sum()
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


# --- inplace_backward -----------------------------------------------------------------------------

CAN = [c for c in KERNELS if c.name in ("cross_entropy", "topk_kl_div") or c.divergence]
INPLACE = pytest.mark.parametrize("case", CAN, ids=str)


class Logits:
    """Logits that a layer computed, kept so that what became of their memory can be seen.

    The layer is an addition, which needs its result no more.
    """

    def __init__(self, leaf: Tensor, dim: int = -1) -> None:
        self.bias = torch.zeros_like(leaf).requires_grad_()
        self.computed = leaf + self.bias
        self.pointer = self.computed.data_ptr()
        self.version = self.computed._version
        self.grad: Tensor | None = None
        self.computed.register_hook(self.keep)

    def keep(self, grad: Tensor) -> None:
        self.grad = grad


@INPLACE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("shape", [(4, 7), (3, 1031), (1, 8193)], ids=str)
def test_in_place(case: Case, dtype: torch.dtype, reduction: str, shape: tuple[int, int]) -> None:
    x, t = make_inputs(shape, dtype)
    target = case.make_target(x, t)
    if target is not None and target.is_floating_point():
        target.requires_grad_()

    def gradients(inplace: bool) -> tuple[Logits, list[Tensor]]:
        logits = Logits(x)
        options = {"reduction": reduction, "inplace_backward": inplace}
        value = case.call(logits.computed, target, **options)
        sides = [logits.bias] + ([target] if target.requires_grad else [])
        upstream = torch.linspace(1, 2, value.numel()).to(value.dtype).view_as(value)
        return logits, list(torch.autograd.grad(value, sides, upstream))

    fresh, expected = gradients(inplace=False)
    assert fresh.grad.data_ptr() != fresh.pointer
    assert torch.equal(fresh.computed, x)
    logits, got = gradients(inplace=True)
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g, e)
    assert logits.grad.data_ptr() == logits.pointer
    assert logits.computed._version > logits.version
    assert torch.equal(logits.computed, expected[0])


@pytest.mark.parametrize("case", [c for c in CAN if c.target != "labels"], ids=str)
def test_in_place_of_one_side(case: Case) -> None:
    """Where only the target wants a gradient, the logits are left as they are."""
    loss, inputs = problem(case, inplace_backward=True)
    x, t = inputs[0].detach(), inputs[1]
    before = x.clone()
    (dt,) = torch.autograd.grad(loss(x, t).sum(), [t])
    plain, _ = problem(case)
    assert torch.equal(dt, torch.autograd.grad(plain(x, t).sum(), [t])[0])
    assert torch.equal(x, before)


@INPLACE
def test_in_place_where_it_cannot_be(case: Case) -> None:
    loss, inputs = problem(case, inplace_backward=True)
    with pytest.raises(ValueError, match="leaf"):
        loss(*inputs)
    with pytest.raises(RuntimeError, match="inplace_backward"):
        torch.autograd.grad(loss(inputs[0] * 1, *inputs[1:]).sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="inplace_backward"):
        torch.func.grad(lambda x: loss(x * 1, *inputs[1:]).sum())(inputs[0].detach())


@INPLACE
def test_in_place_is_noticed(case: Case) -> None:
    """Who else needs the logits for a backward gets torch's error, not a wrong gradient."""
    loss, inputs = problem(case, inplace_backward=True)
    logits = inputs[0] * 1
    value = loss(logits, *inputs[1:]).sum()
    other = logits.exp() * logits  # saves the logits
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@INPLACE
def test_in_place_through_views(case: Case) -> None:
    """Classes that are not last are copied into rows first; a slice of a larger buffer is not."""
    x, t = make_inputs((4, 5, 3), torch.float64)
    for dim in (0, 1, 2):
        moved, teacher = x.movedim(2, dim).contiguous(), t.movedim(2, dim).contiguous()
        target = teacher.argmax(dim) if case.target == "labels" else teacher.softmax(dim)
        if case.target == "log_probs":
            target = target.log()
        results = []
        for inplace in (False, True):
            leaf = torch.zeros_like(moved).requires_grad_()
            value = case.call(
                moved + leaf, target, dim=dim, reduction="sum", inplace_backward=inplace
            )
            results.append(torch.autograd.grad(value, leaf)[0])
        torch.testing.assert_close(*results, rtol=0, atol=0)
    wide = torch.randn(6, 9, dtype=torch.float64)
    leaf = torch.zeros_like(wide).requires_grad_()
    logits = wide + leaf
    target = case.make_target(logits[1:5, 2:7], torch.randn(4, 5, dtype=torch.float64))
    before = logits.detach().clone()
    case.call(logits[1:5, 2:7], target, reduction="sum", inplace_backward=True).backward()
    inside = torch.zeros_like(wide, dtype=torch.bool)
    inside[1:5, 2:7] = True
    assert torch.equal(logits[~inside], before[~inside]), "written outside the slice"
    assert (leaf.grad[~inside] == 0).all() and (leaf.grad[inside] != 0).all()
