"""Bounded, symmetric distances between the input's distribution and the target's."""

from __future__ import annotations

from torch import Tensor

from .._engine.dtensor import takes_dtensors
from ..reference.choices import DivergenceReduction, TargetType
from .divergence import of_rows


@takes_dtensors
def tv_distance(
    input: Tensor,
    target: Tensor,
    *,
    target_type: TargetType,
    dim: int = -1,
    reduction: DivergenceReduction = "batchmean",
    temperature: float = 1.0,
    token_weight: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    r"""Total variation distance.

    .. math:: \mathrm{TV}(p, q) = \tfrac12 \sum_c |p_c - q_c|

    It is in [0, 1], and symmetric: the largest difference between the probabilities that the two
    give to any set of classes; 1 where they share no class.  A class with :math:`p_c = q_c` adds
    nothing to the gradient.

    Arguments, result and errors are those of :func:`kl_div`.

    Example:
        >>> import torch, fastdiv
        >>> x = torch.tensor([[-0.1, 0.2, -0.4, 0.3]])
        >>> t = torch.tensor([[-0.7, 0.1, -0.1, 0.1]])
        >>> fastdiv.tv_distance(x, t, target_type="logits")
        tensor(0.1003)

    Source: Levin and Peres, *Markov Chains and Mixing Times* (2017), chapter 4; as a distillation
    loss: Wen et al., *f-Divergence Minimization for Sequence-Level Knowledge Distillation* (2023).
    """
    how = (target_type, dim, reduction, temperature, token_weight, inplace_backward)
    return of_rows("tv_distance", input, target, *how)


@takes_dtensors
def hellinger_distance(
    input: Tensor,
    target: Tensor,
    *,
    target_type: TargetType,
    dim: int = -1,
    reduction: DivergenceReduction = "batchmean",
    temperature: float = 1.0,
    token_weight: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    r"""Squared Hellinger distance.

    .. math::
        H^2(p, q) = \tfrac12 \sum_c \bigl(\sqrt{p_c} - \sqrt{q_c}\bigr)^2

    It is in [0, 1], and symmetric; for probabilities it is :math:`1 - \sum_c \sqrt{p_c q_c}`, one
    less the Bhattacharyya coefficient, and 1 where they share no class.  Its root is a metric.  It
    bounds the total variation: :math:`H^2 \le \mathrm{TV} \le H \sqrt{2 - H^2}`.

    Arguments, result and errors are those of :func:`kl_div`.

    Example:
        >>> import torch, fastdiv
        >>> x = torch.tensor([[-0.1, 0.2, -0.4, 0.3]])
        >>> t = torch.tensor([[-0.7, 0.1, -0.1, 0.1]])
        >>> fastdiv.hellinger_distance(x, t, target_type="logits")
        tensor(0.0097)

    Source: Hellinger, *Neue Begründung der Theorie quadratischer Formen von unendlichvielen
    Veränderlichen* (1909); Le Cam and Yang, *Asymptotics in Statistics* (2000).
    """
    how = (target_type, dim, reduction, temperature, token_weight, inplace_backward)
    return of_rows("hellinger_distance", input, target, *how)
