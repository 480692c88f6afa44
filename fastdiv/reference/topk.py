"""The KL divergence from a teacher that is known at k classes, in plain torch operations.

The conventions are those of ``losses``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .choices import Missing
from .divergences import log_of, log_ratio_term

# What is done with the teacher's mass in other classes, by the name of the loss.
TOPK: dict[str, Missing] = {
    "topk_kl_div": "ignore",
    "renormalized_topk_kl_div": "renormalize",
    "uniform_topk_kl_div": "uniform",
}


def teacher(missing: str, values_type: str, scale: float, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``log p`` and ``p`` at the indices; a probability of 0 gets no gradient."""
    if values_type == "probs":
        p = torch.where(values == 0, values.detach(), values)
        if missing == "renormalize":
            p = p / p.sum(-1, keepdim=True)
        return log_of(p), p
    log_p = values
    if values_type == "logits":
        log_p = torch.log_softmax(values * scale, -1)
    elif missing == "renormalize":
        log_p = torch.log_softmax(values, -1)
    return log_p, log_p.exp()


def wrong_rows(indices: Tensor, classes: int) -> Tensor:
    """Return which rows of indices have one out of range, or one twice."""
    ordered = indices.sort(-1).values
    outside = (ordered[:, 0] < 0) | (ordered[:, -1] >= classes)
    return outside | (ordered[:, 1:] == ordered[:, :-1]).any(-1)


def without_wrong_rows(values: Tensor, indices: Tensor, classes: int) -> Tensor:
    """Return the values with NaN in wrong rows, which makes the loss and gradients NaN."""
    nan = torch.where(wrong_rows(indices, classes), torch.nan, 0.0)
    return values + nan.to(values.dtype).unsqueeze(-1)


def topk_kl_div(
    missing: str, values_type: str, scale: float, lq: Tensor, values: Tensor, indices: Tensor
) -> Tensor:
    """Compute the loss of rows from ``log q`` of all classes; a wrong row is NaN."""
    classes, others = lq.shape[-1], lq.shape[-1] - indices.shape[-1]
    values = without_wrong_rows(values, indices, classes)
    indices = indices.clamp(0, classes - 1)
    log_p, p = teacher(missing, values_type, scale, values)
    value = log_ratio_term(p, log_p, lq.gather(-1, indices)).sum(-1)
    # A softmax over the k classes leaves no mass but rounding errors, which must not count.
    if missing != "uniform" or values_type == "logits" or not others:
        return value
    rest = 1 - p.sum(-1)
    rest = torch.where(rest < 0, 0.0, rest)  # a NaN stays NaN
    mean = lq.scatter(-1, indices, 0.0).sum(-1) / others
    return value + log_ratio_term(rest, log_of(rest) - math.log(others), mean)
