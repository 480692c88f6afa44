"""What the edge-case tests share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from helpers.cases import Case


def by_row(case: Case) -> dict[str, str]:
    """Options for one value a row."""
    return {} if case.name.startswith("log_prob") else {"reduction": "none"}


def gradients(
    function: Callable[..., Tensor], *tensors: Tensor | None, uneven: bool = False
) -> tuple[Tensor, ...]:
    """Value of a function, and gradients of its sum (a weighted sum where `uneven`)."""
    inputs = [
        v.detach().requires_grad_() if v is not None and v.is_floating_point() else v
        for v in tensors
    ]
    value = function(*inputs)
    wanted = [v for v in inputs if v is not None and v.requires_grad]
    upstream = torch.ones_like(value)
    if uneven:
        upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).reshape(value.shape)
    return value.detach(), *torch.autograd.grad(value, wanted, upstream)


def same(actual: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    """Equal but for rounding, NaN and infinities included."""
    torch.testing.assert_close(
        actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True, check_dtype=False
    )
