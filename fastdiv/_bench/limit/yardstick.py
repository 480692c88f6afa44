"""A yardstick, called with tensors."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

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
        function.argtypes = [pointer] * 3 + [number] * 3 + [pointer, ctypes.c_float, pointer]
        function.restype = None
        self._function: Callable[..., None] = function

    def forward(self, x: Tensor, *target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean of the rows, and what the backward needs of each row."""
        kept = torch.empty(len(x), KEPT)
        self._run(kept, NOTHING, x, *target)
        return kept[:, 0].mean(), kept

    def backward(self, kept: Tensor, x: Tensor, *target: Tensor) -> Tensor:
        """Return the gradient of the mean, a new tensor."""
        return self.backward_into(torch.empty_like(x), kept, x, *target)

    def backward_into(self, grad: Tensor, kept: Tensor, x: Tensor, *target: Tensor) -> Tensor:
        """Write the gradient over a tensor, which may be the logits, and return that."""
        self._run(kept, grad, x, *target)
        return grad

    def _run(self, kept: Tensor, grad: Tensor, x: Tensor, *target: Tensor) -> None:
        """Divide the rows among threads, which ctypes lets run at the same time."""
        labels = next((t for t in target if t.dtype == torch.int64), NOTHING)
        matrix = next((t for t in target if t.dtype == x.dtype), NOTHING)
        rows, classes = x.shape
        targets = max(labels.numel(), matrix.numel()) // rows
        tensors = (x, matrix, labels, kept, grad)
        assert all(t.is_contiguous() for t in tensors)
        bytes_of_a_row = [t.nbytes // rows for t in tensors]

        def run(begin: int, end: int) -> None:
            pointers = zip(tensors, bytes_of_a_row, strict=True)
            px, pt, py, pk, pd = (t.data_ptr() + begin * size for t, size in pointers)
            self._function(px, pt, py, end - begin, classes, targets, pk, 1 / rows, pd)

        count = min(rows, torch.get_num_threads())
        if count == 1:
            run(0, rows)
        else:
            ends = [rows * i // count for i in range(count + 1)]
            list(_threads(count).map(run, ends, ends[1:]))


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count)
