"""Divergences of a linear layer from a teacher that is known at k classes, a tile at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from .._engine import arguments
from .._engine.backend import use_kernel
from .._engine.dtensor import dispatch_dtensor
from .._engine.masks import mask_rows
from .._losses.topk_rows import (
    TopKLoss,
    check_indices,
    check_shapes,
    check_teacher,
    loss_of_named,
    make_loss,
    nan_if_wrong,
)
from ..reference import Spec
from ..reference.choices import KLMissing, Missing, Reduction, TargetType
from .head import as_rows, checked_head, loss_of_head


def _of_layer(
    loss: TopKLoss,
    layer: tuple[Tensor, Tensor, Tensor | None],
    values: Tensor,
    indices: Tensor,
    *,
    temperature: float | Tensor,
    token_weight: Tensor | None,
    class_mask: Tensor | None,
    logits_dtype: torch.dtype | None,
    chunk_size: int | None,
) -> Tensor:
    """Check the tensors of a loss of a layer ``(input, weight, bias)``, and compute it."""
    head = checked_head(*layer)
    logits = head.logits
    dim, classes = logits.dim() - 1, logits.shape[-1]
    check_teacher(values, indices)
    row_weight = arguments.token_weights(logits, dim, token_weight)
    check_shapes(logits, classes, values, indices, dim)
    scales = arguments.scales(logits, dim, temperature)
    v, y = as_rows(values), as_rows(indices)
    check_indices(y, classes, row_weight)
    named, _ = loss_of_head(
        Spec(loss.named, scale=scales[0]),
        head,
        label=y,
        row_weight=row_weight,
        scale=scales[1],
        mask=mask_rows(logits, dim, class_mask),
        chunk_size=chunk_size,
        logits_dtype=logits_dtype,
    )
    if not y.is_cpu and use_kernel(head.input):
        named = nan_if_wrong(named, y, classes)
    batch, dtype = logits.shape[0], logits.dtype
    value = loss_of_named(
        loss, named, v, y, row_weight, scales, classes=classes, batch=batch, dtype=dtype
    )
    return value.reshape(logits.shape[:-1]) if loss.reduction == "none" else value


@dispatch_dtensor
def linear_topk_kl_div(
    input: Tensor,
    linear_weight: Tensor,
    values: Tensor,
    indices: Tensor,
    *,
    values_type: TargetType,
    missing: KLMissing = "ignore",
    linear_bias: Tensor | None = None,
    reduction: Reduction = "batchmean",
    temperature: float | Tensor = 1.0,
    token_weight: Tensor | None = None,
    class_mask: Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Compute the KL divergence of a linear layer from a top-k teacher, a tile at a time.

    .. math::
        \mathrm{KL}_K(p \,\|\, q) = \sum_{c \in K} p_c \,(\log p_c - \log q_c), \qquad
        q = \mathrm{softmax}\bigl((h\,W^\top + b) / T\bigr)

    This is :func:`fastdiv.topk_kl_div` of ``F.linear(input, linear_weight, linear_bias)``, which
    says what each ``missing`` does.  The backward computes the logits a second time, which makes
    four matrix products in all.

    Args:
        input: Hidden states :math:`h`, shape ``(..., H)``; float32, bfloat16, float16 or float64.
        linear_weight: Weight :math:`W` of the layer, shape ``(C, H)``, in the dtype of ``input``.
        values: The teacher at the :math:`k` classes, shape ``(..., k)``, in any floating dtype.
            They get a gradient if they require one.
        indices: The :math:`k` classes (int64, int32, int16, uint8), of the shape of ``values``; in
            any order, but each at most once per row.  -1 is padding: no class, whatever its value.
            On a CPU the logits of a row that is all padding are not computed.
        values_type: What ``values`` holds: ``"logits"`` (:math:`p` is their softmax at the same
            temperature), ``"log_probs"`` or ``"probs"`` (which are used as they are).
        missing: ``"ignore"``, ``"renormalize"``, ``"tail"`` or ``"uniform"``.
        linear_bias: Bias :math:`b` of the layer, shape ``(C,)``.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``) or ``"batchmean"`` (sum / ``input.size(0)``).
        temperature: :math:`T`, which divides the logits, and ``values`` if they are logits.  A
            tensor holds one number, or one for each row, and gets a gradient if it requires one.
        token_weight: Weights of the rows, shape ``(...)``.  They multiply the loss and, in a mean,
            the denominator.  Rows of weight 0 do not count, whatever they hold.  On a CPU their
            logits are not computed.
        class_mask: True for the classes that take part: bool, broadcastable to ``(..., C)``, or of
            shape ``(C,)``.  The others are as if at :math:`-\infty`.  Or its bits: uint8 of shape
            ``(..., ceil(C / 8))``, where class :math:`c` is bit ``c % 8`` of byte ``c // 8``.
        logits_dtype: ``torch.float32`` keeps logits of layers in half precision as the float32 sums
            that they are.  Their gradient is rounded only for the products that follow.  None
            rounds logits to the dtype of the layer, where the device multiplies in it.
        chunk_size: Rows whose logits are held at a time; by default 256, or as many as take a tenth
            of the memory of all logits if those are more.

    Returns:
        The divergence in nats, float32 (float64 for float64 input).

    Raises:
        TypeError: A tensor has an unsupported dtype or layout, the tensors of a layer differ in
            dtype, or an option is not a number.
        ValueError: Shapes do not match, an option is out of range, or a weight requires a gradient.
            A class is twice in a row (on a CPU; elsewhere the row is NaN).
        IndexError: An index is not in ``[-1, C)`` (on a CPU; elsewhere its row is NaN).
        RuntimeError: Tensors are on different devices.

    Example:
        >>> import torch, fastdiv
        >>> h, w = torch.zeros(1, 2), torch.ones(4, 2)
        >>> p, classes = torch.tensor([[0.5, 0.3]]), torch.tensor([[2, 0]])
        >>> fastdiv.linear_topk_kl_div(h, w, p, classes, values_type="probs", missing="tail")
        tensor(0.2180)

    Source: :func:`fastdiv.topk_kl_div`.
    """
    loss = make_loss(
        "linear_topk_kl_div",
        "kl_div",
        values_type=values_type,
        missing=missing,
        reduction=reduction,
    )
    return _of_layer(
        loss,
        (input, linear_weight, linear_bias),
        values,
        indices,
        temperature=temperature,
        token_weight=token_weight,
        class_mask=class_mask,
        logits_dtype=logits_dtype,
        chunk_size=chunk_size,
    )


@dispatch_dtensor
def linear_topk_reverse_kl_div(
    input: Tensor,
    linear_weight: Tensor,
    values: Tensor,
    indices: Tensor,
    *,
    values_type: TargetType,
    missing: Missing = "ignore",
    linear_bias: Tensor | None = None,
    reduction: Reduction = "batchmean",
    temperature: float | Tensor = 1.0,
    token_weight: Tensor | None = None,
    class_mask: Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Compute the reverse KL divergence of a linear layer from a top-k teacher, a tile at a time.

    .. math::
        \mathrm{KL}_K(q \,\|\, p) = \sum_{c \in K} q_c \,(\log q_c - \log p_c), \qquad
        q = \mathrm{softmax}\bigl((h\,W^\top + b) / T\bigr)

    This is :func:`fastdiv.topk_reverse_kl_div` of ``F.linear(input, linear_weight, linear_bias)``,
    which says what each ``missing`` does.  The backward computes the logits a second time, which
    makes four matrix products in all.

    Args:
        input: Hidden states :math:`h`, shape ``(..., H)``; float32, bfloat16, float16 or float64.
        linear_weight: Weight :math:`W` of the layer, shape ``(C, H)``, in the dtype of ``input``.
        values: The teacher at the :math:`k` classes, shape ``(..., k)``, in any floating dtype.
            They get a gradient if they require one.
        indices: The :math:`k` classes (int64, int32, int16, uint8), of the shape of ``values``; in
            any order, but each at most once per row.  -1 is padding: no class, whatever its value.
            On a CPU the logits of a row that is all padding are not computed.
        values_type: What ``values`` holds: ``"logits"`` (:math:`p` is their softmax at the same
            temperature), ``"log_probs"`` or ``"probs"`` (which are used as they are).
        missing: ``"ignore"``, ``"renormalize"`` or ``"tail"``.
        linear_bias: Bias :math:`b` of the layer, shape ``(C,)``.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``) or ``"batchmean"`` (sum / ``input.size(0)``).
        temperature: :math:`T`, which divides the logits, and ``values`` if they are logits.  A
            tensor holds one number, or one for each row, and gets a gradient if it requires one.
        token_weight: Weights of the rows, shape ``(...)``.  They multiply the loss and, in a mean,
            the denominator.  Rows of weight 0 do not count, whatever they hold.  On a CPU their
            logits are not computed.
        class_mask: True for the classes that take part: bool, broadcastable to ``(..., C)``, or of
            shape ``(C,)``.  The others are as if at :math:`-\infty`.  Or its bits: uint8 of shape
            ``(..., ceil(C / 8))``, where class :math:`c` is bit ``c % 8`` of byte ``c // 8``.
        logits_dtype: ``torch.float32`` keeps logits of layers in half precision as the float32 sums
            that they are.  Their gradient is rounded only for the products that follow.  None
            rounds logits to the dtype of the layer, where the device multiplies in it.
        chunk_size: Rows whose logits are held at a time; by default 256, or as many as take a tenth
            of the memory of all logits if those are more.

    Returns:
        The divergence in nats, float32 (float64 for float64 input).

    Raises:
        TypeError: A tensor has an unsupported dtype or layout, the tensors of a layer differ in
            dtype, or an option is not a number.
        ValueError: Shapes do not match, an option is out of range, or a weight requires a gradient.
            A class is twice in a row (on a CPU; elsewhere the row is NaN).
        IndexError: An index is not in ``[-1, C)`` (on a CPU; elsewhere its row is NaN).
        RuntimeError: Tensors are on different devices.

    Example:
        >>> import torch, fastdiv
        >>> h, w = torch.zeros(1, 2), torch.ones(4, 2)
        >>> p, classes = torch.tensor([[0.5, 0.3]]), torch.tensor([[2, 0]])
        >>> fastdiv.linear_topk_reverse_kl_div(
        ...     h, w, p, classes, values_type="probs", missing="tail"
        ... )
        tensor(0.2393)

    Source: :func:`fastdiv.topk_reverse_kl_div`.
    """
    loss = make_loss(
        "linear_topk_reverse_kl_div",
        "reverse_kl_div",
        values_type=values_type,
        missing=missing,
        reduction=reduction,
    )
    return _of_layer(
        loss,
        (input, linear_weight, linear_bias),
        values,
        indices,
        temperature=temperature,
        token_weight=token_weight,
        class_mask=class_mask,
        logits_dtype=logits_dtype,
        chunk_size=chunk_size,
    )
