"""Losses under ``torch.jit.trace``, which records torch operations but no Python.

A trace runs with other batches than the one it was made with, and often without this library.  So a
tracer gets the reference operations, whose sizes it follows.  Options and the number of classes are
constants of a trace.  A trace raises for another number of classes.
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

_active = False  # whether a tracer is recording a call


def recordable(function: F) -> F:
    """Let a function call only torch operations while it is traced."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if is_jit_traced():
            return recorded(function, args, kwargs)
        return function(*args, **kwargs)

    return cast(F, call)


def recorded(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a function for a tracer.

    The checks of arguments compare sizes, which makes a tracer warn.  They record nothing.
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
    """Return the size of a dimension, counted from 0, which a tracer takes for a constant."""
    return x.shape[dim : dim + 1].numel() if _active else x.shape[dim]


def of_constant_size(x: Tensor, dim: int) -> Tensor:
    """Return the same tensor; in a trace, add an operation that raises for another size."""
    return x.unflatten(dim, (size_of(x, dim),)) if _active else x
