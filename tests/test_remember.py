"""Checks that a call of the same kind has made: left out, and never where they would raise."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fastdiv
from fastdiv._engine import arguments, remember
from helpers.bits import bits
from helpers.cases import KERNELS, Case, TopKCase, make_inputs
from helpers.recorder import Recorder
from helpers.values import value_and_gradients

pytestmark = pytest.mark.cpu_only("only calls on the CPU are remembered")

X, Y = torch.randn(3, 5), torch.tensor([0, 4, 2])


@pytest.fixture(autouse=True)
def nothing_is_remembered() -> None:
    remember.plans.clear()


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function after which a call fails if it checks its arguments."""

    def check_logits(*_: Any) -> None:
        raise AssertionError("the arguments are checked")

    return lambda: monkeypatch.setattr(arguments, "check_logits", check_logits)


def result(case: Case, x: Tensor, t: Tensor | None, **options: Any) -> list[Tensor]:
    return [bits(v) for v in value_and_gradients(lambda x, t: case.call(x, t, **options), x, t)]


# A loss of a top-k teacher takes more than one call of an op.
ONE_OP = [case for case in KERNELS if not isinstance(case, TopKCase)]


@pytest.mark.parametrize("case", ONE_OP, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_the_bits_are_those_of_a_call_with_checks(
    case: Case, reduction: str, unchecked: Callable[[], None]
) -> None:
    options = {"reduction": reduction} if case.per_row else {}
    x, t = make_inputs((4, 7), torch.float32)
    target, other = case.make_target(x, t), case.make_target(t, x)
    expected = result(case, t, other, **options)
    remember.plans.clear()
    result(case, x, target, **options)
    unchecked()
    for got, wanted in zip(result(case, t, other, **options), expected, strict=True):
        assert torch.equal(got, wanted)


GOOD: dict[str, Any] = {
    "input": X, "target": Y, "weight": torch.ones(5), "token_weight": torch.ones(3),
    "temperature": 1, "z_loss": 0.0, "ignore_index": 1, "reduction": "mean",
    "label_smoothing": 0.5,
}  # fmt: skip


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": True},
        {"z_loss": False},
        {"ignore_index": True},
        {"ignore_index": 1.0},
        {"label_smoothing": torch.tensor(0.5, requires_grad=True)},
        {"reduction": "average"},
        {"weight": torch.ones(5, requires_grad=True)},
        {"weight": torch.ones(4)},
        {"weight": torch.ones(5, dtype=torch.complex64)},
        {"token_weight": torch.ones(5)},
        {"target": torch.tensor([0, 4, 5])},
        {"target": torch.tensor([0.0, 4.0, 2.0])},
        {"target": Y.to_sparse()},
        {"target": torch.tensor([[0, 4, 2]])},
        {"target": Y.to("meta")},
        {"input": X.to_sparse()},
        {"input": X.to_mkldnn()},
        {"input": lambda: torch.nested.nested_tensor([X[0], X[1]])},
        {"input": X.to(torch.int32)},
        {"input": lambda: torch.quantize_per_tensor(X, 0.1, 0, torch.quint8)},
    ],
    ids="-".join,
)
@pytest.mark.filterwarnings("ignore:.*(nested tensors|quantize).*")
def test_what_differs_is_checked(bad: dict[str, Any]) -> None:
    """The error is the one without anything to remember."""
    made = {name: v() if callable(v) else v for name, v in bad.items()}
    with pytest.raises((TypeError, ValueError, IndexError, RuntimeError)) as fresh:
        fastdiv.cross_entropy(**{**GOOD, **made})
    for _ in range(2):
        fastdiv.cross_entropy(**GOOD)
    assert [plan.call is None for plan in remember.plans.values()] == [False]
    with pytest.raises(fresh.type) as later:
        fastdiv.cross_entropy(**{**GOOD, **made})
    assert str(later.value) == str(fresh.value)


def test_one_tensor_as_two_arguments() -> None:
    """Its place says nothing about the places of other tensors."""
    x, t = torch.randn(2, 3, 4)
    assert fastdiv.kl_div(x, x, target_type="logits") == 0
    expected = inspect.unwrap(fastdiv.kl_div)(x, t, target_type="logits")
    for _ in range(2):
        assert fastdiv.kl_div(x, t, target_type="logits") == expected != 0
    assert fastdiv.kl_div(x, x, target_type="logits") == 0


def test_arguments_by_name_in_any_order() -> None:
    v, w = torch.rand(2, 3)
    x, y = torch.randn(3, 3), torch.tensor([0, 1, 1])
    expected = inspect.unwrap(fastdiv.cross_entropy)(x, y, v, token_weight=w)
    for _ in range(2):
        assert fastdiv.cross_entropy(x, y, weight=v, token_weight=w) == expected
        assert fastdiv.cross_entropy(x, y, token_weight=w, weight=v) == expected
        assert fastdiv.cross_entropy(token_weight=w, weight=v, target=y, input=x) == expected
        assert fastdiv.cross_entropy(x, y, v, token_weight=w) == expected
        assert fastdiv.cross_entropy(x, y, weight=w, token_weight=v) != expected


@pytest.mark.parametrize(
    "call",
    [
        lambda x, y: fastdiv.cross_entropy(x.view(1, 3, 5).transpose(1, 2), y.view(1, 3)),
        lambda x, y: fastdiv.cross_entropy(x.t().contiguous().t(), y),
        lambda x, y: fastdiv.cross_entropy(x, y.int()),
        lambda x, y: fastdiv.cross_entropy(x, y, return_stats=True)[0],
        lambda x, y: fastdiv.cross_entropy(x, y, inplace_backward=True),
        lambda x, y: fastdiv.entropy(x, base=2),
        lambda x, y: fastdiv.kl_div(x, x + 1, target_type="logits", reduction="pointwise"),
        lambda x, y: fastdiv.kl_div(x, x.double() + 1, target_type="logits"),
    ],
)
def test_calls_of_more_than_one_op_are_checked(call: Callable[[Tensor, Tensor], Tensor]) -> None:
    first = call(X, Y)
    assert all(plan.call is None for plan in remember.plans.values())
    assert torch.equal(call(X, Y), first)
    fastdiv.cross_entropy(X, Y)
    assert torch.equal(call(X, Y), first)


def test_strides_and_functions_make_a_difference() -> None:
    def values(x: Tensor) -> list[Tensor]:
        rows = [fastdiv.log_prob(x, Y), *fastdiv.log_prob_and_entropy(x, Y)]
        return [fastdiv.cross_entropy(x, Y), *rows]

    expected = fastdiv.cross_entropy(X, Y)
    for x in (X, X.t().contiguous().t(), X):
        loss, log_prob, again, entropy = values(x)
        torch.testing.assert_close(loss, -log_prob.mean())
        torch.testing.assert_close(log_prob, again)
        assert torch.equal(entropy, fastdiv.entropy(x))
        assert torch.equal(loss, expected)


def test_a_leaf_after_logits_that_may_be_overwritten() -> None:
    x = X.clone().requires_grad_()
    for _ in range(2):
        fastdiv.cross_entropy(x * 1, Y, inplace_backward=True).backward()
    with pytest.raises(ValueError, match="leaf"):
        fastdiv.cross_entropy(x, Y, inplace_backward=True)


def test_the_backend_that_is_chosen_now() -> None:
    for name, count in (("auto", 1), ("reference", 0), ("auto", 1), ("native", 1)) * 2:
        with fastdiv.backend(name), Recorder() as record:  # type: ignore[arg-type]
            fastdiv.cross_entropy(X, Y)
        assert len(record.calls) == count, name


def test_transforms_and_tracers() -> None:
    """None of them gets the form that was remembered without it."""

    def loss(x: Tensor) -> Tensor:  # fmt: skip
        return fastdiv.cross_entropy(x, Y)

    x = X.clone().requires_grad_()
    for _ in range(2):
        (expected,) = torch.autograd.grad(loss(x), x)
    assert torch.equal(torch.func.grad(loss)(X), expected)
    assert torch.equal(torch.func.grad(loss)(X), expected)
    batch = torch.stack([X, 2 * X])
    torch.testing.assert_close(torch.vmap(loss)(batch), torch.stack([loss(v) for v in batch]))
    tangent = torch.func.jvp(loss, (X,), (torch.ones_like(X),))[1]
    torch.testing.assert_close(tangent, expected.sum(), atol=1e-6, rtol=0)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), loss(X))
    traced = torch.jit.trace(lambda x, y: fastdiv.cross_entropy(x, y), (X, Y), check_trace=False)
    assert "fastdiv::" not in str(traced.inlined_graph) and "aten::" in str(traced.inlined_graph)
    with FakeTensorMode() as mode:
        assert isinstance(
            fastdiv.cross_entropy(mode.from_tensor(X), mode.from_tensor(Y)), FakeTensor
        )


def test_a_tensor_that_a_transform_left_behind() -> None:
    kept: list[Tensor] = []
    torch.func.grad(lambda v: kept.append(v) or v.sum())(X)  # type: ignore[func-returns-value]
    expected = fastdiv.cross_entropy(X, Y)
    for _ in range(2):
        assert fastdiv.cross_entropy(kept[0], Y) == expected


def test_gradients_and_modes() -> None:
    x = X.clone().requires_grad_()
    for _ in range(2):
        assert fastdiv.cross_entropy(x, Y).requires_grad
        with torch.no_grad():
            assert not fastdiv.cross_entropy(x, Y).requires_grad
        with torch.inference_mode():
            value = fastdiv.cross_entropy(X, Y)
            assert value.is_inference() and fastdiv.cross_entropy(X.clone(), Y) == value
    teacher = torch.inference_mode()(X.clone)()
    for target in (X.clone(), teacher, X.clone(), teacher):
        fastdiv.kl_div(x, target, target_type="logits").backward()
    value = fastdiv.cross_entropy(x, Y)
    with torch.no_grad():
        x += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_only_so_many_kinds_are_remembered() -> None:
    for rows in range(2 * remember.MOST_KINDS + 5):
        fastdiv.entropy(torch.zeros(rows, 2))
        assert 0 < len(remember.plans) <= remember.MOST_KINDS


def test_an_option_that_is_a_tensor_counts_every_time() -> None:
    x, t = torch.randn(2, 4, 8)

    def loss(temperature: torch.Tensor) -> float:
        return fastdiv.kl_div(x, t, target_type="logits", temperature=temperature).item()

    two, four = torch.tensor(2.0), torch.tensor(4.0)
    expected = [
        fastdiv.kl_div(x, t, target_type="logits", temperature=number).item() for number in (2, 4)
    ]
    assert [loss(two), loss(four)] == expected
    assert loss(two.mul_(2)) == expected[1]
