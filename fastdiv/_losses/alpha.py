r"""Alpha and Rényi divergences, two functions of :math:`\sum_c p_c^\alpha q_c^{1 - \alpha}`.

:math:`p` and :math:`q` are those of :mod:`fastdiv.divergence`.  Where one of them has a class to
itself, its power may be infinite: for :math:`\alpha > 1` where that is the teacher, for
:math:`\alpha < 0` where it is the student.  The value is then :math:`+\infty`, and the gradient
that of the formula with the other powers.

Of probabilities that do not add up to 1 the formulas are taken literally.  So the gradient for
(log-)probabilities has a part along :math:`p` itself, which grows without bound as
:math:`\alpha \to 1`; logits do not see it.
"""

from __future__ import annotations

from torch import Tensor

from .._engine import arguments
from .._engine.dtensor import takes_dtensors
from ..reference.choices import DivergenceReduction, Reduction, TargetType
from .divergence import of_rows


@takes_dtensors
def alpha_div(
    input: Tensor,
    target: Tensor,
    *,
    target_type: TargetType,
    alpha: float,
    dim: int = -1,
    reduction: DivergenceReduction = "batchmean",
    temperature: float = 1.0,
    token_weight: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    r"""Alpha divergence of the input's distribution from the target's.

    .. math::
        D_\alpha = \frac{\sum_c p_c^\alpha q_c^{1 - \alpha} - 1}{\alpha (\alpha - 1)}

    It joins the two Kullback-Leibler divergences: ``alpha=1`` is :func:`kl_div` and ``alpha=0``
    :func:`reverse_kl_div`, its limits there.  ``alpha=0.5`` is 4 times :func:`hellinger_distance`,
    ``alpha=2`` half of Pearson's :math:`\chi^2`, ``alpha=-1`` half of Neyman's.  Large ``alpha``
    insists on covering all that the teacher holds likely.

    It is at least 0, and for :math:`0 < \alpha < 1` at most :math:`1 / (\alpha (1 - \alpha))`, of
    distributions that share no class.  Otherwise it may be :math:`+\infty`, with a finite gradient:
    for :math:`\alpha > 1` where the teacher has a class to itself, for :math:`\alpha < 0` where the
    student has.  Of probabilities that do not add up to 1 the formula is taken literally.
    ``reduction="pointwise"`` gives
    :math:`(p_c^\alpha q_c^{1 - \alpha} - q_c) / (\alpha (\alpha - 1))`.

    :math:`\alpha` is any finite number; all other arguments, result and errors are those of
    :func:`kl_div`.

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
    how = (target_type, dim, reduction, temperature, token_weight, inplace_backward)
    return of_rows(loss, input, target, *how, shape=alpha)


@takes_dtensors
def renyi_div(
    input: Tensor,
    target: Tensor,
    *,
    target_type: TargetType,
    alpha: float,
    dim: int = -1,
    reduction: Reduction = "batchmean",
    temperature: float = 1.0,
    token_weight: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    r"""Rényi divergence of the target's distribution from the input's.

    .. math::
        R_\alpha(p \,\|\, q) = \frac{1}{\alpha - 1} \log \sum_c p_c^\alpha q_c^{1 - \alpha}

    It is at least 0 and grows with :math:`\alpha`: from 0 at :math:`\alpha \to 0` (where both have
    the same classes) over :math:`-2 \log(1 - H^2)` at 0.5, with :func:`hellinger_distance`, and
    :func:`kl_div` at 1, its limit there, towards the largest :math:`\log(p_c / q_c)`.  The sum is
    taken by its logarithm, so that nothing overflows.  Distributions that share no class, and for
    :math:`\alpha > 1` teacher mass where the student has none, give :math:`+\infty` with a finite
    gradient, 0 where nothing is shared.

    :math:`\alpha` is positive and finite; the value is no sum over the classes, so there is no
    ``reduction="pointwise"``.  All other arguments, result and errors are those of :func:`kl_div`.

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
        raise ValueError("reduction must not be 'pointwise': renyi_div is no sum over the classes")
    arguments.check_reduction(reduction)
    loss = "kl_div" if alpha == 1 else "renyi_div"
    how = (target_type, dim, reduction, temperature, token_weight, inplace_backward)
    return of_rows(loss, input, target, *how, shape=alpha)
