r"""Alpha and Rényi divergences, two functions of :math:`\sum_c p_c^\alpha q_c^{1 - \alpha}`.

:math:`q` is the input's distribution and :math:`p` the target's.  Where a class has mass of one of
them only, its power may be infinite: for :math:`\alpha > 1` with teacher mass only, for
:math:`\alpha < 0` with student mass only.  The value is then :math:`+\infty`, and the gradient is
that of the formula with the other powers.

For probabilities that do not add up to 1 the formulas are taken literally.  So the gradient for
(log-)probabilities has a part along :math:`p` itself, which grows without bound as
:math:`\alpha \to 1`.  The gradient for logits has no such part.
"""

from __future__ import annotations

from torch import Tensor

from .._engine import arguments
from .._engine.dtensor import dispatch_dtensor
from .._engine.remember import remember_checks
from ..reference.choices import DivergenceReduction, Reduction, TargetType
from .divergence import divergence_of_rows


@remember_checks
@dispatch_dtensor
def alpha_div(
    input: Tensor,
    target: Tensor,
    *,
    target_type: TargetType,
    alpha: float,
    dim: int = -1,
    reduction: DivergenceReduction = "batchmean",
    temperature: float | Tensor = 1.0,
    token_weight: Tensor | None = None,
    class_mask: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    r"""Compute the alpha divergence of the input's distribution from the target's.

    .. math::
        D_\alpha = \frac{\sum_c p_c^\alpha q_c^{1 - \alpha} - 1}{\alpha (\alpha - 1)}

    It joins the two Kullback-Leibler divergences, its limits: ``alpha=1`` is :func:`kl_div` and
    ``alpha=0`` :func:`reverse_kl_div`.  ``alpha=0.5`` is 4 times :func:`hellinger_distance`,
    ``alpha=2`` half of Pearson's :math:`\chi^2`, ``alpha=-1`` half of Neyman's.  The larger
    ``alpha``, the more the student must cover every class that the teacher finds likely.

    The value is at least 0.  For :math:`0 < \alpha < 1` it is at most
    :math:`1 / (\alpha (1 - \alpha))`, where the two share no class.  Otherwise it may be
    :math:`+\infty`, with a finite gradient: for :math:`\alpha > 1` where a class has teacher mass
    only, for :math:`\alpha < 0` where it has student mass only.  For probabilities that do not add
    up to 1 the formula is taken literally.  ``reduction="pointwise"`` gives
    :math:`(p_c^\alpha q_c^{1 - \alpha} - q_c) / (\alpha (\alpha - 1))`.

    Args:
        input: Logits of any shape and strides, with the :math:`C` classes on ``dim``; float32,
            bfloat16, float16 or float64.
        target: The teacher's rows, of the shape of ``input`` and any of its dtypes.  It gets a
            gradient if it requires one.
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``.
            Probabilities are used as they are, normalised or not.
        alpha: :math:`\alpha`, any finite number.
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
        The divergence, float32 (float64 if input or target is).

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
        >>> fastdiv.alpha_div(x, t, target_type="logits", alpha=0.5)
        tensor(0.0388)
        >>> fastdiv.alpha_div(x, t, target_type="logits", alpha=2)
        tensor(0.0402)

    Source: Amari, *Differential-Geometrical Methods in Statistics* (1985); Cichocki and Amari,
    *Families of Alpha- Beta- and Gamma-Divergences* (2010).
    """
    alpha = arguments.check_finite(alpha, "alpha")
    loss = "reverse_kl_div" if alpha == 0 else "kl_div" if alpha == 1 else "alpha_div"
    return divergence_of_rows(
        loss,
        input,
        target,
        target_type=target_type,
        dim=dim,
        reduction=reduction,
        temperature=temperature,
        token_weight=token_weight,
        class_mask=class_mask,
        inplace_backward=inplace_backward,
        param=alpha,
    )


@remember_checks
@dispatch_dtensor
def renyi_div(
    input: Tensor,
    target: Tensor,
    *,
    target_type: TargetType,
    alpha: float,
    dim: int = -1,
    reduction: Reduction = "batchmean",
    temperature: float | Tensor = 1.0,
    token_weight: Tensor | None = None,
    class_mask: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    r"""Compute the Rényi divergence of the target's distribution from the input's.

    .. math::
        R_\alpha(p \,\|\, q) = \frac{1}{\alpha - 1} \log \sum_c p_c^\alpha q_c^{1 - \alpha}

    It is at least 0 and grows with :math:`\alpha`: from 0 at :math:`\alpha \to 0` (where both have
    the same classes) to the largest :math:`\log(p_c / q_c)`.  At 0.5 it is :math:`-2 \log(1 - H^2)`
    with :func:`hellinger_distance`; at 1 it is :func:`kl_div`, its limit.

    The sum is computed in logarithms, so nothing overflows.  If the two share no class, the value
    is :math:`+\infty` and the gradient 0.  If :math:`\alpha > 1` and a class has teacher mass only,
    the value is :math:`+\infty` and the gradient finite.  The value is not a sum over the
    classes, so there is no ``reduction="pointwise"``.

    Args:
        input: Logits of any shape and strides, with the :math:`C` classes on ``dim``; float32,
            bfloat16, float16 or float64.
        target: The teacher's rows, of the shape of ``input`` and any of its dtypes.  It gets a
            gradient if it requires one.
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``.
            Probabilities are used as they are, normalised or not.
        alpha: :math:`\alpha`, positive and finite.
        dim: Dimension of the classes.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``) or ``"batchmean"`` (sum / ``input.size(0)``).
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
        The divergence in nats, float32 (float64 if input or target is).

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
        >>> fastdiv.renyi_div(x, t, target_type="logits", alpha=0.5)
        tensor(0.0195)
        >>> fastdiv.renyi_div(x, t, target_type="logits", alpha=2)
        tensor(0.0773)

    Source: Rényi, *On Measures of Entropy and Information* (1961); van Erven and Harremoës, *Rényi
    Divergence and Kullback-Leibler Divergence* (2014).
    """
    alpha = arguments.check_positive(alpha, "alpha")
    if str(reduction) == "pointwise":
        raise ValueError(
            "reduction must not be 'pointwise': renyi_div is not a sum over the classes"
        )
    arguments.check_reduction(reduction)
    loss = "kl_div" if alpha == 1 else "renyi_div"
    return divergence_of_rows(
        loss,
        input,
        target,
        target_type=target_type,
        dim=dim,
        reduction=reduction,
        temperature=temperature,
        token_weight=token_weight,
        class_mask=class_mask,
        inplace_backward=inplace_backward,
        param=alpha,
    )
