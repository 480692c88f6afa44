"""Several hidden states that share a layer: one pass over the weight, and a loss for each.

Their rows are joined, and the loss of the rows is computed once, with ``reduction="none"``.  Each
input's part of it is reduced on its own.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from .. import reference
from .._engine import arguments
from .._engine.backend import use_kernel
from .._engine.symbolic import is_true
from ..reference import Stats
from ..reference.choices import Accumulate, check_choice
from .dtypes import as_autocast
from .head import as_rows, check_target, checked_head


def check_lists(input: Any, target: Any, token_weight: Any) -> None:
    """Check that these are lists or tuples of one length, which is not 0, without DTensors."""
    if not isinstance(input, (list, tuple)):
        raise TypeError(f"input must be a Tensor or a list of them, got {type(input).__name__}")
    if not input:
        raise ValueError("input must hold at least one Tensor, got an empty list")
    for name, given in (("target", target), ("token_weight", token_weight)):
        if name == "token_weight" and (given is None or isinstance(given, str)):
            continue
        if not isinstance(given, (list, tuple)):
            raise TypeError(
                f"{name} must be a list of {len(input)} Tensors, one for each input, got "
                f"{type(given).__name__}"
            )
        if len(given) != len(input):
            raise ValueError(
                f"{name} must hold {len(input)} Tensors, one for each input, got {len(given)}"
            )
    distributed = sys.modules.get("torch.distributed.tensor")
    weights = token_weight if isinstance(token_weight, (list, tuple)) else ()
    every = (*input, *target, *weights)
    if distributed is not None and any(isinstance(v, distributed.DTensor) for v in every):
        raise TypeError("a list of inputs does not take DTensors: call the loss once for each")
    for i, t in enumerate(target):
        arguments.check_tensor(t, f"target[{i}]")
    if len({t.is_floating_point() for t in target}) > 1:
        raise ValueError(
            "targets must hold either class indices or probabilities for all inputs, got "
            f"{', '.join(str(t.dtype) for t in target)}"
        )


def check_shared(temperature: Any, class_mask: Any) -> None:
    """Check that temperature and mask are the same for all rows of all inputs."""
    if isinstance(temperature, Tensor) and not is_true(temperature.numel() == 1):
        raise ValueError(
            "temperature must be one number for a list of inputs, got Tensor of shape "
            f"{tuple(temperature.shape)}: call the loss once for each"
        )
    if isinstance(class_mask, Tensor) and class_mask.dim() != 1:
        raise ValueError(
            "class_mask must have one dimension for a list of inputs, whose rows share it, got "
            f"shape {tuple(class_mask.shape)}: call the loss once for each"
        )


def joined(inputs: Sequence[Tensor]) -> Tensor:
    """Return the rows of all hidden states, cast as under autocast, in one matrix."""
    cast: list[Tensor] = []
    for i, x in enumerate(inputs):
        name = f"input[{i}]"
        arguments.check_logits(x, name)
        x = as_autocast(x)
        first = cast[0] if cast else x
        if x.shape[-1] != first.shape[-1]:
            raise ValueError(
                f"{name} must have the width of input[0], {first.shape[-1]}, got shape "
                f"{tuple(x.shape)}"
            )
        if x.dtype != first.dtype:
            raise TypeError(f"{name} must have the dtype of input[0], {first.dtype}, got {x.dtype}")
        if x.device != first.device:
            raise RuntimeError(f"{name} is on {x.device}, but input[0] is on {first.device}")
        cast.append(x)
    return torch.cat([as_rows(x) for x in cast])


def apart(rows: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return each input's part of something that has the joined rows first."""
    shapes = [x.shape[:-1] for x in inputs]
    parts = rows.split([math.prod(shape) for shape in shapes])
    return [v.reshape((*s, *rows.shape[1:])) for v, s in zip(parts, shapes, strict=True)]


def losses_of_several(
    function: Callable[..., Any],
    input: Any,
    linear_weight: Tensor,
    target: Any,
    *,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    token_weight: Any,
    temperature: float | Tensor,
    class_mask: Tensor | None,
    return_stats: bool,
    accumulate: Accumulate | None,
    **more: Any,
) -> tuple[Any, ...]:
    """Compute a cross entropy for each input by one call of the function."""
    check_lists(input, target, token_weight)
    check_shared(temperature, class_mask)
    arguments.check_reduction(reduction)
    if accumulate is not None:
        check_choice(accumulate, get_args(Accumulate), "accumulate")
    if accumulate == "weight":
        raise ValueError(
            "accumulate='weight' computes the gradients in the forward, where the upstream "
            "gradients of several losses are unknown: use accumulate=None, or a call for each input"
        )
    head = checked_head(joined(input), linear_weight, linear_bias)
    logits = head.logits
    one, classes = logits.new_empty(()), logits.shape[-1]
    of_each = [one.expand(*x.shape[:-1], classes) for x in input]  # for their shapes
    labels: list[Tensor] = []
    for i, (x, t) in enumerate(zip(of_each, target, strict=True)):
        name, dim = f"target[{i}]", x.dim() - 1
        if t.is_floating_point():
            check_target(x, t, name)
            continue
        labels.append(arguments.labels(x, dim, t, name, ignore_index))
        if t.is_cpu and arguments.values_may_be_read(t):
            arguments.check_labels(labels[-1], x.shape[dim], name, ignore_index)
    weights: list[Tensor] | None = None
    if token_weight is not None and not isinstance(token_weight, str):
        weights = []
        for i, (x, w) in enumerate(zip(of_each, token_weight, strict=True)):
            name = f"token_weight[{i}]"
            w = arguments.weight_vector(x, w, name)
            weights.append(arguments.row_vector(x, x.dim() - 1, w, name))
    out = function(
        head.input,
        head.weight,
        torch.cat(labels or [as_rows(t) for t in target]),
        linear_bias=head.bias,
        weight=weight,
        reduction="none",
        ignore_index=ignore_index,
        token_weight=token_weight if weights is None else torch.cat(weights),
        temperature=temperature,
        class_mask=class_mask,
        return_stats=return_stats,
        accumulate=accumulate,
        **more,
    )
    value, stats = out if return_stats else (out, None)
    values = apart(value, input)
    if reduction != "none":
        class_weight = arguments.class_weights(logits, classes, weight)
        # The dtype in which the loss of one input is reduced.
        dtype = torch.float64 if use_kernel(logits) else value.dtype
        for i, x in enumerate(of_each):
            divisor: Tensor | int = x.shape[0] if reduction == "batchmean" else 1
            if reduction == "mean":
                of_rows = (labels[i] if labels else None, class_weight)
                row_weight = None if weights is None else weights[i]
                rows = one.expand(math.prod(x.shape[:-1]), classes)
                counts = reference.mean_weights(ignore_index, rows, *of_rows, row_weight)
                divisor = counts.sum(dtype=dtype)
            values[i] = (values[i].sum(dtype=dtype) / divisor).to(value.dtype)
    if stats is None:
        return tuple(values)
    found = zip(*(apart(s, input) for s in stats), strict=True)
    return tuple((v, Stats(*s)) for v, s in zip(values, found, strict=True))
