"""Numbers that are symbols to ``torch.compile``: sizes, and float options.

An option that changes from step to step becomes a symbol after the first change.  As a float
argument of an op it would be a constant again, and each new value would be compiled anew.  So such
options are passed in a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def is_symbolic(*values: float | Tensor) -> bool:
    """Return whether the compiler is tracing and one of these numbers is not a constant."""
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return any(isinstance(v, Tensor) or not has_static_value(v) for v in values)


def term(value: float) -> Any:
    """Return a number to calculate with, as a tensor if it is a symbol to the compiler.

    For an expression of symbols, torch 2.11 would compile a graph for each of its values.
    """
    return scalar(value) if is_symbolic(value) else value


def times(value: Tensor, weight: float | Tensor) -> Tensor:
    """Return the product with a number that may be a ``term``, in the dtype of the value."""
    return value * (weight.to(value.dtype) if isinstance(weight, Tensor) else weight)


def as_tensor(values: Sequence[float]) -> Tensor:
    """Return numbers as a float64 tensor on the CPU, where reading them waits for no device."""
    if not torch.compiler.is_compiling():
        return torch.tensor(values, dtype=torch.float64, device="cpu")
    return torch.stack([scalar(v) for v in values])


def scalar(value: float) -> Tensor:
    """Return a number as a float64 tensor, by a product, which the compiler can always trace."""
    return torch.ones((), dtype=torch.float64, device="cpu") * value


def log(value: float) -> float | Tensor:
    """Return the logarithm of a positive number."""
    return scalar(value).log() if is_symbolic(value) else math.log(value)


def is_true(condition: bool) -> bool:
    """Return whether a comparison of sizes holds; False where they depend on data.

    The compiler then compiles anew once the comparison changes.
    """
    if not torch.compiler.is_compiling():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(condition)


def same_shape(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Return whether two shapes are equal.

    For sizes that depend on data, the compiler cannot decide it.  Then the compiled code checks it.
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
