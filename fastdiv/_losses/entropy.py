"""Entropy of a row of logits, and log-probability of its tokens."""

from __future__ import annotations

from torch import Tensor

from .._engine import arguments
from .._engine.autograd import row_loss
from .._engine.dtensor import takes_dtensors
from ..reference import Spec
from ..reference.choices import Reduction


@takes_dtensors
def entropy(
    input: Tensor,
    *,
    dim: int = -1,
    temperature: float = 1.0,
    base: float | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Shannon entropy of the distribution of logits, with gradient.

    .. math:: H(q) = -\sum_c q_c \log q_c, \qquad q = \mathrm{softmax}(x / T)

    Args:
        input: Logits :math:`x` of any shape with the classes on ``dim``; float32, bfloat16, float16
            or float64.
        dim: Dimension of the classes.
        temperature: :math:`T`.
        base: Base of the logarithm: nats by default, bits for ``base=2``.
        reduction: ``"none"`` (one value a row), ``"sum"``, ``"mean"`` or ``"batchmean"``.

    Returns:
        The entropy, float32 (float64 for float64 input).  A class at :math:`-\infty` adds nothing.

    Raises:
        TypeError: a dtype that is not one of the above; a sparse, nested or quantized tensor; an
            option that is no number.
        ValueError: no classes along ``dim``, an option out of its range, or that requires a
            gradient.
        IndexError: a dimension that ``input`` does not have.

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


@takes_dtensors
def log_prob(input: Tensor, index: Tensor, *, dim: int = -1, temperature: float = 1.0) -> Tensor:
    r"""Log-probability of one class a row, :math:`x_y / T - \log \sum_c e^{x_c / T}`, in nats.

    Args:
        input: Logits of any shape with the classes on ``dim``; float32, bfloat16, float16 or
            float64.
        index: Class indices (int64, int32, uint8) of the shape of ``input`` without ``dim``.
        dim: Dimension of the classes.
        temperature: :math:`T`.

    Returns:
        One value a row, float32 (float64 for float64 input); differentiable.

    Raises:
        TypeError: a dtype that is not one of the above; a sparse, nested or quantized tensor; a
            temperature that is no number.
        ValueError: shapes that do not fit, an option out of its range, or that requires a gradient.
        IndexError: an index outside ``[0, C)`` (on CPU; elsewhere the row is NaN), a dimension that
            ``input`` does not have.

    Example:
        >>> import torch, fastdiv
        >>> fastdiv.log_prob(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor([-1.3863, -1.3863])

    Source: ``torch.log_softmax(input, dim).gather(dim, index)``.
    """
    return -_of_index("cross_entropy", input, index, dim, temperature)


@takes_dtensors
def log_prob_and_entropy(
    input: Tensor, index: Tensor, *, dim: int = -1, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    r"""Log-probability of one class a row, and the entropy of the row, in one pass.

    What policy-gradient fine-tuning needs of a model's logits; both are differentiable.  Arguments
    and errors are those of :func:`log_prob`.

    Returns:
        ``(log_prob, entropy)`` in nats, one value a row each.

    Example:
        >>> import torch, fastdiv
        >>> fastdiv.log_prob_and_entropy(torch.zeros(1, 4), torch.tensor([2]))
        (tensor([-1.3863]), tensor([1.3863]))

    Source: :func:`log_prob` and :func:`entropy`.
    """
    both = _of_index("log_prob_and_entropy", input, index, dim, temperature)
    return both[0], both[1]  # not unbound, of which autograd lets nobody overwrite a part


def _of_index(loss: str, input: Tensor, index: Tensor, dim: int, temperature: float) -> Tensor:
    arguments.check_logits(input)
    dim = arguments.class_dim(input, dim)
    label = arguments.labels(input, dim, index, "index", arguments.NO_LABEL_IGNORED)
    spec = Spec(
        loss, ignore_index=arguments.NO_LABEL_IGNORED, scale=arguments.scale_of(temperature)
    )
    value = row_loss(spec, arguments.as_rows(input, dim), label=label)
    return value.reshape((*value.shape[:-1], *arguments.row_shape(input, dim)))
