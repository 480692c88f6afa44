"""KL divergence from a teacher that is known at k classes only."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from .._engine import arguments
from .._engine.autograd import row_loss
from .._engine.backend import use_kernel
from .._engine.dtensor import takes_dtensors
from .._engine.in_place import check_in_place
from .._engine.symbolic import same_shape
from ..reference import Spec, topk, value_dtype
from ..reference.choices import Missing, Reduction, TargetType, check_choice

MISSING = get_args(Missing)
LOSSES = {missing: loss for loss, missing in topk.TOPK.items()}


@takes_dtensors
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
    r"""KL divergence of the input's distribution from a teacher known at :math:`k` classes.

    .. math::
        \mathrm{KL}_K(p \,\|\, q) = \sum_{c \in K} p_c \,(\log p_c - \log q_c), \qquad
        q = \mathrm{softmax}(x / T)

    A teacher of 64 log-probabilities and indices a token, stored beforehand, takes a few hundred
    bytes in the place of a row of logits.  :math:`q` stays normalised over all :math:`C` classes.
    What becomes of the teacher's mass outside of :math:`K`, :math:`\rho = \max(0, 1 - \sum_K p)`,
    is chosen by ``missing``:

    * ``"ignore"``: nothing; the sum above, which may be negative where :math:`\rho > 0`.
    * ``"renormalize"``: the sum above with :math:`p_c / \sum_K p` for :math:`p_c`; NaN of a teacher
      without mass.
    * ``"uniform"``: the :math:`C - k` other classes share it evenly, which adds
      :math:`\sum_{c \notin K} p_0 (\log p_0 - \log q_c)` with :math:`p_0 = \rho / (C - k)`.

    The logits are read once in the forward and once in the backward; beyond their gradient, memory
    is eight numbers a row (in place on a GPU, of the size of ``values``).

    Args:
        input: Logits :math:`x` of any shape with the :math:`C` classes on ``dim``; float32,
            bfloat16, float16 or float64, strided as it comes.
        values: The teacher at the :math:`k` classes: the shape of ``input`` with :math:`k` in place
            of :math:`C` on ``dim``, any of those dtypes.  Gets a gradient where it requires one.
        indices: Which classes these are (int64, int32, uint8), of the shape of ``values``; in any
            order, each once in a row.
        values_type: ``"logits"``, whose softmax over the :math:`k` at the same temperature is
            :math:`p` (so that :math:`\rho = 0`), or ``"log_probs"`` or ``"probs"``, which are taken
            as they are.  Required.
        missing: ``"ignore"``, ``"renormalize"`` or ``"uniform"``, see above.
        dim: Dimension of the classes.
        reduction: ``"none"`` (one value a row), ``"sum"``, ``"mean"`` (over the rows that count, by
            token weight) or ``"batchmean"`` (sum / ``input.size(0)``).
        temperature: :math:`T`; divides the input, and ``values`` where they are logits.
        token_weight: Weights of the rows, of the shape of ``input`` without ``dim``.  A row of
            weight 0 does not count: loss and gradient 0, whatever it holds in input, values and
            indices.
        inplace_backward: The backward writes the gradient over the logits' own memory; autograd
            notices, so that wrong use raises.  Under ``torch.compile`` a fresh gradient is used.
            The logits may be no leaf of autograd's graph, nor a view of one, and no other argument
            may share their memory.

    Returns:
        The divergence in nats, float32 (float64 for float64 input).  A class with :math:`p_c = 0`
        adds nothing.  Mass where the student has none, one of the :math:`k` or with ``"uniform"``
        any class, gives :math:`+\infty` with a finite gradient.

    Raises:
        TypeError: a dtype that is not one of the above; a sparse, nested or quantized tensor; a
            temperature that is no number.
        ValueError: shapes that do not fit, an option out of its range, a temperature that requires
            a gradient, logits that may not be overwritten, an index that is twice in a row (off the
            CPU such a row is NaN).
        IndexError: an index outside ``[0, C)`` (off the CPU such a row is NaN), a dimension that
            ``input`` does not have.

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
            "reduction 'pointwise' is not for topk_kl_div, whose terms are not of the shape of "
            f"input: take one of {arguments.REDUCTIONS}"
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
    if not (native and x.is_cpu):  # whose kernel looks for itself
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
            f"values of shape {shape} has {shape[dim]} classes on dim {dim}, which must be between "
            f"1 and the {x.shape[dim]} of input"
        )
    if not same_shape(indices.shape, values.shape):
        raise ValueError(
            f"indices must have the shape of values, {shape}, got {tuple(indices.shape)}"
        )
    arguments.same_device(x, values, "values")
    arguments.same_device(x, indices, "indices")


def _check_indices(y: Tensor, classes: int, row_weight: Tensor | None) -> None:
    """Raises for an index that is no class, or twice in a row, where the row counts."""
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
