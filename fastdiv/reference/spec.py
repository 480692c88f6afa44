"""What a loss is given besides tensors (``Spec``), and what it returns besides its value."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Spec(NamedTuple):
    """One loss with all of its options that are not tensors, in the order of the ops.

    ``inplace`` comes last, since no op takes it.
    """

    loss: str
    target_type: str = "none"  # "none", "logits", "log_probs" or "probs"
    reduction: str = "none"  # "none", "sum", "mean", "batchmean" or "pointwise"
    batch: int = 1  # what "batchmean" divides by
    ignore_index: int = -100
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
