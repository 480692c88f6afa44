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

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .._engine import arguments
from .._engine.dtensor import dispatch_dtensor
from .._engine.masks import mask_rows
from .._engine.recording import size_of
from .._losses.cross_entropy import cross_entropy, cross_entropy_spec
from ..reference import Stats
from ..reference.choices import Accumulate, Reduction, Smoothing, TokenWeight
from .dtypes import check_logits_dtype, whole_logits
from .head import (
    as_rows,
    check_accumulate,
    check_chunk_size,
    check_target,
    checked_head,
    loss_of_head,
)
from .several import losses_of_several


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
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: Tensor | TokenWeight | None = None,
    class_mask: Tensor | None = None,
    return_stats: Literal[False] = False,
    chunk_size: int | None = None,
    accumulate: Accumulate | None = None,
    logits_dtype: torch.dtype | None = None,
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
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: Tensor | TokenWeight | None = None,
    class_mask: Tensor | None = None,
    return_stats: Literal[True],
    chunk_size: int | None = None,
    accumulate: Accumulate | None = None,
    logits_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Stats]: ...


@overload
def linear_cross_entropy(
    input: Sequence[Tensor],
    linear_weight: Tensor,
    target: Sequence[Tensor],
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    smoothing: Smoothing = "all",
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: Sequence[Tensor] | TokenWeight | None = None,
    class_mask: Tensor | None = None,
    return_stats: Literal[False] = False,
    chunk_size: int | None = None,
    accumulate: Accumulate | None = None,
    logits_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]: ...


@overload
def linear_cross_entropy(
    input: Sequence[Tensor],
    linear_weight: Tensor,
    target: Sequence[Tensor],
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    smoothing: Smoothing = "all",
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: Sequence[Tensor] | TokenWeight | None = None,
    class_mask: Tensor | None = None,
    return_stats: Literal[True],
    chunk_size: int | None = None,
    accumulate: Accumulate | None = None,
    logits_dtype: torch.dtype | None = None,
) -> tuple[tuple[Tensor, Stats], ...]: ...


@dispatch_dtensor
def linear_cross_entropy(
    input: Tensor | Sequence[Tensor],
    linear_weight: Tensor,
    target: Tensor | Sequence[Tensor],
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    smoothing: Smoothing = "all",
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: Tensor | Sequence[Tensor] | TokenWeight | None = None,
    class_mask: Tensor | None = None,
    return_stats: bool = False,
    chunk_size: int | None = None,
    accumulate: Accumulate | None = None,
    logits_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Any, ...]:
    r"""Compute the cross entropy of the logits of a linear layer, a tile at a time, in nats.

    .. math:: \mathrm{cross\_entropy}(h\,W^\top + b,\ \text{target})

    A drop-in for :func:`torch.nn.functional.linear_cross_entropy`, with every option of
    :func:`fastdiv.cross_entropy`, which has the formula.  With ``"sum"``, ``"mean"`` and
    ``"batchmean"`` the forward computes the gradients, too.  With ``"none"``, and in half
    precision, the backward computes the logits a second time, if ``accumulate`` does not say
    otherwise.

    Lists or tuples of hidden states, targets and ``token_weight`` give a tuple with the loss of
    each input, reduced over its own rows.  They share one pass over the weight and one gradient of
    it, as the heads of multi-token prediction do.  They also share the temperature, one number, and
    ``class_mask``, one row.  Their targets are all class indices or all probabilities, which are
    copied.  This costs four products, as ``"none"`` does, so a call for
    each costs less time where three are enough and there are many rows.

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
        temperature: :math:`T`, which divides the logits.  A tensor holds one number, or one for
            each row, and gets a gradient if it requires one.
        softcap: Replace the logits by ``softcap * tanh(x / softcap)`` first; None for no cap.
        z_loss: :math:`z`, the factor of the squared log-sum-exp.
        token_weight: Weights of the rows, shape ``(...)``.  They multiply the loss and, in a mean,
            the denominator.  Rows of weight 0 do not count, whatever they hold.  On a CPU their
            logits are not computed.  ``"probability"`` multiplies the loss of a row by the
            probability of its label, without a gradient through it; a mean still divides by the
            rows that count.
        class_mask: True for the classes that take part: bool, broadcastable to ``(..., C)``, or of
            shape ``(C,)``.  The others are as if at :math:`-\infty`, without mass in a target.  Or
            its bits: uint8 of shape ``(..., ceil(C / 8))``, where class :math:`c` is bit ``c % 8``
            of byte ``c // 8``.
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
        logits_dtype: ``torch.float32`` keeps logits of layers in half precision as the float32 sums
            that they are.  Their gradient is rounded only for the products that follow.  None
            rounds logits to the dtype of the layer, where the device multiplies in it.

    Returns:
        The loss, float32 (float64 if input or target is); with ``return_stats`` a pair of the loss
        and the statistics; for lists a tuple of these.  ``input``, ``linear_weight``,
        ``linear_bias`` and probabilities get a gradient, in their own dtype, if they require one.

    Raises:
        TypeError: A tensor has an unsupported dtype or layout, the tensors of a layer differ in
            dtype, or an option is not a number.
        ValueError: Shapes do not match, an option is out of range, a weight or an option requires a
            gradient, or lists are empty, differ in length, or mix indices with probabilities.
        IndexError: A label is neither in ``[0, C)`` nor ``ignore_index`` (on a CPU; elsewhere its
            row is NaN).
        RuntimeError: Tensors are on different devices.

    Example:
        >>> import torch, fastdiv
        >>> h, w = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.eye(3, 2)
        >>> fastdiv.linear_cross_entropy(h, w, torch.tensor([1, 0]))
        tensor(0.7531)
        >>> fastdiv.linear_cross_entropy([h[:1], h], w, [torch.tensor([1]), torch.tensor([1, 0])])
        (tensor(0.4076), tensor(0.7531))

    Source: :func:`torch.nn.functional.linear_cross_entropy`; Wijmans et al., *Cut Your Losses in
    Large-Vocabulary Language Models* (2024); Hsu et al., *Liger Kernel* (2024).
    """
    ignored = arguments.check_ignored(-100 if ignore_index is None else ignore_index)
    if chunk_size is None:
        chunk_size = getattr(options, "batch_chunk_size", None)
    if not isinstance(input, Tensor):
        return losses_of_several(
            linear_cross_entropy,
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignored,
            label_smoothing=label_smoothing,
            smoothing=smoothing,
            temperature=temperature,
            softcap=softcap,
            z_loss=z_loss,
            token_weight=token_weight,
            class_mask=class_mask,
            return_stats=return_stats,
            chunk_size=chunk_size,
            accumulate=accumulate,
            logits_dtype=logits_dtype,
        )
    if not isinstance(target, Tensor) or isinstance(token_weight, (list, tuple)):
        raise TypeError("target and token_weight must be Tensors where input is one, not lists")
    check_chunk_size(chunk_size)
    check_accumulate(accumulate, reduction)
    check_logits_dtype(logits_dtype)
    if isinstance(linear_weight, Tensor) and linear_weight.dim() > 2:
        return cross_entropy(  # type: ignore[misc]  # mypy gives up on unions of so many Literals
            _logits_of_many_dimensions(input, linear_weight, linear_bias, logits_dtype),
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
            class_mask=class_mask,
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
        softcap=softcap,
        z_loss=z_loss,
        token_weight=token_weight,
    )
    number, scale = arguments.scales(logits, dim, temperature)
    spec = spec._replace(scale=number)
    row_values = token_weight if isinstance(token_weight, Tensor) else None
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
        arguments.token_weights(logits, dim, row_values),
        scale=scale,
        mask=mask_rows(logits, dim, class_mask),
        stats=return_stats,
        chunk_size=chunk_size,
        accumulate=accumulate,
        logits_dtype=logits_dtype,
    )
    return value if stats is None else (value, stats)


def _logits_of_many_dimensions(
    input: Tensor, weight: Tensor, bias: Tensor | None, logits_dtype: torch.dtype | None
) -> Tensor:
    """Compute logits ``(..., C, d1, ..., dK)`` of a weight ``(C, d1, ..., dK, H)``, as torch."""
    flat_bias = None if bias is None else bias.flatten()
    logits = whole_logits(input, weight.flatten(0, -2), flat_bias, logits_dtype)
    return logits.unflatten(-1, weight.shape[:-1])
