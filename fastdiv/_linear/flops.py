"""What torch's ``FlopCounterMode`` counts for linear losses: the matrix products that they run.

A loss of ``F.linear`` has three products: logits, gradient of the hidden states, gradient of the
weight.  Ours has the same three if gradients are computed with the value.  Otherwise the backward
computes the logits again, and that product is counted too.  So is the second product by which a CPU
sums gradients in half precision.  Ignored rows are counted, although a CPU leaves them out.

Importing torch's counter imports Triton, which takes a second.  The formulas wait until something
else has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._engine.torch_private import dispatch_modes
from .tiles import rounds_products

_formulas: dict[Any, Callable[..., int]] = {}


def register(op: Any, formula: Callable[..., int]) -> None:
    """Keep the formula of an op, a function of its arguments, until a counter is imported."""
    _formulas[op] = formula


def tell_counters() -> None:
    """Register the formulas if torch's counter is imported.  Call it before an op."""
    if torch.compiler.is_compiling():
        return
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None:
        return
    for op, formula in _formulas.items():
        if op not in counter.flop_registry:
            counter.register_flop_formula(op, get_raw=True)(formula)
    # A counter copies the registry when it is made, which may have been before this call.
    for mode in dispatch_modes():
        copied = getattr(getattr(mode, "counter", None), "flop_registry", {})
        for op in _formulas:
            copied.setdefault(op, counter.flop_registry[op])


def of_products(heads: Sequence[Tensor | None], needed: Sequence[bool]) -> int:
    """Count the operations of both heads: their logits, and the gradients that are needed."""
    total = 0
    for first in (0, 3):
        x, weight = heads[first : first + 2]
        if x is None or weight is None:
            continue
        gradients = sum(needed[first : first + 2]) * (2 if rounds_products(x) else 1)
        total += 2 * len(x) * weight.shape[0] * weight.shape[1] * (1 + gradients)
    return total
