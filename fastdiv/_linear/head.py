"""Checks of the layers that the linear losses take, and the call of a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from .._engine import arguments
from .._engine.symbolic import same_shape
from ..reference import Spec, Stats
from ..reference.choices import Accumulate, check_choice
from .autograd import LinearCall, linear_loss
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
    input, weight = as_autocast(input), as_autocast(weight)
    bias = None if bias is None else as_autocast(bias)
    if weight.dim() != 2 or weight.shape[1] != input.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"{prefix}linear_weight must have shape (classes, {input.shape[-1]}) for {name} of "
            f"shape {tuple(input.shape)}, got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
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


# Which devices have autocast.  The call is made here: the compiler of torch 2.11 cannot trace it.
_HAS_AUTOCAST = {
    device: torch.amp.is_autocast_available(device)
    for device in ("cpu", "cuda", "hpu", "maia", "meta", "mps", "mtia", "xla", "xpu")
}


def _has_autocast(device: str) -> bool:
    known = _HAS_AUTOCAST.get(device)
    return torch.amp.is_autocast_available(device) if known is None else known


def as_autocast(v: Tensor) -> Tensor:
    """Cast a tensor as autocast does on its device."""
    device = v.device.type
    if v.dtype == torch.float64 or not _has_autocast(device):
        return v
    return v.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else v


def as_rows(v: Tensor) -> Tensor:
    """Return a matrix whose rows go along the last dimension."""
    return arguments.as_rows(v, v.dim() - 1)


def check_target(logits: Tensor, target: Tensor) -> None:
    """Check that the target has the shape and device of the logits."""
    arguments.check_logits(target, "target")
    if not same_shape(target.shape, logits.shape):
        raise ValueError(
            f"target must have the shape of the logits, {tuple(logits.shape)}, got "
            f"{tuple(target.shape)}"
        )
    arguments.same_device(logits, target, "target")


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
    stats: bool = False,
    chunk_size: int | None = None,
    accumulate: Accumulate | None = None,
) -> tuple[Tensor, Stats | None]:
    """Compute the loss, reduced or in the shape of the rows, and statistics if ``stats``."""
    check_chunk_size(chunk_size)
    check_accumulate(accumulate, spec.reduction)
    logits, t = student.logits, teacher[0]
    dtype = dtype_of_value(logits, t)
    weights = (None if w is None else w.to(dtype) for w in (class_weight, row_weight))
    call = LinearCall(spec, stats, chunk_size or 0, accumulate)
    value, found = linear_loss(call, *student.tensors, *teacher, label, *weights)

    def as_input(v: Tensor) -> Tensor:
        return v.reshape((*v.shape[:-1], *logits.shape[:-1]))

    if spec.reduction == "none":
        value = as_input(value)
    return value, None if found is None else Stats(*map(as_input, found))
