"""LabelSmoothingLoss against the formula that WeNet and ESPnet compute."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiv
from fastdiv.nn import LabelSmoothingLoss
from helpers.cases import make_inputs
from helpers.values import same, value_and_gradients

pytestmark = pytest.mark.usefixtures("backend")

NAN = float("nan")


def wenet(x: Tensor, y: Tensor, padding: int, epsilon: float, by_length: bool) -> Tensor:
    """The class's formula: every true distribution written out, KLDivLoss, padding filled."""
    kept, classes = y != padding, x.shape[-1]
    p = torch.full_like(x, epsilon / max(classes - 1, 1))
    p.scatter_(-1, y.masked_fill(~kept, 0).long().unsqueeze(-1), 1 - epsilon)
    kl = F.kl_div(x.log_softmax(-1), p, reduction="none")
    total = kl.masked_fill(~kept.unsqueeze(-1), 0).sum()
    return total / (kept.sum() if by_length else x.shape[0])


def speech(
    dtype: torch.dtype, padding: int, rows: int = 4, length: int = 6, classes: int = 33
) -> tuple[Tensor, Tensor]:
    """Logits and labels whose ends are padding, one sequence wholly."""
    x = make_inputs((rows, length, classes), dtype)[0]
    y = torch.randint(1, classes, (rows, length))
    for row, kept in enumerate(torch.arange(rows) % length):
        y[row, kept:] = padding
    return x, y


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("padding", [-1, 0, 5])  # 5: also a class, as labels within a sequence
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("labels", [torch.int64, torch.int32])
def test_label_smoothing_is_the_formula(
    labels: torch.dtype, epsilon: float, padding: int, by_length: bool
) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        x, y = speech(dtype, padding)
        module = LabelSmoothingLoss(33, padding, epsilon, by_length)
        actual = value_and_gradients(lambda x: 3 * module(x, y.to(labels)), x)  # noqa: B023
        expected = value_and_gradients(lambda x: 3 * wenet(x, y, padding, epsilon, by_length), x)  # noqa: B023
        assert actual[0].dtype == actual[1].dtype == dtype
        for a, e in zip(actual, expected, strict=True):
            same(a, e, tolerance)


@pytest.mark.parametrize("by_length", [False, True])
def test_label_smoothing_of_padding_only(by_length: bool) -> None:
    x, y = torch.randn(2, 3, 7), torch.full((2, 3), -1)
    expected = value_and_gradients(lambda x: wenet(x, y, -1, 0.1, by_length), x)
    x[0], x[1] = NAN, torch.inf  # of which they would know no gradient
    value, dx = value_and_gradients(LabelSmoothingLoss(7, -1, 0.1, by_length), x, y)
    same(value, expected[0])
    assert value.isnan() if by_length else value == 0
    assert (dx == 0).all() and (expected[1] == 0).all()
    for empty in (torch.zeros(0, 3, 7), torch.zeros(2, 0, 7)):
        labels = torch.zeros(empty.shape[:2], dtype=torch.int64)
        module = LabelSmoothingLoss(7, -1, 0.1, by_length)
        same(module(empty, labels), wenet(empty, labels, -1, 0.1, by_length))


def test_label_smoothing_of_halves_and_of_one_class() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x, y = speech(dtype, -1)
        value, dx = value_and_gradients(LabelSmoothingLoss(33, -1, 0.1), x, y)
        expected = value_and_gradients(lambda x: wenet(x, y, -1, 0.1, False), x.float())  # noqa: B023
        assert value.dtype == torch.float32 and dx.dtype == dtype
        same(value, expected[0])
        same(dx, expected[1].to(dtype), torch.finfo(dtype).eps)
    x, y = torch.randn(2, 3, 1), torch.zeros(2, 3, dtype=torch.int64)
    assert LabelSmoothingLoss(1, -1, 0.0)(x, y) == 0


def test_label_smoothing_in_place(backend: str) -> None:
    x, y = speech(torch.float32, -1)
    expected = value_and_gradients(LabelSmoothingLoss(33, -1, 0.1), x, y)[1]
    leaf = x.clone().requires_grad_()
    logits = leaf * 1
    LabelSmoothingLoss(33, -1, 0.1, inplace_backward=True)(logits, y).backward()
    assert leaf.grad is not None
    same(leaf.grad, expected, 0)
    if backend == "native":
        same(logits.detach(), expected, 0)  # which is where the gradient was written


class WideTensors(TorchDispatchMode):
    """Counts the results of at least so many elements."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.count = elements, 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        results = out if isinstance(out, (tuple, list)) else [out]
        given = {v.data_ptr() for v in args if isinstance(v, Tensor)}
        self.count += sum(
            v.numel() >= self.elements and v.data_ptr() not in given
            for v in results
            if isinstance(v, Tensor)
        )
        return out


def test_label_smoothing_holds_no_distribution(backend: str) -> None:
    x, y = speech(torch.float32, -1)
    x.requires_grad_()
    with WideTensors(x.numel()) as theirs:
        wenet(x, y, -1, 0.1, True).backward()
    with WideTensors(x.numel()) as ours:
        LabelSmoothingLoss(33, -1, 0.1, True)(x, y).backward()
    assert theirs.count > 4
    assert ours.count == 1 or backend == "reference"  # the gradient


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("backend", ["reference"], indirect=True)  # no kernel takes it
def test_no_number_goes_to_the_host(by_length: bool) -> None:
    """A tensor on the meta device has none to give."""
    x = torch.randn(2, 3, 7, device="meta", requires_grad=True)
    y = torch.zeros(2, 3, dtype=torch.int32, device="meta")
    value = LabelSmoothingLoss(7, -1, 0.1, by_length)(x, y)
    value.backward()
    assert value.shape == () and x.grad is not None


@pytest.mark.parametrize("by_length", [False, True])
def test_in_one_graph(by_length: bool) -> None:
    x, y = speech(torch.float32, -1)
    module = LabelSmoothingLoss(33, -1, 0.1, by_length)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(
        value_and_gradients(compiled, x, y), value_and_gradients(module, x, y), strict=True
    ):
        same(actual, expected)


class Recogniser(nn.Module):
    """What WeNet scripts, to export it: the loss is there, but not called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 33)
        self.criterion = LabelSmoothingLoss(33, -1, 0.1)

    @torch.jit.unused
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.criterion(self.layer(x), y)

    @torch.jit.export
    def recognise(self, x: Tensor) -> Tensor:
        return self.layer(x).argmax(-1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_with_it_can_be_scripted() -> None:
    model, x = Recogniser(), torch.randn(2, 4, 3)
    assert torch.jit.script(model).recognise(x).equal(model.recognise(x))
    model(x, torch.zeros(2, 4, dtype=torch.int64)).backward()
    assert model.layer.weight.grad is not None


@pytest.mark.parametrize("mode", [FakeTensorMode, partial(torch.device, "meta")])
def test_without_numbers(mode: Any) -> None:
    """Made where no tensor has values, it is the same loss; it takes tensors of that kind."""
    with fastdiv.backend("auto"), mode():
        module = LabelSmoothingLoss(33, -1, 0.1)
        x, y = torch.zeros(2, 4, 33), torch.zeros(2, 4, dtype=torch.int64)
        assert module(x, y).shape == ()
    x, y = speech(torch.float32, -1)
    assert module(x, y).equal(LabelSmoothingLoss(33, -1, 0.1)(x, y))


def test_copies_and_name() -> None:
    x, y = speech(torch.float32, -1)
    module = LabelSmoothingLoss(33, -1, 0.1)
    for m in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert m(x, y).equal(module(x, y)) and not m.state_dict()
    assert repr(module) == (
        "LabelSmoothingLoss(size=33, padding_idx=-1, smoothing=0.1, normalize_length=False)"
    )


def test_bad_input() -> None:
    x, y = torch.zeros(2, 3, 9), torch.zeros(2, 3, dtype=torch.int64)
    module = LabelSmoothingLoss(9, -1, 0.1)
    for raises, says, call in (
        (ValueError, r"x .*9\), got \(2, 3, 8\)", lambda: module(x[..., :8], y)),
        (ValueError, r"x .*9\), got \(3, 9\)", lambda: module(x[0], y[0])),
        (ValueError, r"target .*\(2, 3\), got \(2, 2\)", lambda: module(x, y[:, :2])),
        (TypeError, "float", lambda: module(x.long(), y)),
        (IndexError, r"target\[0\] is 9", lambda: module(x, y + 9)),
        (ValueError, "smoothing .*1.5", lambda: LabelSmoothingLoss(9, -1, 1.5)),
        (ValueError, "two classes", lambda: LabelSmoothingLoss(1, -1, 0.1)(x[..., :1], y)),
    ):
        with pytest.raises(raises, match=says):
            call()
