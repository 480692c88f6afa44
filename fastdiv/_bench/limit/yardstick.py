"""A yardstick, called with tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from ..._engine.backend import _C
from .build import NoYardstickError, library

KEPT = 4  # floats that a forward keeps of a row; the first one is its value
NOTHING = torch.empty(0)


class Yardstick:
    """The yardstick of a loss for a dtype: the mean of plain rows on the CPU, and its gradient.

    It takes what the loss takes: logits, and labels, logits, probabilities, top-k values and
    indices, or nothing.  All are contiguous.  It uses as many threads as torch.

    For example::

        yardstick = Yardstick("kl_div", torch.float32)
        mean, kept = yardstick.forward(x, t)
        dx = yardstick.backward(kept, x, t)
    """

    def __init__(self, loss: str, dtype: torch.dtype) -> None:
        """Find the loop of a loss of ``LOSSES``; raise NoYardstickError where there is none."""
        function = getattr(library(dtype), loss, None)
        if function is None:
            raise NoYardstickError(f"there is no yardstick of {loss}")
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        function.argtypes = [
            number,
            *[pointer] * 3,
            *[number] * 3,
            pointer,
            ctypes.c_float,
            pointer,
        ]
        function.restype = None
        self._function: Callable[..., None] = function

    def forward(self, x: Tensor, *target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean of the rows, and what the backward needs of each row."""
        kept = torch.empty(len(x), KEPT)
        self._run(kept, NOTHING, x, *target)
        return kept[:, 0].mean(), kept

    def backward(self, kept: Tensor, x: Tensor, *target: Tensor) -> Tensor:
        """Return the gradient of the mean, a new tensor."""
        grad = torch.empty_like(x)
        _C.advise_huge_pages(grad.data_ptr(), grad.nbytes)  # as the losses do
        return self.backward_into(grad, kept, x, *target)

    def backward_into(self, grad: Tensor, kept: Tensor, x: Tensor, *target: Tensor) -> Tensor:
        """Write the gradient over a tensor, which may be the logits, and return that."""
        self._run(kept, grad, x, *target)
        return grad

    def _run(self, kept: Tensor, grad: Tensor, x: Tensor, *target: Tensor) -> None:
        labels = next((t for t in target if t.dtype == torch.int64), NOTHING)
        matrix = next((t for t in target if t.dtype == x.dtype), NOTHING)
        assert all(t.is_contiguous() for t in (x, matrix, labels, kept, grad))
        rows, classes = x.shape
        targets = max(labels.numel(), matrix.numel()) // rows
        px, pt, py, pk, pd = (t.data_ptr() for t in (x, matrix, labels, kept, grad))
        threads = min(rows, torch.get_num_threads())
        self._function(threads, px, pt, py, rows, classes, targets, pk, 1 / rows, pd)
