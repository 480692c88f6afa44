"""Values and gradients, and when two of them are the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def uneven(value: Tensor) -> Tensor:
    """Return an upstream gradient that differs from entry to entry, from 0.5 to 1.5."""
    upstream = torch.linspace(0.5, 1.5, value.numel(), device=value.device)
    return upstream.to(value.dtype).reshape(value.shape)


def value_and_gradients(
    function: Callable[..., Any],
    *tensors: Tensor | None,
    upstream: Callable[[Tensor], Tensor] = torch.ones_like,
    also: Sequence[Tensor] = (),
    unused: bool = False,
) -> tuple[Tensor, ...]:
    """Return what a function gives, then its gradient for each floating-point argument.

    Several outputs are returned one after another, and differentiated together if they can be.
    ``upstream`` makes the upstream gradient of an output.  ``also`` holds tensors that the function
    computes on the way, whose gradients follow.  ``unused``: an argument may have no gradient,
    which is then left out.
    """
    given = [
        v.detach().requires_grad_() if v is not None and v.is_floating_point() else v
        for v in tensors
    ]
    result = function(*given)
    outputs = result if isinstance(result, tuple) else (result,)
    differentiable = [v for v in outputs if v.requires_grad]
    assert differentiable, "no output depends on the arguments"
    leaves = [v for v in given if v is not None and v.requires_grad]
    found = torch.autograd.grad(
        differentiable,
        [*leaves, *also],
        [upstream(v.detach()) for v in differentiable],
        allow_unused=unused,
    )
    return *(v.detach() for v in outputs), *(g for g in found if g is not None)


def same(actual: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    """Assert that two tensors are equal but for rounding, NaN and infinities included."""
    torch.testing.assert_close(
        actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True, check_dtype=False
    )
