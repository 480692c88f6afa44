"""A patch of somebody else's library that is undone as it was made."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from typing_extensions import Self

from .._engine import backend

_lock = threading.Lock()


class Patch:
    """A handle on a patch.

    Ours stay in the place of theirs until all handles of a kind are undone, in whatever order.
    """

    standing = 0  # handles of this kind that are not undone

    def __init__(self) -> None:
        self._stands = False
        self.__enter__()

    def __enter__(self) -> Self:
        kind = type(self)
        with _lock:
            if not self._stands:
                kind._install()
                self._stands = True
                kind.standing += 1
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def undo(self) -> None:
        """Takes this patch back; nothing happens the second time."""
        kind = type(self)
        with _lock:
            if self._stands:
                self._stands = False
                kind.standing -= 1
                if not kind.standing:
                    kind._restore()

    @classmethod
    def _install(cls) -> None:
        """Puts ours wherever theirs are; where they are not what we know, raises instead."""
        raise NotImplementedError

    @classmethod
    def _restore(cls) -> None:
        """Puts theirs wherever ours still are; who replaced ours meanwhile stays."""
        raise NotImplementedError


def require_kernels(patch: str) -> None:
    """Raises where a patch of this name would have no effect, for want of kernels."""
    if backend._C is None:
        raise RuntimeError(
            f"{patch} would change nothing: the extension module fastdiv._C could not be loaded "
            f"({backend.load_error})"
        )


@contextmanager
def replaced_forward(layers: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Makes calls of these layers run ``forward(layer, input)``, between their hooks."""
    for layer in layers:
        vars(layer)["forward"] = partial(forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]
