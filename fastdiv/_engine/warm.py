"""Gradients whose memory is used again, so that its pages are there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .backend import _C


class WarmGradients:
    """The memory that :func:`fastdiv.warm_gradients` keeps."""

    @property
    def nbytes(self) -> int:
        """Return how many bytes wait for the next gradient."""
        return 0 if _C is None else _C.waiting_gradient_bytes()

    def empty(self) -> None:
        """Give what waits back to the system."""
        if _C is not None:
            _C.empty_gradients()


@contextmanager
def warm_gradients() -> Iterator[WarmGradients]:
    """Let gradients on a CPU take the memory of earlier ones, inside a ``with`` block.

    The system clears the pages of new memory at their first write.  For a gradient of many classes
    that takes up to half of the backward.  In the block, the memory of a gradient that
    nobody holds any more waits for the next one of as many bytes.  One gradient of each of the last
    four sizes can wait.

    The choice holds for the whole process.  Gradients below 2 MB are not kept, because ``malloc``
    keeps such memory.  Their storage cannot be resized.  On a GPU nothing changes: torch keeps its
    memory there.  Losses of reference torch operations take new memory, as always.

    Returns:
        A context manager of an object with the method ``empty()``, which frees what waits, and the
        attribute ``nbytes``.  What waits is freed at the end of the block, too.

    Example:
        >>> import torch, fastdiv
        >>> x = torch.zeros(1024, 1024, requires_grad=True)
        >>> y = torch.zeros(1024, dtype=torch.int64)
        >>> with fastdiv.warm_gradients() as memory:
        ...     for _ in range(3):
        ...         fastdiv.cross_entropy(x, y).backward()
        ...         x.grad = None
        ...     print(memory.nbytes)
        ...     memory.empty()
        ...     print(memory.nbytes)
        4194304
        0
    """
    if _C is not None:
        _C.keep_gradients(True)
    try:
        yield WarmGradients()
    finally:
        if _C is not None:
            _C.keep_gradients(False)
