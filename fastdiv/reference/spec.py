"""Define what a loss takes, ``Rows`` of tensors and a ``Spec`` of options, and its ``Stats``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """The tensors of a loss of rows, in the order of the ops.  The first three get gradients."""

    x: Tensor  # logits [R, C]
    t: Tensor | None = None  # target [R, C]
    scale: Tensor | None = None  # 1 / temperature [R], beside the scale of the spec
    label: Tensor | None = None  # class indices [R], or [R, k] of a loss of named classes
    class_weight: Tensor | None = None  # [C]
    row_weight: Tensor | None = None  # [R]
    mask: Tensor | None = None  # [R, C], True where a class takes part; or its bits, [R, C / 8]


class Spec(NamedTuple):
    """One loss with all of its options that are not tensors, in the order of the ops.

    ``inplace`` comes last, since no op takes it.
    """

    loss: str
    target_type: str = "none"  # "none", "logits", "log_probs" or "probs"
    reduction: str = "none"  # "none", "sum", "mean", "batchmean" or "pointwise"
    batch: int = 1  # what "batchmean" divides by
    ignore_index: int = -100
    first_class: int = 0  # that of column 0, for named classes of a block
    by_probability: bool = False  # a row's weight is the probability of its label
    scale: float = 1.0  # 1 / temperature
    softcap: float = 0.0  # 0: none
    param: float = 0.0  # beta, skew or alpha of a divergence
    confidence: float = 1.0  # smoothing_rates in _losses/cross_entropy.py computes both rates
    smoothing_per_class: float = 0.0
    z_loss: float = 0.0
    inplace: bool = False


def value_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of a loss of logits of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Stats(NamedTuple):
    """The statistics of every row from :func:`fastdiv.cross_entropy`, without a gradient."""

    lse: Tensor
    entropy: Tensor
    argmax: Tensor
    log_prob: Tensor
