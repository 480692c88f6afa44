"""How another library's functions are replaced, and put back."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

if TYPE_CHECKING:
    from typing_extensions import Self

from .._engine import backend

_lock = threading.RLock()


class _Replaced(NamedTuple):
    owner: Any  # a class or a module
    name: str
    original: Any  # None: inherited
    replacement: Any


class Patch(ABC):
    """A handle on a patch, which ``undo()`` or the end of a ``with`` block takes back.

    Each subclass is a kind of patch.  Its replacements stay in place until all of its handles are
    undone, in whatever order.
    """

    standing: list[Any]  # the handles of this kind that are not undone, the newest last
    _replaced: list[_Replaced]

    def __init_subclass__(cls) -> None:
        cls.standing, cls._replaced = [], []

    def __init__(self) -> None:
        self.__enter__()

    def __enter__(self) -> Self:
        with _lock:
            if self not in self.standing:
                self._install()
                self.standing.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def undo(self) -> None:
        """Take this patch back; nothing happens the second time."""
        with _lock:
            if self in self.standing:
                self.standing.remove(self)
                if not self.standing:
                    self._restore()

    @classmethod
    @abstractmethod
    def _install(cls) -> None:
        """Make all replacements that are missing, or raise if the library is not as expected."""

    @classmethod
    def replace(cls, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """Put ``make(original)`` in the place of an attribute, unless it is replaced already."""
        own = vars(owner).get(name)
        if own is not None and any(own is entry.replacement for entry in cls._replaced):
            return
        replacement = make(getattr(owner, name) if own is None else own)
        cls._replaced.append(_Replaced(owner, name, own, replacement))
        setattr(owner, name, replacement)

    @classmethod
    def _restore(cls) -> None:
        """Put the originals back, except where somebody else replaced the replacement."""
        covered = []
        for entry in reversed(cls._replaced):
            owner, name, original, replacement = entry
            if vars(owner).get(name) is not replacement:
                covered.append(entry)
            elif original is None:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
        cls._replaced[:] = reversed(covered)


def require_kernels(patch: str) -> None:
    """Raise if a patch of this name would have no effect because the kernels are missing."""
    if backend._C is None:
        raise RuntimeError(
            f"{patch} would change nothing: the extension module fastdiv._C could not be loaded "
            f"({backend.load_error})"
        )


@contextmanager
def replaced_forward(layers: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Let calls of these layers run ``forward(layer, input)``, between their hooks."""
    for layer in layers:
        vars(layer)["forward"] = partial(forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]
