"""Replacements of TRL's functions of logits, with TRL's arguments and the dtypes of its results.

The first argument of each is TRL's original.  A replacement returns None for a call that belongs to
the original: no kernel fits, fastdiv has no such loss, or the arguments are wrong.
"""

from __future__ import annotations

from types import NoneType

import torch
from torch import Tensor

from ..._engine.arguments import FLOATS, are_plain, is_number, values_may_be_read
from ..._engine.backend import use_kernel
from ..._losses.divergence import js_div
from ..._losses.entropy import entropy, log_prob, log_prob_and_entropy
from .original import PADDING, Function, is_positive, least_count, result_dtype


def generalized_jsd_loss(
    original: Function,
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    logits_are_probs: bool = False,
    top_k: int = 0,
    add_tail: bool = True,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor | None:
    """Compute :func:`fastdiv.js_div`, whose ``beta`` is GKD's."""
    x, t = student_logits, teacher_logits
    if (
        t is None
        or not _fit(x, t, labels)
        or t.dtype not in FLOATS
        or t.shape != x.shape
        or x.dim() < 2
        or (labels is not None and labels.shape != x.shape[:-1])
        or not (is_number(beta) and 0 <= beta <= 1)
        or not is_positive(temperature)
        or (num_items_in_batch is None and reduction not in ("batchmean", "sum", "mean"))
        or not isinstance(num_items_in_batch, (Tensor, int, float, NoneType))
        or logits_are_probs  # which TRL does not normalise
        or not is_number(top_k)
        or 0 < top_k < x.shape[-1]
    ):
        return None
    counted = None if labels is None else labels != PADDING
    total = js_div(
        x,
        t,
        target_type="logits",
        beta=beta,
        temperature=temperature,
        reduction="sum",
        token_weight=counted,
    )
    # Divided before it is rounded: the sum of a large batch is beyond float16.
    dtype = result_dtype(original, x, t)
    if num_items_in_batch is not None:
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(x.device)
        dtype = torch.result_type(total.new_empty((), dtype=dtype), num_items_in_batch)
        value = total / num_items_in_batch
    elif reduction == "sum":
        value = total
    elif counted is None:
        value = total / (x.shape[0] if reduction == "batchmean" else x.numel())
    elif reduction == "mean":
        value = total / (counted.sum() * x.shape[-1])
    else:
        value = total / counted.sum().clamp_min(least_count(original))
    return value.to(dtype)


def selective_log_softmax(
    original: Function,
    logits: Tensor,
    index: Tensor,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> Tensor | None:
    """Compute :func:`fastdiv.log_prob` of one class per row, or of several."""
    if not _fit_index(logits, index, temperature, row_mask):
        return None
    try:
        value = log_prob(logits, index, temperature=temperature)
    except IndexError:  # an index out of range, for which TRL has its own error
        if not logits.is_cpu:
            raise
        return None
    return _masked(value.to(result_dtype(original, logits)), row_mask)


def selective_log_softmax_and_entropy(
    original: Function,
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Compute :func:`fastdiv.log_prob_and_entropy`."""
    if not _fit_index(logits, index, temperature, row_mask) or index.dim() == logits.dim():
        return None
    try:
        log_probs, entropies = log_prob_and_entropy(logits, index, temperature=temperature)
    except IndexError:
        if not logits.is_cpu:
            raise
        return None
    if not entropy_requires_grad:
        entropies = entropies.detach()
    dtype = result_dtype(original, logits)
    return _masked(log_probs.to(dtype), row_mask), _masked(entropies.to(dtype), row_mask)


def entropy_from_logits(original: Function, logits: Tensor, chunk_size: int = 128) -> Tensor | None:
    """Compute :func:`fastdiv.entropy`, which needs no chunks."""
    if not _fit(logits) or not (isinstance(chunk_size, int) and chunk_size > 0):
        return None
    return entropy(logits).to(result_dtype(original, logits))


def _masked(value: Tensor, row_mask: Tensor | None) -> Tensor:
    return value if row_mask is None else value.masked_fill(row_mask == 0, 0.0)


def _fit(x: Tensor, *others: Tensor | None) -> bool:
    """Tell whether TRL and fastdiv agree on these tensors, and there is a kernel for them."""
    return (
        are_plain(x, *others)
        and x.dtype in FLOATS
        and x.dim() > 0
        and x.numel() > 0
        and use_kernel(x)
    )


def _fit_index(x: Tensor, index: Tensor, temperature: float, row_mask: Tensor | None) -> bool:
    return (
        index is not None
        and _fit(x, index, row_mask)
        and x.dim() > 1
        and index.dtype is torch.int64
        and index.numel() > 0
        and index.dim() in (x.dim() - 1, x.dim())
        and index.shape[: x.dim() - 1] == x.shape[:-1]
        and (row_mask is None or row_mask.shape == index.shape)
        and is_positive(temperature)
        and not (values_may_be_read(index) and bool((index == -1).any()))  # TRL has no padding
    )
