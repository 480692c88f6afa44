"""The finite part of rows whose divergence is infinite, and the mass where all logits are -inf.

KL(p || q) is infinite if a class has p > 0 and q = 0.  Its gradient is that of the finite terms.
Whole rows need two numbers for it: the sum of the finite terms, and the mass of their classes.  The
kernels' record has the sum.  The mass takes another pass over such rows, which are few.

That pass sums the terms with log q + 1 in place of log q.  A finite term p (log p - log q) then
changes by -p.  An infinite term counts as a constant and does not change.  So the mean of the terms
changes by the share of p's mass that lies on classes with finite terms.  For KL(q || p), exchange p
and q, and the sign of the change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import Spec
from .record import SLOTS

TERMS = ("f", "u", "v", "q", "p")  # TermSums in divergence.h
NOTHING_INFINITE = 2.0  # in place of the share, for a row whose value is finite


class ShardForward(NamedTuple):
    """What a forward computes of a shard as if its rows were whole."""

    value: Tensor
    record: Tensor
    stats: Tensor | None = None  # lse, entropy, log_prob
    argmax: Tensor | None = None
    terms: Tensor | None = None  # sums of TERMS, in odd rows only


# Finds odd rows by values, records and weights.  It returns records for the second pass, and which
# rows are odd; or None if there are no odd rows.
Odd = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor] | None]


def odd_rows(empty_ones: bool, infinite_ones: bool) -> Odd | None:
    """Return what finds the rows that need a second pass, or None if no row can need it.

    These are rows of a shard without logits, if ``empty_ones``, and rows with an infinite value, if
    ``infinite_ones``.
    """
    if not (empty_ones or infinite_ones):
        return None

    def odd(value: Tensor, record: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor] | None:
        x_logz = record[:, SLOTS["x_logz"]]
        empty = x_logz == -torch.inf
        found = (empty & empty_ones) | (value.isinf() & infinite_ones)
        if weight is not None:
            found &= weight != 0
        if none_found(found):
            return None
        shifted = record.clone()  # log q + 1
        shifted[:, SLOTS["x_logz"]] = torch.where(empty, 0.0, x_logz - 1)
        shifted[:, SLOTS["log_z_ratio"]] -= 1
        return shifted, found.to(value.dtype)

    return odd


def none_found(found: Tensor) -> bool:
    """Return whether there is no such row; False on a GPU, where looking costs more than a pass."""
    return found.is_cpu and not found.any()


def finite_part(spec: Spec, local: ShardForward, record: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the finite sum in place of infinite values, and the share of mass it is over."""
    share = torch.full_like(local.value, NOTHING_INFINITE)
    if local.terms is None:
        return {"share": share}
    _, u, v, q, p = local.terms.unbind(1)
    finite, moved = (record["sum_v"], v / p) if spec.loss == "kl_div" else (record["sum_u"], u / q)
    infinite = local.value.isinf()
    return {
        "value": torch.where(infinite, finite, local.value),
        "share": torch.where(infinite, (moved - finite).abs(), share),
    }
