"""Losses of a teacher that is known at k classes, in plain torch operations.

A row of logits comes in by the log-probabilities of its k named classes and one number about the
rest (``named_log_probs``).  All that follows has the size of the teacher's values, and is float64.
The conventions are those of ``losses``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .divergences import DIVERGENCES, log_of, log_ratio_term, log_sum_exp

# The loss of rows that gives the named log-probabilities, by what it says of the other classes.
NAMED = {
    "none": "topk_log_prob",
    "tail": "topk_log_prob_and_tail",
    "uniform": "topk_log_prob_and_mean",
}
REST = {loss: rest for rest, loss in NAMED.items()}

PADDING = -1  # the index of no class
BLOCK = 1024  # summands that torch adds up in an order that no number of threads changes


def rest_of(missing: str, values_type: str) -> str:
    """Return what a policy needs of the other classes, a key of ``NAMED``."""
    if missing == "uniform" and values_type == "logits":
        return "none"  # a softmax over the k classes leaves nothing to spread
    return missing if missing in NAMED else "none"


# --- log-probabilities of the named classes ---------------------------------------------------


def are_classes(indices: Tensor) -> Tensor:
    """Return which indices are classes, and not padding."""
    return indices.to(torch.int64) != PADDING  # an unsigned index is never equal to -1


def wrong_rows(indices: Tensor, classes: int) -> Tensor:
    """Return which rows of indices have one out of range, or a class twice."""
    ordered = indices.to(torch.int64).sort(-1).values
    outside = (ordered[:, 0] < PADDING) | (ordered[:, -1] >= classes)
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & are_classes(ordered[:, 1:])
    return outside | repeated.any(-1)


def named_log_probs(lq: Tensor, indices: Tensor, rest: str) -> Tensor:
    """Return ``log q`` of k classes as float64 ``[R, k]``, and with a rest ``[R, k + 1]``.

    ``lq`` are the log-probabilities of all classes.  ``rest`` says what the last column is:
    ``"tail"`` for the log of the other classes' mass, ``"uniform"`` for the mean of their
    ``log q``, and ``"none"`` for no column.  Without another class the tail is -inf and the mean
    0.  An index of -1 has the entry 0 and no gradient.  An index out of range, or a class that is
    named twice, makes its row NaN, and the gradient of the row too.
    """
    lq, classes = lq.double(), lq.shape[-1]
    wrong = wrong_rows(indices, classes).unsqueeze(-1)
    valid, indices = are_classes(indices), indices.to(torch.int64).clamp(0, classes - 1)
    found = torch.where(valid, lq.gather(-1, indices), 0.0)
    if rest != "none":
        # Padding marks an extra class, which is cut off.
        marks = torch.zeros_like(F.pad(lq, (0, 1)), dtype=torch.bool)
        marks = marks.scatter(-1, torch.where(valid, indices, classes), 1)
        column = log_tail(lq, marks[:, :-1]) if rest == "tail" else mean_of(lq, ~marks[:, :-1])
        found = torch.cat([found, column.unsqueeze(-1)], -1)
    return found * torch.where(wrong, torch.nan, 1.0)


def log_tail(lq: Tensor, named: Tensor) -> Tensor:
    """Return the log of the mass outside of the named classes."""
    others = torch.where(named, -torch.inf, lq)
    empty = (others == -torch.inf).all(-1)
    total = log_sum_exp(torch.where(empty.unsqueeze(-1), 0.0, others), -1)
    return torch.where(empty, -torch.inf, total)


def mean_of(lq: Tensor, others: Tensor) -> Tensor:
    """Return the mean of ``log q`` over the other classes."""
    return torch.where(others, lq, 0.0).sum(-1) / others.sum(-1).clamp(min=1)


# --- the teacher ------------------------------------------------------------------------------


def teacher(
    values: Tensor, valid: Tensor, values_type: str, missing: str, scale: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Return ``log p`` and ``p`` at the indices; padding has no mass, whatever its value is.

    A probability of 0 gets no gradient.
    """
    values, some = values.double(), valid.any(-1, keepdim=True)
    if values_type == "probs":
        p = torch.where(valid, values, 0.0)
        p = torch.where(p == 0, p.detach(), p)
        if missing == "renormalize":
            p = p / torch.where(some, fixed_sum(p).unsqueeze(-1), 1.0)
        return log_of(p), p
    log_p = torch.where(valid, values * scale if values_type == "logits" else values, -torch.inf)
    if values_type == "logits" or missing == "renormalize":
        normalised = torch.log_softmax(torch.where(some, log_p, 0.0), -1)
        log_p = torch.where(valid, normalised, -torch.inf)
    return log_p, log_p.exp()


def rest_mass(p: Tensor, valid: Tensor, others: Tensor, values_type: str) -> Tensor:
    """Return the teacher's mass in the other classes: 1 less the sum, or 0 where that is negative.

    A softmax over the k classes leaves none, unless there are no k classes.
    """
    if values_type == "logits":
        rest = torch.where(valid.any(-1), 0.0, 1.0).to(p.dtype)
    else:
        rest = 1 - fixed_sum(p)
        rest = torch.where(rest < 0, 0.0, rest)  # a NaN stays NaN
    return torch.where(others == 0, 0.0, rest)


# --- values of rows ---------------------------------------------------------------------------


def rows_of_named(
    kind: str,
    named: Tensor,
    values: Tensor,
    indices: Tensor,
    *,
    classes: int,
    values_type: str,
    missing: str,
    scale: float | Tensor,
    beta: float = 0.0,
) -> Tensor:
    """Compute the float64 value of every row from the result of ``named_log_probs``.

    ``kind`` is ``"kl_div"``, ``"reverse_kl_div"`` or ``"js_div"``.  The row of ``named`` that goes
    with a policy is that of ``rest_of``.  ``scale`` is one number, or a column of one for each row.
    """
    k, valid = indices.shape[-1], are_classes(indices)
    log_p, p = teacher(values, valid, values_type, missing, scale)
    lq = torch.where(valid, named[:, :k], -torch.inf)
    others = classes - valid.sum(-1)
    if missing == "tail":
        rest = rest_mass(p, valid, others, values_type).unsqueeze(-1)
        log_p, p = torch.cat([log_p, log_of(rest)], -1), torch.cat([p, rest], -1)
        value = fixed_sum(bucket_terms(kind, torch.cat([lq, named[:, k:]], -1), log_p, p, beta))
        return torch.where(value < 0, value - value.detach(), value)  # rounding of a sum of 0
    value = fixed_sum(DIVERGENCES[kind](lq, log_p, lq.exp(), p, beta))
    if rest_of(missing, values_type) != "uniform":
        return value
    rest = torch.where(valid.any(-1), rest_mass(p, valid, others, values_type), 0.0)
    log_rest = log_of(rest) - others.clamp(min=1).to(p.dtype).log()
    return value + log_ratio_term(rest, log_rest, named[:, k])


def bucket_terms(kind: str, lq: Tensor, lp: Tensor, p: Tensor, beta: float) -> Tensor:
    """Compute one term for each bucket, which is never negative and 0 where p = q.

    It is the term of the divergence plus ``kappa (q - p)``, whose sum is 0 where p and q both sum
    to 1.  Close masses are computed from the log ratio, so that nothing cancels.
    """
    near = (lp - lq).abs() <= 1  # False for NaN: no mass on one side or on both
    log_ratio = torch.where(near, lp, 0.0) - torch.where(near, lq, 0.0)
    q = lq.exp()
    apart = DIVERGENCES[kind](lq, lp, q, p, beta) + KAPPA[kind] * (q - p)
    return torch.where(near, NEAR[kind](q, p, log_ratio, beta), apart)


def near_kl_div(q: Tensor, p: Tensor, log_ratio: Tensor, _: float) -> Tensor:
    """Compute ``p log(p / q) + q - p`` from ``log(p / q)``."""
    return p * (log_ratio + torch.expm1(-log_ratio))


def near_reverse_kl_div(q: Tensor, p: Tensor, log_ratio: Tensor, _: float) -> Tensor:
    """Compute ``q log(q / p) + p - q`` from ``log(p / q)``."""
    return q * (torch.expm1(log_ratio) - log_ratio)


def near_js_div(q: Tensor, p: Tensor, log_ratio: Tensor, beta: float) -> Tensor:
    """Compute the terms of JS from ``log(p / q)``, with ``m = p (1 + y)``."""
    less = torch.expm1(-log_ratio)  # q / p - 1
    y = (1 - beta) * less
    return -p * ((1 - beta) * (less + 1) * log_ratio + (1 + y) * torch.log1p(y))


NEAR: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "kl_div": near_kl_div,
    "reverse_kl_div": near_reverse_kl_div,
    "js_div": near_js_div,
}
KAPPA = {"kl_div": 1, "reverse_kl_div": -1, "js_div": 0}


# --- sums and reductions ----------------------------------------------------------------------


def fixed_sum(v: Tensor) -> Tensor:
    """Sum over the last dimension; the bits do not depend on the number of threads.

    torch splits only a long sum of one number among threads.
    """
    size = v.shape[-1]
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    if traced or size <= BLOCK:  # a trace runs with other sizes
        return v.sum(-1)
    blocks = F.pad(v, (0, -size % BLOCK)).unflatten(-1, (-1, BLOCK))
    return fixed_sum(blocks.sum(-1))


def weighted_rows(
    value: Tensor, row_weight: Tensor | None, reduction: str, batch: int, dtype: torch.dtype
) -> Tensor:
    """Weight the values of rows and reduce them, as every loss of rows does."""
    weight = torch.ones_like(value) if row_weight is None else row_weight.to(value.dtype)
    if row_weight is not None:
        value = torch.where(weight != 0, value * weight, 0.0)
    if reduction == "none":
        return value.to(dtype)
    total = fixed_sum(value)
    if reduction == "mean":
        total = total / fixed_sum(weight)
    return (total / batch if reduction == "batchmean" else total).to(dtype)
