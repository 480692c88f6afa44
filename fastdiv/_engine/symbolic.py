"""Numbers that ``torch.compile`` knows by name only: float options, and sizes.

An option that changes from step to step is one after the first change.  An op's float argument
would make the compiler take its value for a constant, and compile again for the next one.  So such
options travel in a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def is_symbolic(*values: float | Tensor) -> bool:
    """Tells whether one of these numbers is no constant to a compiler that is at work."""
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return any(isinstance(v, Tensor) or not has_static_value(v) for v in values)


def term(value: float) -> Any:
    """A number to calculate with, as a tensor if the compiler knows it by name only.

    From an expression of such numbers, torch 2.11 makes a graph for each of its values.
    """
    return scalar(value) if is_symbolic(value) else value


def times(value: Tensor, weight: float | Tensor) -> Tensor:
    """The product, in the dtype of the value, with a number that may be a ``term``."""
    return value * (weight.to(value.dtype) if isinstance(weight, Tensor) else weight)


def as_tensor(values: Sequence[float]) -> Tensor:
    """Numbers as a float64 tensor on the CPU, where reading them waits for no device."""
    if not torch.compiler.is_compiling():
        return torch.tensor(values, dtype=torch.float64, device="cpu")
    return torch.stack([scalar(v) for v in values])


def scalar(value: float) -> Tensor:
    """A number as a float64 tensor; by a product, which the compiler can make of any number."""
    return torch.ones((), dtype=torch.float64, device="cpu") * value


def log(value: float) -> float | Tensor:
    """The logarithm of a positive number."""
    return scalar(value).log() if is_symbolic(value) else math.log(value)


def same_shape(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Tells whether two shapes are equal.

    Of sizes that depend on data the compiler cannot know it.  The compiled code then checks it.
    """
    if not torch.compiler.is_compiling():
        return shape == other
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    if len(shape) != len(other):
        return False
    for n, m in zip(shape, other, strict=True):
        if guard_or_false(n != m):
            return False
        torch._check(n == m)
    return True
