"""Bounded, symmetric distances between the input's distribution and the target's."""

from __future__ import annotations

from torch import Tensor

from .._engine.dtensor import dispatch_dtensor
from .._engine.remember import remember_checks
from ..reference.choices import DivergenceReduction, TargetType
from .divergence import divergence_of_rows


@remember_checks
@dispatch_dtensor
def tv_distance(
    input: Tensor,
    target: Tensor,
    *,
    target_type: TargetType,
    dim: int = -1,
    reduction: DivergenceReduction = "batchmean",
    temperature: float | Tensor = 1.0,
    token_weight: Tensor | None = None,
    class_mask: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    r"""Compute the total variation distance of input and target.

    .. math:: \mathrm{TV}(p, q) = \tfrac12 \sum_c |p_c - q_c|

    It is symmetric and in [0, 1]: the largest difference between the probabilities that the two
    give to any set of classes.  It is 1 where they share no class.  A class with :math:`p_c = q_c`
    adds nothing to the gradient.

    Args:
        input: Logits of any shape and strides, with the :math:`C` classes on ``dim``; float32,
            bfloat16, float16 or float64.
        target: The teacher's rows, of the shape of ``input`` and any of its dtypes.  It gets a
            gradient if it requires one.
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``.
            Probabilities are used as they are, normalised or not.
        dim: Dimension of the classes.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``), ``"batchmean"`` (sum / ``input.size(0)``) or
            ``"pointwise"`` (every term, of the shape of ``input``, as torch's ``"none"``).
        temperature: :math:`T`, which divides all logits, also those of the target.  The value is
            not multiplied by :math:`T^2`; the modules of :mod:`fastdiv.nn` have a flag for that.
            A tensor holds one number, or one for each row, and gets a gradient if it requires one.
        token_weight: Weights of the rows, of the shape of ``input`` without ``dim``.  They multiply
            the loss and, in a mean, the denominator.  Rows of weight 0 do not count, whatever they
            hold.
        class_mask: True for the classes that take part: bool, broadcastable to ``input``, or of
            shape ``(C,)``.  The others are as if at :math:`-\infty`, without mass in a target.  Or
            its bits: uint8 of shape ``(..., ceil(C / 8))`` for classes on the last dimension, where
            class :math:`c` is bit ``c % 8`` of byte ``c // 8``.
        inplace_backward: Write the gradient over the memory of the logits.  Autograd raises if
            another backward still needs them.  They must be neither a leaf of autograd's graph
            nor a view of one, and must not share memory with other arguments.  Under
            ``torch.compile`` a fresh gradient is used instead.

    Returns:
        The distance, float32 (float64 if input or target is).

    Raises:
        TypeError: A tensor has an unsupported dtype or layout, or an option is not a number.
        ValueError: Shapes do not match, an option is out of range, a weight or an option requires a
            gradient, or the logits may not be overwritten.
        IndexError: ``input`` has no dimension ``dim``.
        RuntimeError: Tensors are on different devices.

    Example:
        >>> import torch, fastdiv
        >>> x = torch.tensor([[-0.1, 0.2, -0.4, 0.3]])
        >>> t = torch.tensor([[-0.7, 0.1, -0.1, 0.1]])
        >>> fastdiv.tv_distance(x, t, target_type="logits")
        tensor(0.1003)

    Source: Levin and Peres, *Markov Chains and Mixing Times* (2017), chapter 4; as a distillation
    loss: Wen et al., *f-Divergence Minimization for Sequence-Level Knowledge Distillation* (2023).
    """
    return divergence_of_rows(
        "tv_distance",
        input,
        target,
        target_type=target_type,
        dim=dim,
        reduction=reduction,
        temperature=temperature,
        token_weight=token_weight,
        class_mask=class_mask,
        inplace_backward=inplace_backward,
    )


@remember_checks
@dispatch_dtensor
def hellinger_distance(
    input: Tensor,
    target: Tensor,
    *,
    target_type: TargetType,
    dim: int = -1,
    reduction: DivergenceReduction = "batchmean",
    temperature: float | Tensor = 1.0,
    token_weight: Tensor | None = None,
    class_mask: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    r"""Compute the squared Hellinger distance of input and target.

    .. math::
        H^2(p, q) = \tfrac12 \sum_c \bigl(\sqrt{p_c} - \sqrt{q_c}\bigr)^2

    It is symmetric and in [0, 1].  For probabilities it is :math:`1 - \sum_c \sqrt{p_c q_c}`, one
    minus the Bhattacharyya coefficient, and 1 where they share no class.  Its root is a metric.  It
    bounds the total variation: :math:`H^2 \le \mathrm{TV} \le H \sqrt{2 - H^2}`.

    Args:
        input: Logits of any shape and strides, with the :math:`C` classes on ``dim``; float32,
            bfloat16, float16 or float64.
        target: The teacher's rows, of the shape of ``input`` and any of its dtypes.  It gets a
            gradient if it requires one.
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``.
            Probabilities are used as they are, normalised or not.
        dim: Dimension of the classes.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``), ``"batchmean"`` (sum / ``input.size(0)``) or
            ``"pointwise"`` (every term, of the shape of ``input``, as torch's ``"none"``).
        temperature: :math:`T`, which divides all logits, also those of the target.  The value is
            not multiplied by :math:`T^2`; the modules of :mod:`fastdiv.nn` have a flag for that.
            A tensor holds one number, or one for each row, and gets a gradient if it requires one.
        token_weight: Weights of the rows, of the shape of ``input`` without ``dim``.  They multiply
            the loss and, in a mean, the denominator.  Rows of weight 0 do not count, whatever they
            hold.
        class_mask: True for the classes that take part: bool, broadcastable to ``input``, or of
            shape ``(C,)``.  The others are as if at :math:`-\infty`, without mass in a target.  Or
            its bits: uint8 of shape ``(..., ceil(C / 8))`` for classes on the last dimension, where
            class :math:`c` is bit ``c % 8`` of byte ``c // 8``.
        inplace_backward: Write the gradient over the memory of the logits.  Autograd raises if
            another backward still needs them.  They must be neither a leaf of autograd's graph
            nor a view of one, and must not share memory with other arguments.  Under
            ``torch.compile`` a fresh gradient is used instead.

    Returns:
        The distance, float32 (float64 if input or target is).

    Raises:
        TypeError: A tensor has an unsupported dtype or layout, or an option is not a number.
        ValueError: Shapes do not match, an option is out of range, a weight or an option requires a
            gradient, or the logits may not be overwritten.
        IndexError: ``input`` has no dimension ``dim``.
        RuntimeError: Tensors are on different devices.

    Example:
        >>> import torch, fastdiv
        >>> x = torch.tensor([[-0.1, 0.2, -0.4, 0.3]])
        >>> t = torch.tensor([[-0.7, 0.1, -0.1, 0.1]])
        >>> fastdiv.hellinger_distance(x, t, target_type="logits")
        tensor(0.0097)

    Source: Hellinger, *Neue Begründung der Theorie quadratischer Formen von unendlichvielen
    Veränderlichen* (1909); Le Cam and Yang, *Asymptotics in Statistics* (2000).
    """
    return divergence_of_rows(
        "hellinger_distance",
        input,
        target,
        target_type=target_type,
        dim=dim,
        reduction=reduction,
        temperature=temperature,
        token_weight=token_weight,
        class_mask=class_mask,
        inplace_backward=inplace_backward,
    )
