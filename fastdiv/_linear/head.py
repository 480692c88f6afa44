"""Checks of the layers that the linear losses take, and the call of a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from .._engine import arguments
from .._engine.symbolic import same_shape
from ..reference import OF_CLASSES, Spec, Stats
from ..reference.choices import Accumulate, check_choice
from .autograd import LinearCall, linear_loss
from .dtypes import as_autocast, check_logits_dtype
from .ops import dtype_of_value


@dataclass
class LinearHead:
    """Hidden states of any shape, with the weight and bias of a linear layer."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None

    @property
    def logits(self) -> Tensor:
        """A tensor with shape, dtype and device of the logits that takes no memory."""
        return self.input.new_empty(()).expand(*self.input.shape[:-1], self.weight.shape[0])

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states as a matrix of rows, weight and bias."""
        return as_rows(self.input), self.weight, self.bias


def checked_head(
    input: Tensor, weight: Tensor, bias: Tensor | None, name: str = "input", prefix: str = ""
) -> LinearHead:
    """Check the tensors of a layer, and cast them as ``F.linear`` would under autocast."""
    arguments.check_logits(input, name)
    names = f"{prefix}linear_weight", f"{prefix}linear_bias"
    arguments.check_logits(weight, names[0])
    if bias is not None:
        arguments.check_logits(bias, names[1])
    given = weight, bias
    input, weight = as_autocast(input), as_autocast(weight)
    bias = None if bias is None else as_autocast(bias)
    if weight.dim() != 2 or weight.shape[1] != input.shape[-1] or weight.shape[0] == 0:
        _check_not_partitioned(given[0], names[0])
        raise ValueError(
            f"{prefix}linear_weight must have shape (classes, {input.shape[-1]}) for {name} of "
            f"shape {tuple(input.shape)}, got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        _check_not_partitioned(given[1], names[1])
        raise ValueError(
            f"{prefix}linear_bias must have shape ({weight.shape[0]},), one for each class, got "
            f"{tuple(bias.shape)}"
        )
    for of, v in zip(names, (weight, bias), strict=True):
        if v is not None and v.dtype != input.dtype:
            raise TypeError(f"{of} must have the dtype of {name}, {input.dtype}, got {v.dtype}")
        if v is not None and v.device != input.device:
            raise RuntimeError(f"{of} is on {v.device}, but {name} is on {input.device}")
    return LinearHead(input, weight, bias)


def _check_not_partitioned(v: Tensor | None, name: str) -> None:
    """Raise RuntimeError for a parameter that is empty until DeepSpeed gathers it."""
    if v is not None and hasattr(v, "ds_id") and v.numel() == 0:
        raise RuntimeError(
            f"{name} is a parameter that ZeRO-3 of DeepSpeed has partitioned, and is empty outside "
            "of the forward of its module: compute the loss in that forward, or let the model hold "
            "and call a module of fastdiv.nn, whose layer has the weight"
        )


def as_rows(v: Tensor) -> Tensor:
    """Return a matrix whose rows go along the last dimension."""
    return arguments.as_rows(v, v.dim() - 1)


def check_target(logits: Tensor, target: Tensor, name: str = "target") -> None:
    """Check that the target has the shape and device of the logits."""
    arguments.check_logits(target, name)
    if not same_shape(target.shape, logits.shape):
        raise ValueError(
            f"{name} must have the shape of the logits, {tuple(logits.shape)}, got "
            f"{tuple(target.shape)}"
        )
    arguments.same_device(logits, target, name)


def check_chunk_size(chunk_size: int | None) -> None:
    """Raise ValueError unless this is None or a positive number of rows."""
    if chunk_size is not None and not (isinstance(chunk_size, int) and chunk_size > 0):
        raise ValueError(f"chunk_size must be a positive number of rows, got {chunk_size!r}")


def check_accumulate(accumulate: str | None, reduction: str) -> None:
    """Raise ValueError for a word that is unknown, or that the reduction does not allow."""
    if accumulate is None:
        return
    check_choice(accumulate, get_args(Accumulate), "accumulate")
    if accumulate == "weight" and reduction == "none":
        raise ValueError(
            "accumulate='weight' computes the gradients in the forward, where the upstream "
            "gradients of reduction='none' are unknown: use accumulate=None, or reduce the loss"
        )


def loss_of_head(
    spec: Spec,
    student: LinearHead,
    teacher: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    label: Tensor | None = None,
    class_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    mask: Tensor | None = None,
    stats: bool = False,
    chunk_size: int | None = None,
    accumulate: Accumulate | None = None,
    logits_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Stats | None]:
    """Compute the loss, reduced or in the shape of the rows, and statistics if ``stats``.

    The value of a loss of named classes is a matrix ``[R, k]``.
    """
    check_chunk_size(chunk_size)
    check_accumulate(accumulate, spec.reduction)
    check_logits_dtype(logits_dtype)
    logits, t = student.logits, teacher[0]
    dtype = dtype_of_value(logits, t)
    class_weight, row_weight, scale = (
        None if v is None else v.to(dtype) for v in (class_weight, row_weight, scale)
    )
    rows = (scale, label, class_weight, row_weight, mask)
    call = LinearCall(spec, stats, chunk_size or 0, accumulate, logits_dtype)
    value, found = linear_loss(call, *student.tensors, *teacher, *rows)

    def as_input(v: Tensor) -> Tensor:
        return v.reshape((*v.shape[:-1], *logits.shape[:-1]))

    if spec.reduction == "none" and spec.loss not in OF_CLASSES:
        value = as_input(value)
    return value, None if found is None else Stats(*map(as_input, found))
