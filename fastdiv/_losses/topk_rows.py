"""Check a top-k teacher, and compute its loss of rows from named log-probabilities.

A loss of a layer differs from one of logits only in where its named log-probabilities come from.
"""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch
from torch import Tensor

from .._engine import arguments
from .._engine.autograd import row_loss
from .._engine.backend import use_kernel
from .._engine.masks import check_integers
from .._engine.symbolic import same_shape
from ..reference import NAMED, Spec, topk, value_dtype
from ..reference.choices import KLMissing, Missing, check_choice

MISSING, KL_MISSING = get_args(Missing), get_args(KLMissing)


Scales = tuple[float, Tensor | None]  # what ``arguments.scales`` returns


class TopKLoss(NamedTuple):
    """A loss of a top-k teacher with its options."""

    name: str  # of the function, for messages
    kind: str  # "kl_div", "reverse_kl_div" or "js_div"
    values_type: str
    missing: str
    reduction: str
    beta: float = 0.0

    @property
    def named(self) -> str:
        """Return the loss of rows that gives the log-probabilities that this one needs."""
        return NAMED[topk.rest_of(self.missing, self.values_type)]


def make_loss(
    name: str,
    kind: str,
    *,
    values_type: str,
    missing: str,
    reduction: str,
    beta: float = 0.0,
) -> TopKLoss:
    """Check the options of a loss of a top-k teacher."""
    arguments.check_target_type(values_type, "values_type")
    if kind == "kl_div":
        check_choice(missing, KL_MISSING, "missing")
    elif missing == "uniform":
        raise ValueError(
            f"missing must not be 'uniform' for {name}, which needs every log-probability of the "
            "input for it: use missing='tail', or the divergence of a dense target"
        )
    else:
        check_choice(missing, MISSING, "missing")
    if str(reduction) == "pointwise":
        raise ValueError(
            f"reduction must not be 'pointwise': the terms of {name} do not have the shape of "
            f"input; use one of {arguments.REDUCTIONS}"
        )
    arguments.check_reduction(reduction)
    return TopKLoss(name, kind, values_type, missing, reduction, beta)


def check_teacher(values: Tensor, indices: Tensor) -> None:
    """Check the types of the teacher's tensors."""
    arguments.check_logits(values, "values")
    check_integers(indices, "indices")


def check_shapes(x: Tensor, classes: int, values: Tensor, indices: Tensor, dim: int) -> None:
    """Check the shapes of the teacher's tensors, whose rows are those of x without ``dim``."""
    shape = tuple(values.shape)
    rows = arguments.row_shape(x, dim)
    if len(shape) != x.dim() or not same_shape(arguments.row_shape(values, dim), rows):
        raise ValueError(
            f"values must have the shape of input, {tuple(x.shape)}, with any k classes on "
            f"dim {dim}, got {shape}"
        )
    if not 1 <= shape[dim] <= classes:
        raise ValueError(
            f"values must have between 1 and {classes} classes on dim {dim} for an input of "
            f"shape {tuple(x.shape)}, got {shape[dim]} classes in shape {shape}"
        )
    if not same_shape(indices.shape, values.shape):
        raise ValueError(
            f"indices must have the shape of values, {shape}, got {tuple(indices.shape)}"
        )
    arguments.same_device(x, values, "values")
    arguments.same_device(x, indices, "indices")


def check_indices(indices: Tensor, classes: int, row_weight: Tensor | None) -> None:
    """Raise for an index that is out of range or twice in a row, in rows that count."""
    if not arguments.values_may_be_read(indices):
        return  # the row becomes NaN
    wrong = topk.wrong_rows(indices, classes)
    if row_weight is not None:
        wrong = wrong & (row_weight != 0)
    if not bool(wrong.any()):
        return
    row = int(wrong.nonzero()[0])
    seen: set[int] = set()
    for index in indices[row].tolist():
        if not topk.PADDING <= index < classes:
            raise IndexError(
                f"indices has {index} in row {row}, out of range for {classes} classes "
                f"({topk.PADDING} is padding)"
            )
        if index in seen:
            raise ValueError(f"indices has {index} twice in row {row}")
        seen.update({index} - {topk.PADDING})


def named_of_logits(
    loss: TopKLoss,
    x: Tensor,
    indices: Tensor,
    row_weight: Tensor | None,
    scales: Scales,
    mask: Tensor | None,
    inplace: bool,
) -> Tensor:
    """Return the log-probabilities that a loss needs of rows of logits."""
    number, scale = scales
    spec = Spec(loss.named, scale=number, inplace=inplace)
    named = row_loss(spec, x, None, indices, None, row_weight, scale=scale, mask=mask)
    if x.is_cpu or not use_kernel(x):
        return named
    return nan_if_wrong(named, indices, x.shape[1])


def nan_if_wrong(named: Tensor, indices: Tensor, classes: int) -> Tensor:
    """Set rows of wrong indices to NaN: no kernel of a GPU finds a class that is given twice."""
    wrong = topk.wrong_rows(indices, classes)
    return named + torch.where(wrong, torch.nan, 0.0).to(named.dtype).unsqueeze(-1)


def loss_of_named(
    loss: TopKLoss,
    named: Tensor,
    values: Tensor,
    indices: Tensor,
    row_weight: Tensor | None,
    scales: Scales,
    *,
    classes: int,
    batch: int,
    dtype: torch.dtype,
) -> Tensor:
    """Compute a loss from named log-probabilities; ``dtype`` is that of the logits."""
    number, scale = scales
    if row_weight is not None:  # what a row that does not count holds must not reach its gradient
        counts = (row_weight != 0).unsqueeze(-1)
        values, named = torch.where(counts, values, 0.0), torch.where(counts, named, 0.0)
    value = topk.rows_of_named(
        loss.kind,
        named,
        values,
        indices,
        classes=classes,
        values_type=loss.values_type,
        missing=loss.missing,
        scale=number if scale is None else scale.double().unsqueeze(-1),
        beta=loss.beta,
    )
    return topk.weighted_rows(value, row_weight, loss.reduction, batch, value_dtype(dtype))
