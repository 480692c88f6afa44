"""The entropy of rows of logits, and the log-probability of their tokens."""

from __future__ import annotations

from torch import Tensor

from .._engine import arguments
from .._engine.autograd import row_loss
from .._engine.dtensor import dispatch_dtensor
from .._engine.masks import index_rows, mask_rows
from .._engine.remember import remember_checks
from ..reference import Spec
from ..reference.choices import Reduction
from ..reference.topk import PADDING


@remember_checks
@dispatch_dtensor
def entropy(
    input: Tensor,
    *,
    dim: int = -1,
    temperature: float | Tensor = 1.0,
    base: float | None = None,
    reduction: Reduction = "none",
    class_mask: Tensor | None = None,
) -> Tensor:
    r"""Compute the Shannon entropy of the distribution of logits.

    .. math:: H(q) = -\sum_c q_c \log q_c, \qquad q = \mathrm{softmax}(x / T)

    It is differentiable.  A class at :math:`-\infty` adds nothing.

    Args:
        input: Logits of any shape and strides, with the :math:`C` classes on ``dim``; float32,
            bfloat16, float16 or float64.
        dim: Dimension of the classes.
        temperature: :math:`T`, which divides the logits.  A tensor holds one number, or one for
            each row, and gets a gradient if it requires one.
        base: Base of the logarithm: None for nats, 2 for bits.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` or ``"batchmean"`` (sum /
            ``input.size(0)``).
        class_mask: True for the classes that take part: bool, broadcastable to ``input``, or of
            shape ``(C,)``.  The others are as if at :math:`-\infty`, without mass in a target.  Or
            its bits: uint8 of shape ``(..., ceil(C / 8))`` for classes on the last dimension, where
            class :math:`c` is bit ``c % 8`` of byte ``c // 8``.

    Returns:
        The entropy, float32 (float64 for float64 input).

    Raises:
        TypeError: A tensor has an unsupported dtype or layout, or an option is not a number.
        ValueError: There are no classes along ``dim``, or an option is out of range or requires a
            gradient.
        IndexError: ``input`` has no dimension ``dim``.

    Example:
        >>> import torch, fastdiv
        >>> fastdiv.entropy(torch.zeros(8), base=2)
        tensor(3.)

    Source: Shannon, *A Mathematical Theory of Communication* (1948).
    """
    arguments.check_logits(input)
    dim = arguments.class_dim(input, dim)
    arguments.check_reduction(reduction)
    unit = arguments.log_of_base(base)
    number, scale = arguments.scales(input, dim, temperature)
    mask = mask_rows(input, dim, class_mask)
    spec = Spec("entropy", reduction=reduction, batch=input.shape[0], scale=number)
    value = row_loss(spec, arguments.as_rows(input, dim), scale=scale, mask=mask)
    if base is not None:
        value = (value / unit).to(value.dtype)
    return arguments.as_input(value, input, dim) if reduction == "none" else value


@dispatch_dtensor
def log_prob(
    input: Tensor,
    index: Tensor,
    *,
    dim: int = -1,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    class_mask: Tensor | None = None,
) -> Tensor:
    r"""Compute the log-probability of one class or of k classes per row, in nats.

    .. math:: \log q_y = x_y / T - \log \sum_c e^{x_c / T}

    The gradients of all k classes of a row are added up, also where a class is there twice.  An
    index of -1 is padding: its value is 0, without a gradient.  A row of padding alone does not
    count, whatever it holds.  A class that is masked out has the log-probability :math:`-\infty`.

    Args:
        input: Logits of any shape and strides, with the :math:`C` classes on ``dim``; float32,
            bfloat16, float16 or float64.
        index: Class indices (int64, int32, int16, uint8) or -1 for padding, of the shape of
            ``input`` without ``dim``; or k in each row, which are on a last dimension more.
        dim: Dimension of the classes.
        temperature: :math:`T`, which divides the logits.  A tensor holds one number, or one for
            each row, and gets a gradient if it requires one.
        softcap: Replace the logits by ``softcap * tanh(x / softcap)`` first; None for no cap.
        class_mask: True for the classes that take part: bool, broadcastable to ``input``, or of
            shape ``(C,)``.  The others are as if at :math:`-\infty`, without mass in a target.  Or
            its bits: uint8 of shape ``(..., ceil(C / 8))`` for classes on the last dimension, where
            class :math:`c` is bit ``c % 8`` of byte ``c // 8``.

    Returns:
        Values of the shape of ``index``, float32 (float64 for float64 input); differentiable.

    Raises:
        TypeError: A tensor has an unsupported dtype or layout, or an option is not a number.
        ValueError: Shapes do not match, or an option is out of range.
        IndexError: An index is not in ``[-1, C)`` (on a CPU; elsewhere its row is NaN), or
            ``input`` has no dimension ``dim``.
        RuntimeError: Tensors are on different devices.

    Example:
        >>> import torch, fastdiv
        >>> x = torch.zeros(2, 4)
        >>> fastdiv.log_prob(x, torch.tensor([0, -1]))
        tensor([-1.3863,  0.0000])
        >>> fastdiv.log_prob(x, torch.tensor([[0, 3], [1, -1]]))
        tensor([[-1.3863, -1.3863],
                [-1.3863,  0.0000]])

    Source: ``torch.log_softmax(input, dim).gather(dim, index)``.
    """
    options = (dim, temperature, softcap, class_mask)
    if isinstance(input, Tensor) and isinstance(index, Tensor) and index.dim() < input.dim():
        return _of_classes(input, index.unsqueeze(-1), False, *options).squeeze(-1)
    return _of_classes(input, index, True, *options)


@remember_checks
def _of_classes(
    input: Tensor,
    index: Tensor,
    several: bool,
    dim: int,
    temperature: float | Tensor,
    softcap: float | None,
    class_mask: Tensor | None,
) -> Tensor:
    arguments.check_logits(input)
    dim = arguments.class_dim(input, dim)
    label = index_rows(input, dim, index, several)
    mask = mask_rows(input, dim, class_mask)
    number, scale = arguments.scales(input, dim, temperature)
    spec = Spec("log_prob", scale=number, softcap=arguments.cap_of(softcap))
    value = row_loss(spec, arguments.as_rows(input, dim), label=label, scale=scale, mask=mask)
    return value if input.dim() == 2 else value.reshape(index.shape)


@dispatch_dtensor
def log_prob_and_entropy(
    input: Tensor,
    index: Tensor,
    *,
    dim: int = -1,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    class_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Compute the log-probability of one class per row, and the entropy of the row, in one pass.

    .. math:: \log q_y, \quad -\sum_c q_c \log q_c, \qquad q = \mathrm{softmax}(x / T)

    Policy-gradient fine-tuning needs both.  An index of -1 is padding: both values of the row are
    0, without a gradient, whatever it holds.

    Args:
        input: Logits of any shape and strides, with the :math:`C` classes on ``dim``; float32,
            bfloat16, float16 or float64.
        index: Class indices (int64, int32, uint8) or -1 for padding, of the shape of ``input``
            without ``dim``.
        dim: Dimension of the classes.
        temperature: :math:`T`, which divides the logits.  A tensor holds one number, or one for
            each row, and gets a gradient if it requires one.
        softcap: Replace the logits by ``softcap * tanh(x / softcap)`` first; None for no cap.
        class_mask: True for the classes that take part: bool, broadcastable to ``input``, or of
            shape ``(C,)``.  The others are as if at :math:`-\infty`, without mass in a target.  Or
            its bits: uint8 of shape ``(..., ceil(C / 8))`` for classes on the last dimension, where
            class :math:`c` is bit ``c % 8`` of byte ``c // 8``.

    Returns:
        ``(log_prob, entropy)`` in nats, one value per row each, float32 (float64 for float64
        input); both differentiable.

    Raises:
        TypeError: A tensor has an unsupported dtype or layout, or an option is not a number.
        ValueError: Shapes do not match, or an option is out of range.
        IndexError: An index is not in ``[-1, C)`` (on a CPU; elsewhere its row is NaN), or
            ``input`` has no dimension ``dim``.
        RuntimeError: Tensors are on different devices.

    Example:
        >>> import torch, fastdiv
        >>> fastdiv.log_prob_and_entropy(torch.zeros(1, 4), torch.tensor([2]))
        (tensor([-1.3863]), tensor([1.3863]))

    Source: :func:`fastdiv.log_prob` and :func:`fastdiv.entropy`.
    """
    both = _of_index(input, index, dim, temperature, softcap, class_mask)
    return both[0], both[1]  # not unbind: autograd forbids writing to one of its results in place


@remember_checks
def _of_index(
    input: Tensor,
    index: Tensor,
    dim: int,
    temperature: float | Tensor,
    softcap: float | None,
    class_mask: Tensor | None,
) -> Tensor:
    arguments.check_logits(input)
    dim = arguments.class_dim(input, dim)
    label = arguments.labels(input, dim, index, "index", PADDING)
    mask = mask_rows(input, dim, class_mask)
    number, scale = arguments.scales(input, dim, temperature)
    cap = arguments.cap_of(softcap)
    spec = Spec("log_prob_and_entropy", ignore_index=PADDING, scale=number, softcap=cap)
    value = row_loss(spec, arguments.as_rows(input, dim), label=label, scale=scale, mask=mask)
    if input.dim() == 2:
        return value
    return value.reshape((2, *arguments.row_shape(input, dim)))
