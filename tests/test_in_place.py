"""Gradients in place are refused where the memory of the logits holds something else, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import fastdiv
import fastdiv.distributed as sharded
from helpers import shard_arguments
from helpers.cases import PUBLIC_LOSSES, TopKCase
from helpers.in_place_calls import PROGRAMS, leaf, takes_it, target_of
from helpers.ranks import Ranks
from helpers.values import same

pytestmark = pytest.mark.usefixtures("gloo")

# Of the options of one function and its module, one.
SOME = {name: p for name, p in PROGRAMS.items() if not p[0].options}
EVERY_PROGRAM = pytest.mark.parametrize("name", PROGRAMS)
SOME_PROGRAMS = pytest.mark.parametrize("name", SOME)


def test_every_function_and_module_is_looked_at() -> None:
    tested = " ".join(PROGRAMS)
    functions = [n for n in PUBLIC_LOSSES if takes_it(getattr(fastdiv, n))]
    functions += [f"distributed.{n}" for n in sharded.__all__ if takes_it(getattr(sharded, n))]
    functions += [f"nn.{n}" for n in fastdiv.nn.__all__ if takes_it(getattr(fastdiv.nn, n))]
    assert not [name for name in functions if name not in tested]


# --- views of a leaf ---


class Alias(torch.autograd.Function):
    """A function that gives back the memory of its argument."""

    @staticmethod
    def forward(ctx: Any, p: Tensor) -> Tensor:
        return p.view(4, 7)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.view(28)


def leaf_on_a_buffer() -> tuple[Tensor, Tensor]:
    """A leaf that is a view of a tensor without gradient, as a part of a flat buffer is."""
    p = torch.randn(40)[4:32].requires_grad_()
    return p, p.view(4, 7)


def without_a_graph() -> tuple[Tensor, Tensor]:
    """A view that autograd takes for a leaf."""
    p = leaf(28)
    with torch.no_grad():
        return p, p.view(4, 7)


def viewed(view: Callable[[Tensor], Tensor], *shape: int) -> Callable[[], tuple[Tensor, Tensor]]:
    def make() -> tuple[Tensor, Tensor]:
        p = leaf(*shape)
        return p, view(p)

    return make


VIEWS_OF_LEAVES = {
    "leaf": viewed(lambda p: p, 4, 7),
    "view": viewed(lambda p: p.view(4, 7), 28),
    "rows": viewed(lambda p: p[:4], 6, 7),
    "columns": viewed(lambda p: p[:, 1:8], 4, 9),
    "dimension": viewed(lambda p: p[None][0], 4, 7),
    "transposed": viewed(lambda p: p.t(), 7, 4),
    "one of several": viewed(lambda p: p.unbind(0)[1], 2, 4, 7),
    "view of a view": viewed(lambda p: p.unsqueeze(0).flatten().view(7, 4).t(), 28),
    "function": viewed(Alias.apply, 28),
    "buffer": leaf_on_a_buffer,
    "no_grad": without_a_graph,
}


@EVERY_PROGRAM
def test_a_view_of_a_leaf_is_refused(name: str) -> None:
    case, call = PROGRAMS[name]
    t = target_of(case, torch.randn(4, 7))
    says = r"inplace_backward=True would overwrite a leaf tensor of shape \(.*\).*: use"
    for make in VIEWS_OF_LEAVES.values():
        p, x = make()
        before = p.detach().clone()
        with pytest.raises(ValueError, match=says):
            call(x, t, inplace_backward=True)
        call(x, t).sum().backward()  # a fresh gradient
        assert p.detach().equal(before)


def test_reference_refuses_the_same(backend: str) -> None:
    for view in VIEWS_OF_LEAVES.values():
        with pytest.raises(ValueError, match="leaf"):
            fastdiv.cross_entropy(view()[1], torch.arange(4), inplace_backward=True)
    with pytest.raises(ValueError, match="overlaps itself"):
        fastdiv.kl_div(
            (leaf(7) * 1).expand(4, 7),
            torch.randn(4, 7),
            target_type="logits",
            inplace_backward=True,
        )


def test_without_a_gradient_nothing_is_written() -> None:
    p, t = leaf(4, 7), leaf(4, 7)
    for x in (p.detach(), p.detach().view(28).view(4, 7), p[0].detach().expand(4, 7)):
        before = x.clone()
        fastdiv.kl_div(x, t, target_type="logits", inplace_backward=True).backward()
        assert x.equal(before)
    # The target's gradient needs the logits, which nobody overwrites here.
    fastdiv.kl_div(p.detach(), p, target_type="logits", inplace_backward=True).backward()


def test_a_dtensor_leaf_is_refused() -> None:
    mesh = init_device_mesh("cpu", (1,))
    p = torch.nn.Parameter(distribute_tensor(torch.randn(4, 7), mesh, [Shard(1)]))
    t = distribute_tensor(torch.randn(4, 7), mesh, [Shard(1)])
    before = p.to_local().detach().clone()
    for x in (p, p.view(4, 7), p[:4], p[None][0]):
        with pytest.raises(ValueError, match="leaf"):
            fastdiv.kl_div(x, t, target_type="logits", inplace_backward=True)
    assert p.to_local().equal(before)
    expected = fastdiv.kl_div(p, t, target_type="logits")
    computed = p * 1
    fastdiv.kl_div(computed, t, target_type="logits", inplace_backward=True).backward()
    got, p.grad = p.grad, None
    expected.backward()
    assert isinstance(got, DTensor) and isinstance(p.grad, DTensor)
    same(got.to_local(), p.grad.to_local())
    both = p * 1
    with pytest.raises(ValueError, match="target"):
        fastdiv.kl_div(both, both.detach(), target_type="logits", inplace_backward=True)


# --- logits that overlap ---

OVERLAPPING = {
    "expanded": lambda: (leaf(7) * 1).expand(4, 7),
    "one number": lambda: (leaf(1, 1) * 1).expand(4, 7),
    "windows": lambda: (leaf(10) * 1).unfold(0, 7, 1),
    "strided": lambda: (leaf(40) * 1).as_strided((4, 7), (3, 2)),
}


@EVERY_PROGRAM
def test_logits_that_overlap_themselves_are_refused(name: str) -> None:
    case, call = PROGRAMS[name]
    t = target_of(case, torch.randn(4, 7))
    for make in OVERLAPPING.values():
        x = make()
        before = x.detach().clone()
        with pytest.raises(ValueError, match=r"input of shape .* and strides .* overlaps itself"):
            call(x, t, inplace_backward=True)
        call(x, t).sum().backward()
        assert x.detach().equal(before)


# Logits and another tensor of their shape that overlap.
SHARED = {
    "rows": lambda v: (v[1:5, :7], v[:4, :7]),
    "the same": lambda v: (v[:4, :7], v[:4, :7]),
    "columns": lambda v: (v[:4, :7], v[:4, 3:10]),
    "transposed": lambda v: (v[:4, :7], v[:7, :4].t()),
}


@pytest.mark.parametrize("name", [name for name, p in PROGRAMS.items() if p[0].target != "labels"])
def test_a_target_in_the_memory_of_the_logits_is_refused(name: str) -> None:
    case, call = PROGRAMS[name]
    for views in SHARED.values():
        big = torch.rand(9, 14).requires_grad_() * 1  # also probabilities, of a sort
        x, other = views(big)
        argument, t = "target", other.detach()
        if isinstance(case, TopKCase):
            argument, t = "values", (t, torch.arange(7).expand(4, 7))
        before = big.detach().clone()
        with pytest.raises(ValueError, match=rf"overwrite {argument} .* shares memory with input"):
            call(x, t, inplace_backward=True)
        call(x, t).sum().backward()
        assert big.detach().equal(before)


@pytest.mark.parametrize("name", [n for n in SOME if n != "nn.LabelSmoothingLoss"])
def test_weights_in_the_memory_of_the_logits_are_refused(name: str) -> None:
    case, call = SOME[name]
    x = torch.rand(4, 7).requires_grad_() * 1
    t = target_of(case, torch.randn(4, 7))
    weights = {"token_weight": x[:, 2].detach()}
    if case.name == "cross_entropy":
        weights["weight"] = x[1].detach()
    before = x.detach().clone()
    for argument, weight in weights.items():
        with pytest.raises(ValueError, match=f"overwrite {argument} "):
            call(x, t, inplace_backward=True, **{argument: weight})
        assert x.detach().equal(before)
        call(x, t, inplace_backward=True, **{argument: weight.clone()})


def test_memory_that_came_by_another_way() -> None:
    """Two tensors of torch may be on one array of NumPy: it is the address that counts."""
    x = torch.randn(4, 7).requires_grad_() * 1
    if not x.is_cpu:
        pytest.skip("about NumPy")
    t = torch.from_numpy(x.detach().numpy())
    with pytest.raises(ValueError, match="target"):
        fastdiv.js_div(x, t, target_type="logits", inplace_backward=True)


# --- what stays allowed ---

# Logits, and a target that shares their storage, but no memory.
APART = {
    "rows": lambda v: (v[:4, :7], v[4:8, :7]),
    "columns": lambda v: (v[:4, :7], v[:4, 7:14]),
    "every other column": lambda v: (v[:4, ::2], v[:4, 1::2]),
    "every other row": lambda v: (v[:8:2, :7], v[1:8:2, :7]),
    "transposed": lambda v: (v[:7, :4].t(), v[:7, 4:8].t()),
}


@SOME_PROGRAMS
def test_parts_of_one_storage(name: str) -> None:
    case, call = SOME[name]
    start = torch.randn(9, 14)

    def gradient(views: Any, in_place: bool) -> Tensor:
        p = start.clone().requires_grad_()
        x, other = views(p * 1)
        t = target_of(case, other.detach())  # of logits itself
        call(x, t, inplace_backward=in_place).sum().backward()
        assert p.grad is not None
        return p.grad

    for views in APART.values():
        assert gradient(views, True).equal(gradient(views, False))


@pytest.mark.parametrize("name", [n for n in SOME if n != "nn.LabelSmoothingLoss"])
def test_shifted_tokens(name: str) -> None:
    """The logits of all tokens but the last, as rows that have to be copied."""
    case, call = SOME[name]
    teacher, start, dim = torch.randn(2, 3, 7), torch.randn(2, 4, 7), {"dim": -1}

    def gradient(in_place: bool) -> Tensor:
        p = start.clone().requires_grad_()
        x = (p * 1)[:, :-1]
        call(x, target_of(case, teacher), inplace_backward=in_place, **dim).sum().backward()
        assert p.grad is not None
        return p.grad

    assert gradient(True).equal(gradient(False))


def test_compiled_code_makes_a_fresh_gradient() -> None:
    """It writes nothing to the logits, so that they may share memory."""
    big = torch.randn(5, 7)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(p: Tensor) -> Tensor:
        x = p * 1
        t = x[:-1].detach()
        return fastdiv.kl_div(x[1:], t, target_type="logits", inplace_backward=True)

    p = big.clone().requires_grad_()
    (got,) = torch.autograd.grad(loss(p), p)
    x = big.clone().requires_grad_()
    value = fastdiv.kl_div(x[1:], big[:-1], target_type="logits")
    same(got, torch.autograd.grad(value, x)[0])


def test_tensors_without_memory_share_none() -> None:
    x = torch.empty(4, 7, device="meta").requires_grad_() * 1
    t = torch.empty(4, 7, device="meta")
    value = fastdiv.kl_div(x, t, target_type="logits", inplace_backward=True)
    assert torch.autograd.grad(value, x)[0].is_meta


@pytest.mark.cpu_only("the ranks of these tests are processes of the CPU")
def test_ranks(ranks: Ranks) -> None:
    ranks.run(2, shard_arguments.in_place)
