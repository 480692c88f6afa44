"""Log-probabilities of the logits of a linear layer, computed a tile at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from .._engine import arguments
from .._engine.dtensor import dispatch_dtensor
from .._engine.masks import index_rows, mask_rows
from ..reference import Spec
from ..reference.topk import PADDING
from .head import checked_head, loss_of_head


@dispatch_dtensor
def linear_log_prob(
    input: Tensor,
    linear_weight: Tensor,
    index: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    class_mask: Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Compute log-probabilities of classes from a linear layer, a tile at a time, in nats.

    .. math:: \log q_y = x_y / T - \log \sum_c e^{x_c / T}, \qquad x = h\,W^\top + b

    This is :func:`fastdiv.log_prob` of ``F.linear(input, linear_weight, linear_bias)``, of one
    class or of k classes per row.  DPO, KTO and GRPO without an entropy bonus need no more.  The
    backward computes the logits a second time, which makes four matrix products in all.

    Args:
        input: Hidden states :math:`h`, shape ``(..., H)``; float32, bfloat16, float16 or float64.
        linear_weight: Weight :math:`W` of the layer, shape ``(C, H)``, in the dtype of ``input``.
        index: Class indices (int64, int32, int16, uint8), shape ``(...)``, or k in each row, shape
            ``(..., k)``.  -1 is padding, whose value is 0 without a gradient.  On a CPU the logits
            of a row that is all padding are not computed.
        linear_bias: Bias :math:`b` of the layer, shape ``(C,)``.
        temperature: :math:`T`, which divides the logits.  A tensor holds one number, or one for
            each row, and gets a gradient if it requires one.
        softcap: Replace the logits by ``softcap * tanh(x / softcap)`` first; None for no cap.
        class_mask: True for the classes that take part: bool, broadcastable to ``(..., C)``, or of
            shape ``(C,)``.  The others are as if at :math:`-\infty`, without mass in a target.  Or
            its bits: uint8 of shape ``(..., ceil(C / 8))``, where class :math:`c` is bit ``c % 8``
            of byte ``c // 8``.
        logits_dtype: ``torch.float32`` keeps logits of layers in half precision as the float32 sums
            that they are.  Their gradient is rounded only for the products that follow.  None
            rounds logits to the dtype of the layer, where the device multiplies in it.
        chunk_size: Rows whose logits are held at a time; by default 256, or as many as take a tenth
            of the memory of all logits if those are more.

    Returns:
        Values of the shape of ``index``, float32 (float64 for float64 input); differentiable.

    Raises:
        TypeError: A tensor has an unsupported dtype or layout, the tensors of a layer differ in
            dtype, or an option is not a number.
        ValueError: Shapes do not match, or an option is out of range.
        IndexError: An index is not in ``[-1, C)`` (on a CPU; elsewhere its row is NaN).
        RuntimeError: Tensors are on different devices.

    Example:
        >>> import torch, fastdiv
        >>> h, w = torch.zeros(2, 2), torch.ones(4, 2)
        >>> fastdiv.linear_log_prob(h, w, torch.tensor([2, -1]))
        tensor([-1.3863,  0.0000])

    Source: :func:`fastdiv.log_prob`.
    """
    head = checked_head(input, linear_weight, linear_bias)
    logits = head.logits
    dim = logits.dim() - 1
    several = not (isinstance(index, Tensor) and index.dim() < logits.dim())
    label = index_rows(logits, dim, index if several else index.unsqueeze(-1), several)
    number, scale = arguments.scales(logits, dim, temperature)
    spec = Spec(
        "log_prob",
        scale=number,
        softcap=arguments.cap_of(softcap),
    )
    value, _ = loss_of_head(
        spec,
        head,
        label=label,
        scale=scale,
        mask=mask_rows(logits, dim, class_mask),
        chunk_size=chunk_size,
        logits_dtype=logits_dtype,
    )
    return value.reshape(index.shape)


@dispatch_dtensor
def linear_log_prob_and_entropy(
    input: Tensor,
    linear_weight: Tensor,
    index: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    class_mask: Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
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
        index: Class indices (int64, int32, uint8), shape ``(...)``.  -1 is padding: both values are
            0, without a gradient.  On a CPU the logits of such a row are not computed.
        linear_bias: Bias :math:`b` of the layer, shape ``(C,)``.
        temperature: :math:`T`, which divides the logits.  A tensor holds one number, or one for
            each row, and gets a gradient if it requires one.
        softcap: Replace the logits by ``softcap * tanh(x / softcap)`` first; None for no cap.
        class_mask: True for the classes that take part: bool, broadcastable to ``(..., C)``, or of
            shape ``(C,)``.  The others are as if at :math:`-\infty`, without mass in a target.  Or
            its bits: uint8 of shape ``(..., ceil(C / 8))``, where class :math:`c` is bit ``c % 8``
            of byte ``c // 8``.
        logits_dtype: ``torch.float32`` keeps logits of layers in half precision as the float32 sums
            that they are.  Their gradient is rounded only for the products that follow.  None
            rounds logits to the dtype of the layer, where the device multiplies in it.
        chunk_size: Rows whose logits are held at a time; by default 256, or as many as take a tenth
            of the memory of all logits if those are more.

    Returns:
        ``(log_prob, entropy)`` in nats, shape ``(...)`` each, float32 (float64 for float64 input);
        both differentiable.

    Raises:
        TypeError: A tensor has an unsupported dtype or layout, the tensors of a layer differ in
            dtype, or an option is not a number.
        ValueError: Shapes do not match, or an option is out of range.
        IndexError: An index is not in ``[-1, C)`` (on a CPU; elsewhere its row is NaN).
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
    dim = logits.dim() - 1
    label = arguments.labels(logits, dim, index, "index", PADDING)
    number, scale = arguments.scales(logits, dim, temperature)
    spec = Spec(
        "log_prob_and_entropy",
        ignore_index=PADDING,
        scale=number,
        softcap=arguments.cap_of(softcap),
    )
    value, _ = loss_of_head(
        spec,
        head,
        label=label,
        scale=scale,
        mask=mask_rows(logits, dim, class_mask),
        chunk_size=chunk_size,
        logits_dtype=logits_dtype,
    )
    return value[0], value[1]
