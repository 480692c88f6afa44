"""The entropy of rows of logits, and the log-probability of their tokens."""

from __future__ import annotations

from torch import Tensor

from .._engine import arguments
from .._engine.autograd import row_loss
from .._engine.dtensor import dispatch_dtensor
from .._engine.remember import remember_checks
from ..reference import Spec
from ..reference.choices import Reduction


@remember_checks
@dispatch_dtensor
def entropy(
    input: Tensor,
    *,
    dim: int = -1,
    temperature: float = 1.0,
    base: float | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Compute the Shannon entropy of the distribution of logits.

    .. math:: H(q) = -\sum_c q_c \log q_c, \qquad q = \mathrm{softmax}(x / T)

    It is differentiable.  A class at :math:`-\infty` adds nothing.

    Args:
        input: Logits of any shape and strides, with the :math:`C` classes on ``dim``; float32,
            bfloat16, float16 or float64.
        dim: Dimension of the classes.
        temperature: :math:`T`, which divides the logits.
        base: Base of the logarithm: None for nats, 2 for bits.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` or ``"batchmean"`` (sum /
            ``input.size(0)``).

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
    spec = Spec(
        "entropy", reduction=reduction, batch=input.shape[0], scale=arguments.scale_of(temperature)
    )
    value = row_loss(spec, arguments.as_rows(input, dim))
    if base is not None:
        value = (value / unit).to(value.dtype)
    return arguments.as_input(value, input, dim) if reduction == "none" else value


@dispatch_dtensor
def log_prob(input: Tensor, index: Tensor, *, dim: int = -1, temperature: float = 1.0) -> Tensor:
    r"""Compute the log-probability of one class per row, in nats.

    .. math:: \log q_y = x_y / T - \log \sum_c e^{x_c / T}

    Args:
        input: Logits of any shape and strides, with the :math:`C` classes on ``dim``; float32,
            bfloat16, float16 or float64.
        index: Class indices (int64, int32, uint8) of the shape of ``input`` without ``dim``.
        dim: Dimension of the classes.
        temperature: :math:`T`, which divides the logits.

    Returns:
        One value per row, float32 (float64 for float64 input); differentiable.

    Raises:
        TypeError: A tensor has an unsupported dtype or layout, or an option is not a number.
        ValueError: Shapes do not match, or an option is out of range or requires a gradient.
        IndexError: An index is not in ``[0, C)`` (on a CPU; elsewhere its row is NaN), or ``input``
            has no dimension ``dim``.
        RuntimeError: Tensors are on different devices.

    Example:
        >>> import torch, fastdiv
        >>> fastdiv.log_prob(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor([-1.3863, -1.3863])

    Source: ``torch.log_softmax(input, dim).gather(dim, index)``.
    """
    return -_of_index("cross_entropy", input, index, dim, temperature)


@dispatch_dtensor
def log_prob_and_entropy(
    input: Tensor, index: Tensor, *, dim: int = -1, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    r"""Compute the log-probability of one class per row, and the entropy of the row, in one pass.

    .. math:: \log q_y, \quad -\sum_c q_c \log q_c, \qquad q = \mathrm{softmax}(x / T)

    Policy-gradient fine-tuning needs both.

    Args:
        input: Logits of any shape and strides, with the :math:`C` classes on ``dim``; float32,
            bfloat16, float16 or float64.
        index: Class indices (int64, int32, uint8) of the shape of ``input`` without ``dim``.
        dim: Dimension of the classes.
        temperature: :math:`T`, which divides the logits.

    Returns:
        ``(log_prob, entropy)`` in nats, one value per row each, float32 (float64 for float64
        input); both differentiable.

    Raises:
        TypeError: A tensor has an unsupported dtype or layout, or an option is not a number.
        ValueError: Shapes do not match, or an option is out of range or requires a gradient.
        IndexError: An index is not in ``[0, C)`` (on a CPU; elsewhere its row is NaN), or ``input``
            has no dimension ``dim``.
        RuntimeError: Tensors are on different devices.

    Example:
        >>> import torch, fastdiv
        >>> fastdiv.log_prob_and_entropy(torch.zeros(1, 4), torch.tensor([2]))
        (tensor([-1.3863]), tensor([1.3863]))

    Source: :func:`fastdiv.log_prob` and :func:`fastdiv.entropy`.
    """
    both = _of_index("log_prob_and_entropy", input, index, dim, temperature)
    return both[0], both[1]  # not unbind: autograd forbids writing to one of its results in place


@remember_checks
def _of_index(loss: str, input: Tensor, index: Tensor, dim: int, temperature: float) -> Tensor:
    arguments.check_logits(input)
    dim = arguments.class_dim(input, dim)
    label = arguments.labels(input, dim, index, "index", arguments.NO_LABEL_IGNORED)
    spec = Spec(
        loss, ignore_index=arguments.NO_LABEL_IGNORED, scale=arguments.scale_of(temperature)
    )
    value = row_loss(spec, arguments.as_rows(input, dim), label=label)
    if input.dim() == 2:
        return value
    return value.reshape((*value.shape[:-1], *arguments.row_shape(input, dim)))
