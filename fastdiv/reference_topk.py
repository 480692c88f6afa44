r"""KL divergence from a teacher that is known at k classes, in plain torch operations.

Two parts.  :func:`student` is what the loss needs of the student's row, the one dense matrix there
is; a kernel computes the same in one pass.  :func:`rows` makes the loss of that and of the teacher,
all of size ``[R, k]``: the one copy of the mathematics, for kernels and reference alike.

The conventions are those of :mod:`fastdiv.reference`; the module imports torch only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .reference import value_dtype
from .reference_divergences import log_of, log_ratio_term


@dataclass
class TopKSpec:
    """The options of topk_kl_div that are not tensors."""

    values_type: str  # "logits", "log_probs" or "probs"
    missing: str = "ignore"  # "ignore", "renormalize" or "uniform"
    reduction: str = "none"  # "none", "sum", "mean" or "batchmean"
    batch: int = 1  # what "batchmean" divides by
    scale: float = 1.0  # 1 / temperature
    inplace: bool = False

    def spreads(self, others: int) -> bool:
        """Whether mass may go to the classes that the teacher does not name.

        A softmax over the k logits leaves none, but for rounding, which must not count as mass.
        """
        return self.missing == "uniform" and self.values_type != "logits" and others > 0


def row_sums(v: Tensor) -> Tensor:
    """Sums over the last dimension, the same bits for any number of threads.

    A single long row torch would share out among them; of two rows each thread takes one.
    """
    long = v.dim() == 1 or v.shape[-1] >= 2**15
    return torch.stack((v, v)).sum(-1)[0] if long else v.sum(-1)


def student(
    spec: TopKSpec, x: Tensor, indices: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """``log q`` at the indices, and its mean over all other classes where the loss spreads to them.

    The mean is -inf where one of them is.
    """
    x = x.to(value_dtype(x.dtype))
    if weight is not None:  # what a row that does not count holds must not reach its gradient
        x = torch.where((weight != 0).unsqueeze(-1), x, 0.0)
    log_q = torch.log_softmax(x * spec.scale, -1)
    others = x.shape[-1] - indices.shape[-1]
    mean = log_q.scatter(-1, indices, 0.0).sum(-1) / others if spec.spreads(others) else None
    return log_q.gather(-1, indices), mean


def teacher(spec: TopKSpec, values: Tensor) -> tuple[Tensor, Tensor]:
    """``log p`` and ``p`` at the indices; a probability of 0 gets no gradient."""
    if spec.values_type == "probs":
        p = torch.where(values == 0, values.detach(), values)
        if spec.missing == "renormalize":
            p = p / row_sums(p).unsqueeze(-1)
        return log_of(p), p
    log_p = values
    if spec.values_type == "logits":
        log_p = torch.log_softmax(values * spec.scale, -1)
    elif spec.missing == "renormalize":
        log_p = torch.log_softmax(values, -1)
    return log_p, log_p.exp()


def rows(
    spec: TopKSpec,
    log_q: Tensor,
    mean_of_others: Tensor | None,
    values: Tensor,
    weight: Tensor | None,
    others: int,
) -> Tensor:
    """Weighted value of every row."""
    values = values.to(log_q.dtype)
    if weight is not None:
        filler = 1.0 if spec.values_type == "probs" else 0.0
        values = torch.where((weight != 0).unsqueeze(-1), values, filler)
    log_p, p = teacher(spec, values)
    value = row_sums(log_ratio_term(p, log_p, log_q))
    if mean_of_others is not None:
        rest = (1 - row_sums(p)).clamp(min=0)
        value = value + log_ratio_term(rest, log_of(rest) - math.log(others), mean_of_others)
    return value if weight is None else torch.where(weight != 0, value * weight, 0.0)


def divisor(spec: TopKSpec, value: Tensor, weight: Tensor | None) -> Tensor | int:
    """What the sum of the rows is divided by."""
    if spec.reduction == "mean":
        return value.shape[0] if weight is None else row_sums(weight)
    return spec.batch if spec.reduction == "batchmean" else 1


def reduced(spec: TopKSpec, value: Tensor, weight: Tensor | None) -> Tensor:
    """The loss from its rows."""
    if spec.reduction == "none":
        return value
    return row_sums(value) / divisor(spec, value, weight)


def loss(
    spec: TopKSpec, x: Tensor, values: Tensor, indices: Tensor, weight: Tensor | None
) -> Tensor:
    """The reduced loss of a matrix of logits ``[R, C]`` and a teacher ``[R, k]``."""
    log_q, mean_of_others = student(spec, x, indices, weight)
    others = x.shape[-1] - indices.shape[-1]
    value = rows(spec, log_q, mean_of_others, values, weight, others)
    return reduced(spec, value, weight)
