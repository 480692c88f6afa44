"""The KL divergence from a teacher that is known at k classes only."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from .._engine import arguments
from .._engine.autograd import row_loss
from .._engine.backend import use_kernel
from .._engine.dtensor import dispatch_dtensor
from .._engine.in_place import check_in_place
from .._engine.remember import remember_checks
from .._engine.symbolic import same_shape
from ..reference import Spec, topk, value_dtype
from ..reference.choices import Missing, Reduction, TargetType, check_choice

MISSING = get_args(Missing)
LOSSES = {missing: loss for loss, missing in topk.TOPK.items()}


@remember_checks
@dispatch_dtensor
def topk_kl_div(
    input: Tensor,
    values: Tensor,
    indices: Tensor,
    *,
    values_type: TargetType,
    missing: Missing = "ignore",
    dim: int = -1,
    reduction: Reduction = "batchmean",
    temperature: float = 1.0,
    token_weight: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    r"""Compute the KL divergence of the input from a teacher that is known at :math:`k` classes.

    .. math::
        \mathrm{KL}_K(p \,\|\, q) = \sum_{c \in K} p_c \,(\log p_c - \log q_c), \qquad
        q = \mathrm{softmax}(x / T)

    64 stored log-probabilities and indices per token take a few hundred bytes, where a row of
    logits takes many thousand.  :math:`q` is normalised over all :math:`C` classes.  ``missing``
    says what is done with the teacher's mass outside of :math:`K`,
    :math:`\rho = \max(0, 1 - \sum_K p)`:

    * ``"ignore"``: nothing.  The sum above may be negative where :math:`\rho > 0`.
    * ``"renormalize"``: the sum above is taken with :math:`p_c / \sum_K p` for :math:`p_c`.  It is
      NaN for a teacher without mass.
    * ``"uniform"``: the :math:`C - k` other classes share it evenly, which adds
      :math:`\sum_{c \notin K} p_0 (\log p_0 - \log q_c)` with :math:`p_0 = \rho / (C - k)`.

    The logits are read once in the forward and once in the backward.  Beyond their gradient the
    loss needs eight numbers per row (in place on a GPU, memory of the size of ``values``).

    A class with :math:`p_c = 0` adds nothing.  Teacher mass where the student has none gives
    :math:`+\infty` with a finite gradient.

    Args:
        input: Logits of any shape and strides, with the :math:`C` classes on ``dim``; float32,
            bfloat16, float16 or float64.
        values: The teacher at the :math:`k` classes, of the shape of ``input`` but with :math:`k`
            for :math:`C`, and any of its dtypes.  They get a gradient if they require one.
        indices: The :math:`k` classes (int64, int32, uint8), of the shape of ``values``; in any
            order, but each at most once per row.
        values_type: What ``values`` holds: ``"logits"`` (:math:`p` is their softmax at the same
            temperature, so :math:`\rho = 0`), ``"log_probs"`` or ``"probs"`` (which are used as
            they are).
        missing: ``"ignore"``, ``"renormalize"`` or ``"uniform"``, see above.
        dim: Dimension of the classes.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``) or ``"batchmean"`` (sum / ``input.size(0)``).
        temperature: :math:`T`, which divides the input, and ``values`` if they are logits.
        token_weight: Weights of the rows, of the shape of ``input`` without ``dim``.  They multiply
            the loss and, in a mean, the denominator.  Rows of weight 0 do not count, whatever they
            hold.
        inplace_backward: Write the gradient over the memory of the logits.  Autograd raises if
            another backward still needs them.  They must be neither a leaf of autograd's graph
            nor a view of one, and must not share memory with other arguments.  Under
            ``torch.compile`` a fresh gradient is used instead.

    Returns:
        The divergence in nats, float32 (float64 for float64 input).

    Raises:
        TypeError: A tensor has an unsupported dtype or layout, or an option is not a number.
        ValueError: Shapes do not match, an option is out of range, a weight or an option requires a
            gradient, or the logits may not be overwritten.  An index is twice in a row (on a CPU;
            elsewhere the row is NaN).
        IndexError: An index is not in ``[0, C)`` (on a CPU; elsewhere its row is NaN), or ``input``
            has no dimension ``dim``.
        RuntimeError: Tensors are on different devices.

    Example:
        >>> import torch, fastdiv
        >>> x = torch.zeros(1, 4)
        >>> p, classes = torch.tensor([[0.5, 0.3]]), torch.tensor([[2, 0]])
        >>> fastdiv.topk_kl_div(x, p, classes, values_type="probs")
        tensor(0.4013)
        >>> fastdiv.topk_kl_div(x, p, classes, values_type="probs", missing="uniform")
        tensor(0.2180)

    Source: :func:`fastdiv.kl_div` of the dense teacher that each policy stands for; on what a
    teacher of k classes leaves out: Anshumann et al., *Sparse Logit Sampling* (2025).
    """
    arguments.check_logits(input)
    arguments.check_logits(values, "values")
    arguments.check_label_type(indices, "indices")
    arguments.check_target_type(values_type, "values_type")
    check_choice(missing, MISSING, "missing")
    if str(reduction) == "pointwise":
        raise ValueError(
            "reduction must not be 'pointwise': the terms of topk_kl_div do not have the shape of "
            f"input; use one of {arguments.REDUCTIONS}"
        )
    arguments.check_reduction(reduction)
    dim = arguments.class_dim(input, dim)
    row_weight = arguments.token_weights(input, dim, token_weight)
    _check_shapes(input, values, indices, dim)
    if inplace_backward:
        check_in_place(input, values=values, indices=indices, token_weight=token_weight)
    x, v = arguments.as_rows(input, dim), arguments.as_rows(values, dim)
    y = arguments.as_rows(indices, dim).to(torch.int64)
    native = use_kernel(x)
    if not (native and x.is_cpu):  # the CPU kernel checks the indices
        if arguments.values_may_be_read(y):
            _check_indices(y, x.shape[1], row_weight)
        elif native:
            v = topk.without_wrong_rows(v, y, x.shape[1])
    if (v.dtype is torch.float64) != (x.dtype is torch.float64):
        v = v.to(value_dtype(x.dtype))
    spec = Spec(
        LOSSES[missing],
        target_type=values_type,
        reduction=reduction,
        batch=input.shape[0],
        scale=arguments.scale_of(temperature),
        inplace=inplace_backward,
    )
    value = row_loss(spec, x, v, y, None, row_weight)
    return arguments.as_input(value, input, dim) if reduction == "none" else value


def _check_shapes(x: Tensor, values: Tensor, indices: Tensor, dim: int) -> None:
    shape = tuple(values.shape)
    rows = arguments.row_shape(x, dim)
    if len(shape) != x.dim() or not same_shape(arguments.row_shape(values, dim), rows):
        raise ValueError(
            f"values must have the shape of input, {tuple(x.shape)}, with any k classes on "
            f"dim {dim}, got {shape}"
        )
    if not 1 <= shape[dim] <= x.shape[dim]:
        raise ValueError(
            f"values must have between 1 and {x.shape[dim]} classes on dim {dim} for an input of "
            f"shape {tuple(x.shape)}, got {shape[dim]} classes in shape {shape}"
        )
    if not same_shape(indices.shape, values.shape):
        raise ValueError(
            f"indices must have the shape of values, {shape}, got {tuple(indices.shape)}"
        )
    arguments.same_device(x, values, "values")
    arguments.same_device(x, indices, "indices")


def _check_indices(y: Tensor, classes: int, row_weight: Tensor | None) -> None:
    """Raise for an index that is out of range or twice in a row, in rows that count."""
    wrong = topk.wrong_rows(y, classes)
    if row_weight is not None:
        wrong = wrong & (row_weight != 0)
    if not bool(wrong.any()):
        return
    row = int(wrong.nonzero()[0])
    seen: set[int] = set()
    for index in y[row].tolist():
        if not 0 <= index < classes:
            raise IndexError(
                f"indices has {index} in row {row}, out of range for {classes} classes"
            )
        if index in seen:
            raise ValueError(f"indices has {index} twice in row {row}")
        seen.add(index)
