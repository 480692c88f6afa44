r"""Losses of the logits of a linear layer, :math:`x = h W^\top + b`, computed a tile at a time.

They take the hidden states :math:`h` and the weight :math:`W` of a model's last layer in place of
its logits.  Value and gradients are those of the loss of ``F.linear(input, linear_weight,
linear_bias)`` up to rounding.  The gradient of a weight is summed in float32.  On a CPU without
matrix products in half precision, the logits are float32.

Memory beyond arguments and gradients is that of 256 rows of logits or, if it is more, at most a
tenth of all.  A tenth stops growing at 64 MB (512 MB on a GPU).  ``chunk_size`` sets other rows.
``accumulate="weight"`` adds sums of the size of the weight, and saves a matrix product.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch.nn.functional as F
from torch import Tensor

from .._engine import arguments
from .._engine.dtensor import dispatch_dtensor
from .._engine.recording import size_of
from .._losses.cross_entropy import cross_entropy, cross_entropy_spec
from ..reference import Spec, Stats
from ..reference.choices import Accumulate, Reduction, Smoothing
from .head import (
    as_rows,
    check_accumulate,
    check_chunk_size,
    check_target,
    checked_head,
    loss_of_head,
)


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    smoothing: Smoothing = "all",
    temperature: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    return_stats: Literal[False] = False,
    chunk_size: int | None = None,
    accumulate: Accumulate | None = None,
) -> Tensor: ...


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    smoothing: Smoothing = "all",
    temperature: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    return_stats: Literal[True],
    chunk_size: int | None = None,
    accumulate: Accumulate | None = None,
) -> tuple[Tensor, Stats]: ...


@dispatch_dtensor
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    smoothing: Smoothing = "all",
    temperature: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    return_stats: bool = False,
    chunk_size: int | None = None,
    accumulate: Accumulate | None = None,
) -> Tensor | tuple[Tensor, Stats]:
    r"""Compute the cross entropy of the logits of a linear layer, a tile at a time, in nats.

    .. math:: \mathrm{cross\_entropy}(h\,W^\top + b,\ \text{target})

    A drop-in for :func:`torch.nn.functional.linear_cross_entropy`, with every option of
    :func:`fastdiv.cross_entropy`, which has the formula.  With ``"sum"``, ``"mean"`` and
    ``"batchmean"`` the forward computes the gradients, too.  With ``"none"``, and in half
    precision, the backward computes the logits a second time, if ``accumulate`` does not say
    otherwise.

    Args:
        input: Hidden states :math:`h`, shape ``(..., H)``; float32, bfloat16, float16 or float64.
        linear_weight: Weight :math:`W` of the layer, shape ``(C, H)``, in the dtype of ``input``.
        target: Class indices (int64, int32, uint8), shape ``(...)``, or probabilities (floating),
            shape ``(..., C)``.
        linear_bias: Bias :math:`b` of the layer, shape ``(C,)``.
        weight: Weights of the classes, shape ``(C,)``; 1 by default.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight`` and the class weight of the label; NaN if no row counts) or
            ``"batchmean"`` (sum / ``input.size(0)``).
        ignore_index: Rows with this label do not count: their loss and gradient are 0, whatever
            they hold.  On a CPU their logits are not computed.  None means -100.
        label_smoothing: :math:`\varepsilon` in [0, 1].
        options: ``torch.nn.LinearCrossEntropyOptions``, of which only ``batch_chunk_size`` is used,
            if ``chunk_size`` is None.
        smoothing: ``"all"`` spreads :math:`\varepsilon` over all classes, ``"others"`` over all but
            the label.
        temperature: :math:`T`, which divides the logits.
        softcap: Replace the logits by ``softcap * tanh(x / softcap)`` first; None for no cap.
        z_loss: :math:`z`, the factor of the squared log-sum-exp.
        token_weight: Weights of the rows, shape ``(...)``.  They multiply the loss and, in a mean,
            the denominator.  Rows of weight 0 do not count, whatever they hold.  On a CPU their
            logits are not computed.
        return_stats: Also return :class:`fastdiv.Stats`: ``lse``, ``entropy``, ``argmax`` and
            ``log_prob`` of every row, without gradient.  ``log_prob`` is that of the label (0 where
            the row does not count), or :math:`\sum_c p_c \log q_c` for probabilities.
        chunk_size: Rows whose logits are held at a time; by default 256, or as many as take a tenth
            of the memory of all logits if those are more.
        accumulate: Which gradient is summed over the tiles.  ``"weight"`` takes chunks of rows and
            three matrix products, for any reduction but ``"none"``.  In half precision it holds a
            float32 sum of the weight's size, :math:`4 C H` bytes, until the backward.  ``"rows"``
            takes blocks of classes and four products, without that sum.  None takes ``"weight"``
            where it needs no such sum, or one of at most 1/24 of all logits and 32 MB (256 MB
            on a GPU); else ``"rows"``.

    Returns:
        The loss, float32 (float64 if input or target is); with ``return_stats`` a pair of the loss
        and the statistics.  ``input``, ``linear_weight``, ``linear_bias`` and probabilities get a
        gradient, in their own dtype, if they require one.

    Raises:
        TypeError: A tensor has an unsupported dtype or layout, the tensors of a layer differ in
            dtype, or an option is not a number.
        ValueError: Shapes do not match, an option is out of range, or a weight or an option
            requires a gradient.
        IndexError: A label is neither in ``[0, C)`` nor ``ignore_index`` (on a CPU; elsewhere its
            row is NaN).
        RuntimeError: Tensors are on different devices.

    Example:
        >>> import torch, fastdiv
        >>> h, w = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.eye(3, 2)
        >>> fastdiv.linear_cross_entropy(h, w, torch.tensor([1, 0]))
        tensor(0.7531)

    Source: :func:`torch.nn.functional.linear_cross_entropy`; Wijmans et al., *Cut Your Losses in
    Large-Vocabulary Language Models* (2024); Hsu et al., *Liger Kernel* (2024).
    """
    ignored = arguments.check_ignored(-100 if ignore_index is None else ignore_index)
    if chunk_size is None:
        chunk_size = getattr(options, "batch_chunk_size", None)
    check_chunk_size(chunk_size)
    check_accumulate(accumulate, reduction)
    if isinstance(linear_weight, Tensor) and linear_weight.dim() > 2:
        return cross_entropy(  # type: ignore[misc]  # mypy gives up on unions of so many Literals
            _logits_of_many_dimensions(input, linear_weight, linear_bias),
            target,
            weight,
            dim=input.dim() - 1,
            reduction=reduction,
            ignore_index=ignored,
            label_smoothing=label_smoothing,
            smoothing=smoothing,
            temperature=temperature,
            softcap=softcap,
            z_loss=z_loss,
            token_weight=token_weight,
            return_stats=return_stats,  # type: ignore[call-overload]
        )
    head = checked_head(input, linear_weight, linear_bias)
    logits = head.logits
    dim = logits.dim() - 1
    classes = size_of(logits, dim)
    arguments.check_reduction(reduction)
    spec = cross_entropy_spec(
        target,
        classes,
        batch=logits.shape[0],
        reduction=reduction,
        ignore_index=ignored,
        label_smoothing=label_smoothing,
        smoothing=smoothing,
        temperature=temperature,
        softcap=softcap,
        z_loss=z_loss,
    )
    t = y = None
    if target.is_floating_point():
        check_target(logits, target)
        t = as_rows(target)
    else:
        y = arguments.labels(logits, dim, target, "target", ignored)
    value, stats = loss_of_head(
        spec,
        head,
        (t, None, None),
        y,
        arguments.class_weights(logits, classes, weight),
        arguments.token_weights(logits, dim, token_weight),
        stats=return_stats,
        chunk_size=chunk_size,
        accumulate=accumulate,
    )
    return value if stats is None else (value, stats)


def _logits_of_many_dimensions(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute logits ``(..., C, d1, ..., dK)`` of a weight ``(C, d1, ..., dK, H)``, as torch."""
    flat_bias = None if bias is None else bias.flatten()
    return F.linear(input, weight.flatten(0, -2), flat_bias).unflatten(-1, weight.shape[:-1])


@dispatch_dtensor
def linear_log_prob_and_entropy(
    input: Tensor,
    linear_weight: Tensor,
    index: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Compute log-probability and entropy of the logits of a linear layer, a tile at a time.

    .. math:: \log q_y, \quad -\sum_c q_c \log q_c,
        \qquad q = \mathrm{softmax}\bigl((h\,W^\top + b) / T\bigr)

    This is :func:`fastdiv.log_prob_and_entropy` of ``F.linear(input, linear_weight, linear_bias)``,
    which policy-gradient fine-tuning needs.  The backward computes the logits a second time.

    Args:
        input: Hidden states :math:`h`, shape ``(..., H)``; float32, bfloat16, float16 or float64.
        linear_weight: Weight :math:`W` of the layer, shape ``(C, H)``, in the dtype of ``input``.
        index: Class indices (int64, int32, uint8), shape ``(...)``.
        linear_bias: Bias :math:`b` of the layer, shape ``(C,)``.
        temperature: :math:`T`, which divides the logits.
        chunk_size: Rows whose logits are held at a time; by default 256, or as many as take a tenth
            of the memory of all logits if those are more.

    Returns:
        ``(log_prob, entropy)`` in nats, shape ``(...)`` each, float32 (float64 for float64 input);
        both differentiable.

    Raises:
        TypeError: A tensor has an unsupported dtype or layout, the tensors of a layer differ in
            dtype, or an option is not a number.
        ValueError: Shapes do not match, or an option is out of range or requires a gradient.
        IndexError: An index is not in ``[0, C)`` (on a CPU; elsewhere its row is NaN).
        RuntimeError: Tensors are on different devices.

    Example:
        >>> import torch, fastdiv
        >>> h, w = torch.zeros(1, 2), torch.ones(4, 2)
        >>> fastdiv.linear_log_prob_and_entropy(h, w, torch.tensor([2]))
        (tensor([-1.3863]), tensor([1.3863]))

    Source: :func:`fastdiv.log_prob_and_entropy`.
    """
    head = checked_head(input, linear_weight, linear_bias)
    logits = head.logits
    ignored = arguments.NO_LABEL_IGNORED
    label = arguments.labels(logits, logits.dim() - 1, index, "index", ignored)
    scale = arguments.scale_of(temperature)
    spec = Spec("log_prob_and_entropy", ignore_index=ignored, scale=scale)
    value, _ = loss_of_head(spec, head, label=label, chunk_size=chunk_size)
    return value[0], value[1]
