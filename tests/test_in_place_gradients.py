"""inplace_backward writes the gradient over the logits, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastdiv
from helpers.cases import KERNELS, Case, TopKCase, make_inputs
from helpers.problems import problem
from helpers.values import uneven, value_and_gradients

pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.parametrize("backend", ["native"], indirect=True),
]


def rows_of(case: Case) -> tuple[Tensor, Tensor | None]:
    x, logits = make_inputs((4, 601), torch.float32)
    return x, case.make_target(x, logits)


CAN = [c for c in KERNELS if c.name == "cross_entropy" or c.divergence or isinstance(c, TopKCase)]
IN_PLACE = pytest.mark.parametrize("case", CAN, ids=str)


class Logits:
    """Logits that a layer computed, kept so that what became of their memory can be seen.

    The layer is an addition, which needs its result no more.
    """

    def __init__(self, leaf: Tensor) -> None:
        self.bias = torch.zeros_like(leaf).requires_grad_()
        self.computed = leaf + self.bias
        self.pointer = self.computed.data_ptr()
        self.version = self.computed._version
        self.grad: Tensor | None = None
        self.computed.register_hook(self.keep)

    def keep(self, grad: Tensor) -> None:
        self.grad = grad


@IN_PLACE
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


@IN_PLACE
def test_in_place_where_it_cannot_be(case: Case) -> None:
    loss, inputs = problem(case, inplace_backward=True)
    with pytest.raises(ValueError, match="leaf"):
        loss(*inputs)
    with pytest.raises(RuntimeError, match="inplace_backward"):
        torch.autograd.grad(loss(inputs[0] * 1, *inputs[1:]).sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="inplace_backward"):
        torch.func.grad(lambda x: loss(x * 1, *inputs[1:]).sum())(inputs[0].detach())


@IN_PLACE
def test_in_place_is_noticed(case: Case) -> None:
    """Another backward that needs the logits raises torch's error; no gradient is wrong."""
    loss, inputs = problem(case, inplace_backward=True)
    logits = inputs[0] * 1
    value = loss(logits, *inputs[1:]).sum()
    other = logits.exp() * logits  # saves the logits
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@IN_PLACE
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


@pytest.mark.parametrize("producer", [torch.softmax, torch.log_softmax, lambda x, _: x.exp()])
@IN_PLACE
def test_in_place_below_a_producer_that_saved_its_output_raises(case: Case, producer) -> None:
    # Its backward would compute with gradients in place of its output, without a word.
    x, t = rows_of(case)
    logits = producer(x.requires_grad_(), -1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        case.call(logits, t, inplace_backward=True).backward()


@IN_PLACE
def test_in_place_moves_the_version_counter(case: Case) -> None:
    # What writes behind autograd's back cannot be caught by it.
    x, t = rows_of(case)
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
@IN_PLACE
def test_the_forward_writes_to_no_input(case: Case, grad_mode: bool) -> None:
    # Rows that are ignored were zeroed in the caller's memory, even under no_grad.
    x, t = rows_of(case)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@IN_PLACE
def test_in_place_backward_writes_the_rows_of_a_slice_and_nothing_else(
    case: Case, dtype: torch.dtype
) -> None:
    classes = 601
    x, logits = make_inputs((5, classes), dtype)
    t = case.make_target(x, logits)
    expected = value_and_gradients(lambda x: case.call(x, t, **case.per_row), x, upstream=uneven)
    leaf = torch.randn(7, classes + 8).to(dtype).requires_grad_()
    big = leaf * 1
    rows = big[1:6, 3 : 3 + classes]
    with torch.no_grad():
        rows.copy_(x)
    before = big.detach().clone()
    value = case.call(rows, t, inplace_backward=True, **case.per_row)
    assert big.detach().equal(before), "the forward wrote to its input"
    upstream = torch.linspace(0.5, 1.5, 5, dtype=value.dtype)
    (grad,) = torch.autograd.grad(value, rows, upstream)
    assert grad.equal(expected[1])
    assert grad.data_ptr() == rows.data_ptr()
    after, (top, left) = big.detach().clone(), (slice(1, 6), slice(3, 3 + classes))
    assert after[top, left].equal(expected[1])
    after[top, left] = before[top, left] = 0
    assert after.equal(before)
