"""Losses under ``torch.jit.trace``, which records torch operations and no Python.

A trace runs with other batches than the one that it was made with, and often without this library.
So a tracer gets the reference operations, whose sizes it follows.  The options and the number of
classes are constants of a trace.  A trace that is given another number of classes raises.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from . import backend
from .torch_private import is_jit_traced

F = TypeVar("F", bound=Callable[..., Any])

_active = False  # whether a call that a tracer records is under way


def recordable(function: F) -> F:
    """The same function, which calls only torch operations while it is traced."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if is_jit_traced():
            return recorded(function, args, kwargs)
        return function(*args, **kwargs)

    return cast(F, call)


def recorded(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Calls a function for a tracer.

    The checks of arguments compare sizes, of which a tracer warns.  They record nothing.
    """
    global _active
    if backend.is_native():
        raise RuntimeError(
            "backend 'native': torch.jit.trace records torch operations only; use backend 'auto'"
        )
    outer, _active = _active, True
    try:
        with backend.backend("reference"), warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
            return function(*args, **kwargs)
    finally:
        _active = outer


def size_of(x: Tensor, dim: int) -> int:
    """The size of a dimension, counted from 0; a tracer takes it for a constant."""
    return x.shape[dim : dim + 1].numel() if _active else x.shape[dim]


def of_constant_size(x: Tensor, dim: int) -> Tensor:
    """The same tensor; in a trace, an operation that raises for another size of this dimension."""
    return x.unflatten(dim, (size_of(x, dim),)) if _active else x
