"""patch_torch: values, gradients and errors, beside the function that was not patched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.torch_patched import TORCHS, calls_of_ours, patched, torch_has_its_own
from helpers.values import uneven, value_and_gradients

gradients = partial(value_and_gradients, upstream=uneven)


@pytest.fixture(autouse=True)
def reversed_by_all() -> Iterator[None]:
    yield from torch_has_its_own()


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return calls_of_ours(monkeypatch)


def agree(calls: list[Any], target: Tensor | None, *leaves: Tensor, **options: Any) -> None:
    """Value, gradients and their dtypes are torch's; of target None the second leaf is it."""
    fixed = () if target is None else (target,)
    results = []
    for function in (patched, TORCHS):
        calls.clear()
        call = partial(function, **options)
        results.append(gradients(lambda *v, call=call: call(*v, *fixed), *leaves))
        assert len(calls) == (function is patched)
    lowest = min((v.dtype for v in leaves), key=lambda dtype: -torch.finfo(dtype).eps)
    tolerance = {"rtol": 1e-11, "atol": 1e-12} if lowest is torch.float64 else {}
    if lowest in (torch.float16, torch.bfloat16):  # which torch computes in halves all along
        tolerance = {"rtol": 4 * torch.finfo(lowest).eps, "atol": 2 * torch.finfo(lowest).eps}
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **tolerance, equal_nan=True)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(9,), (6, 9), (4, 9, 5), (2, 9, 3, 2), (1, 9), (2, 1)]
WEIGHTED_AND_SMOOTHED = [(False, 0.0), (True, 0.0), (False, 0.1), (True, 0.1), (True, 1)]


@dataclass
class Problem:
    """What labels and probabilities are tried with."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    reduction: str
    class_options: tuple[bool, float]  # whether there are class weights; the smoothing

    @property
    def dim(self) -> int:
        return 1 if len(self.shape) > 1 else 0

    def logits(self) -> Tensor:
        return (torch.randn(self.shape) * 3).to(self.dtype)

    def options(self) -> dict[str, Any]:
        weighted, smoothing = self.class_options
        weight = (torch.rand(self.shape[self.dim]) + 0.1).to(self.dtype) if weighted else None
        return {"weight": weight, "label_smoothing": smoothing, "reduction": self.reduction}

    def labels(self, ignore_index: int) -> Tensor:
        shape = self.shape[: self.dim] + self.shape[self.dim + 1 :]
        y = torch.randint(self.shape[self.dim], shape)
        if y.numel() > 1:
            y.view(-1)[1] = ignore_index
        return y


PROBLEMS = product(SHAPES, DTYPES, ["mean", "sum", "none"], WEIGHTED_AND_SMOOTHED)
each_problem = pytest.mark.parametrize("problem", [Problem(*p) for p in PROBLEMS], ids=str)


@each_problem
def test_labels(ours: list[Any], problem: Problem) -> None:
    x, options = problem.logits(), problem.options()
    for ignore_index in (-100, 0, 20):
        agree(ours, problem.labels(ignore_index), x, **options, ignore_index=ignore_index)


@each_problem
def test_probabilities(ours: list[Any], problem: Problem) -> None:
    """Fixed, and with a gradient of their own."""
    x, options = problem.logits(), problem.options()
    p = torch.randn(problem.shape).softmax(problem.dim).to(problem.dtype)
    agree(ours, p, x, **options)
    agree(ours, None, x, p, **options)


@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probabilities_of_another_dtype(
    ours: list[Any], dtype: torch.dtype, target: torch.dtype
) -> None:
    x, p = torch.randn(4, 9).to(dtype), torch.randn(4, 9).softmax(1).to(target)
    got, expected = (gradients(function, x, p) for function in (patched, TORCHS))
    assert len(ours) == 1
    eps = max(torch.finfo(dtype).eps, torch.finfo(target).eps)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_autocast(
    ours: list[Any], dtype: torch.dtype, cast: torch.dtype, soft: bool, weighted: bool
) -> None:
    x = torch.randn(4, 9).to(dtype)
    target = torch.randn(4, 9).softmax(1).to(dtype) if soft else torch.tensor([0, 8, -100, 3])
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    given = {"weight": (torch.rand(9) + 0.1).to(wide) if weighted else None}

    def under(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            with torch.autocast(x.device.type, cast):
                return function(x, target, **given)

        return call

    got, expected = (gradients(under(function), x) for function in (patched, TORCHS))
    assert len(ours) == 1
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1], expected[1])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_no_rows_that_count(ours: list[Any], reduction: str, smoothing: float) -> None:
    """A mean of nothing is NaN, its gradient 0."""
    given = {"reduction": reduction, "label_smoothing": smoothing}
    for x, y in (
        (torch.randn(3, 9), torch.full((3,), -100)),
        (torch.randn(0, 9), torch.zeros(0, dtype=torch.int64)),
        (torch.randn(2, 9, 0), torch.zeros(2, 0, dtype=torch.int64)),
        (torch.randn(0, 9), torch.zeros(0, 9)),
    ):
        got, expected = (gradients(partial(f, target=y, **given), x) for f in (patched, TORCHS))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)
    assert len(ours) == 4


def test_strided_logits(ours: list[Any]) -> None:
    x, y = torch.randn(9, 12, 2)[:, ::2, 0].t(), torch.tensor([0, 8, -100, 3, 1, 1])
    assert not x.is_contiguous()
    agree(ours, y, x)
    agree(ours, torch.randint(9, (2, 3, 2)), torch.randn(2, 3, 2, 9).movedim(-1, 1))


X, Y = torch.randn(4, 5), torch.tensor([0, 4, -100, 2])
P = X.softmax(1)


class Tagged(Tensor):
    pass


OTHERS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "size_average": ((X, Y), {"size_average": False}),
    "reduce": ((X, Y), {"reduce": False}),
    "int32 labels": ((X, Y.int()), {}),
    "uint8 labels": ((X, Y.clamp(0).byte()), {}),
    "integer logits": ((X.long(), Y), {}),
    "complex logits": ((X.to(torch.complex64), Y), {}),
    "a label of shape (1,)": ((X[0], Y[:1]), {}),
    "no classes": ((X[:, :0], Y), {}),
    "a scalar": ((X[0, 0], Y), {}),
    "too few labels": ((X, Y[:3]), {}),
    "labels of another shape": ((X, Y[None]), {}),
    "probabilities of another shape": ((X, P[:, :4]), {}),
    "probabilities and ignore_index": ((X, P), {"ignore_index": 2}),
    "a label too large": ((X, Y + 2), {}),
    "a negative label": ((X, Y - 1), {"ignore_index": -101, "label_smoothing": 0.1}),
    "smoothing of 2": ((X, Y), {"label_smoothing": 2.0}),
    "smoothing of NaN": ((X, Y), {"label_smoothing": float("nan")}),
    "smoothing by name": ((X, Y), {"label_smoothing": "0.1"}),
    "ignore_index by name": ((X, Y), {"ignore_index": "no"}),
    "batchmean": ((X, Y), {"reduction": "batchmean"}),
    "elementwise_mean": ((X, Y), {"reduction": "elementwise_mean"}),
    "no reduction": ((X, Y), {"reduction": None}),
    "too few weights": ((X, Y, torch.ones(4)), {}),
    "weights in a column": ((X, Y, torch.ones(5, 1)), {}),
    "double weights": ((X, Y, torch.ones(5).double()), {}),
    "double weights of probabilities": ((X, P, torch.ones(5).double()), {}),
    "integer weights": ((X, P, torch.arange(5)), {}),
    "meta": ((X.to("meta"), Y.to("meta")), {}),
    "labels elsewhere": ((X, Y.to("meta")), {}),
    "sparse": ((X.to_sparse(), Y), {}),
    "a list": (([1.0, 2.0], Y), {}),
    "a list of labels": ((X, [0, 1, 2, 3]), {}),
    "a list of weights": ((X, Y, [1.0] * 5), {}),
    "a subclass": ((X.as_subclass(Tagged), Y), {}),
    "an unknown argument": ((X, Y), {"temperature": 2.0}),
    "too many arguments": ((X, Y, None, None, -100, None, "mean", 0.0, 1.0), {}),
    "no target": ((X,), {}),
}


def outcome(function: Callable[..., Tensor], *args: Any, **given: Any) -> Any:
    try:
        value = function(*args, **given)
    except Exception as error:
        return type(error), str(error)
    return type(value), value.dtype, value.device.type, None if value.is_meta else value.tolist()


@pytest.mark.cpu_only("some of these end a GPU's context")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OTHERS)
def test_other_calls_are_torchs(ours: list[Any], name: str) -> None:
    """The same bits or the same error, in the same words."""
    args, given = OTHERS[name]
    expected = outcome(TORCHS, *args, **given)
    assert outcome(patched, *args, **given) == expected
    assert not ours or "label" in name and expected[0] is IndexError


def test_weights_with_a_derivative_are_torchs(ours: list[Any]) -> None:
    x, p, weight = torch.randn(4, 9), torch.randn(4, 9).softmax(1), torch.rand(9) + 0.1

    def by_weight(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda weight: function(x, p, weight)

    def batched(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda weight: torch.vmap(function)(torch.stack([weight, 2 * weight]))

    assert gradients(by_weight(patched), weight)[1].equal(gradients(by_weight(TORCHS), weight)[1])
    for transform in (torch.func.grad, torch.func.jacfwd, batched):
        assert transform(by_weight(patched))(weight).equal(transform(by_weight(TORCHS))(weight))
    tangent = torch.rand(9)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(weight, tangent)
        got, expected = (by_weight(function)(dual) for function in (patched, TORCHS))
        got, expected = map(torch.autograd.forward_ad.unpack_dual, (got, expected))
        assert got.tangent.equal(expected.tangent)
    assert not ours


def test_transforms_and_second_derivatives(ours: list[Any]) -> None:
    x, y = torch.randn(4, 9, dtype=torch.float64), torch.tensor([0, 8, -100, 3])
    for transform in (torch.func.grad, torch.func.hessian, torch.func.jacfwd):
        got, expected = (transform(lambda x, f=f: f(x, y))(x) for f in (patched, TORCHS))
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    got, expected = (torch.vmap(f)(x[:2, None], y[:2, None]) for f in (patched, TORCHS))
    torch.testing.assert_close(got, expected)
    assert torch.autograd.gradgradcheck(lambda x: patched(x, y), x.requires_grad_())
    assert len(ours) > 4
