"""Losses whose results are compared bit by bit, on rows of every kind at any address."""

from __future__ import annotations

import torch
from torch import Tensor

import fastdiv
from helpers.cases import Case, make_inputs
from helpers.recorder import Recorder
from helpers.values import value_and_gradients


def bits(v: Tensor) -> Tensor:
    """The same numbers as integers: NaN equals itself, -0 is not 0."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return v.detach().view(kinds[v.element_size()])


def evaluate(case: Case, x: Tensor, t: Tensor | None, reduction: str = "none") -> list[Tensor]:
    """Return value, gradient of the logits, and gradient of a floating target; rows first.

    The upstream gradient of a row is made from the row, and so is a matter of the row alone too.
    """
    options = {"reduction": reduction} if case.per_row else {}

    def upstream(value: Tensor) -> Tensor:
        return (x[..., 0] if value.dim() else torch.tensor(1.3)).to(value).expand_as(value)

    with fastdiv.backend("native"):
        value, *grads = value_and_gradients(
            lambda x, t: case.call(x, t, **options), x, t, upstream=upstream
        )
    return [value.movedim(-1, 0) if value.dim() else value, *grads]


def inputs(case: Case, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Rows of every kind: apart, close (the accurate sweep of KL), equal, with a masked class."""
    x, teacher = make_inputs(shape, torch.float64)
    teacher[1::4] = x[1::4] + 1e-3 * teacher[1::4]
    teacher[2::4] = x[2::4]
    if shape[1] > 1:
        x[3::4, 1] = teacher[3::4, 1] = -torch.inf
    x, teacher = x.to(dtype), teacher.to(dtype)
    return x, case.make_target(x, teacher)


def moved(v: Tensor, offset: int) -> Tensor:
    """The same matrix, rows further apart, first element ``offset`` elements off alignment."""
    rows, classes = v.shape
    stride = classes + 16
    storage = v.new_full((rows * stride + 64,), 777.0)  # would show if it were read
    place = storage.as_strided(v.shape, (stride, 1), offset)
    return place.copy_(v)


def backward_call(case: Case, x: Tensor, t: Tensor | None) -> tuple[object, tuple, Tensor]:
    """The op of the backward, its arguments, and its gradient of x."""
    with Recorder() as record:
        grads = evaluate(case, x, t)
    (call,) = [c for c in record.calls if "backward" in str(c[0])]
    return *call, grads[1]


def statistics(case: Case, x: Tensor, t: Tensor | None) -> tuple[Tensor, fastdiv.Stats]:
    return fastdiv.cross_entropy(x, t, reduction="none", return_stats=True, **case.options)
