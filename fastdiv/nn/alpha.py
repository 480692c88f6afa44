"""The modules of the divergences of order alpha."""

from __future__ import annotations

from torch import Tensor

from ..reference.choices import DivergenceReduction, Reduction, TargetType
from .base import DivergenceModule


class AlphaDivLoss(DivergenceModule):
    r"""Alpha divergence from a target, as a module.

    It calls :func:`fastdiv.alpha_div`, which has the formula and lists the errors.

    Args:
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``.
            Probabilities are used as they are, normalised or not.
        alpha: :math:`\alpha`, any finite number.
        dim: Dimension of the classes.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``), ``"batchmean"`` (sum / ``input.size(0)``) or
            ``"pointwise"`` (every term, of the shape of ``input``, as torch's ``"none"``).
        temperature: :math:`T`, which divides all logits, also those of the target.  A tensor holds
            one number, or one for each row; it is learnt if it is a ``Parameter``.  With
            ``scale_by_temperature``, one for each row needs ``reduction="none"``.
        scale_by_temperature: Multiply the value by :math:`T^2`, which keeps the size of its
            gradient about the same for all temperatures (Hinton et al., 2015).
        inplace_backward: Write the gradient over the memory of the logits.  Autograd raises if
            another backward still needs them.  They must be neither a leaf of autograd's graph
            nor a view of one, and must not share memory with other arguments.  Under
            ``torch.compile`` a fresh gradient is used instead.

    Shape:
        * ``input``: logits of any shape and strides, with the :math:`C` classes on ``dim``;
          float32, bfloat16, float16 or float64.
        * ``target``: the teacher's rows, of the shape of ``input`` and any of its dtypes.
        * ``token_weight``: weights of the rows, of the shape of ``input`` without ``dim``;
          optional.
        * ``class_mask``: the classes that take part, as in the function; optional.
        * Result: a scalar, or with ``reduction="none"`` one value per row, of the shape of
          ``input`` without ``dim``, or with ``"pointwise"`` one per term, of the shape of
          ``input``.

    Example:
        >>> import torch, fastdiv
        >>> half_chi_squared = fastdiv.nn.AlphaDivLoss(target_type="probs", alpha=2)
        >>> half_chi_squared(torch.zeros(1, 2), torch.tensor([[0.9, 0.1]]))
        tensor(0.3200)

    Source: :func:`fastdiv.alpha_div`.
    """

    function = "alpha_div"
    shown = (*DivergenceModule.shown, "alpha")

    def __init__(
        self,
        *,
        target_type: TargetType,
        alpha: float,
        dim: int = -1,
        reduction: DivergenceReduction = "batchmean",
        temperature: float | Tensor = 1.0,
        scale_by_temperature: bool = False,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(
            target_type=target_type,
            dim=dim,
            reduction=reduction,
            temperature=temperature,
            scale_by_temperature=scale_by_temperature,
            inplace_backward=inplace_backward,
        )
        self.alpha = alpha


class RenyiDivLoss(DivergenceModule):
    r"""Rényi divergence from a target, as a module.

    It calls :func:`fastdiv.renyi_div`, which has the formula and lists the errors.

    Args:
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``.
            Probabilities are used as they are, normalised or not.
        alpha: :math:`\alpha`, positive and finite.
        dim: Dimension of the classes.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``) or ``"batchmean"`` (sum / ``input.size(0)``).
        temperature: :math:`T`, which divides all logits, also those of the target.  A tensor holds
            one number, or one for each row; it is learnt if it is a ``Parameter``.  With
            ``scale_by_temperature``, one for each row needs ``reduction="none"``.
        scale_by_temperature: Multiply the value by :math:`T^2`, which keeps the size of its
            gradient about the same for all temperatures (Hinton et al., 2015).
        inplace_backward: Write the gradient over the memory of the logits.  Autograd raises if
            another backward still needs them.  They must be neither a leaf of autograd's graph
            nor a view of one, and must not share memory with other arguments.  Under
            ``torch.compile`` a fresh gradient is used instead.

    Shape:
        * ``input``: logits of any shape and strides, with the :math:`C` classes on ``dim``;
          float32, bfloat16, float16 or float64.
        * ``target``: the teacher's rows, of the shape of ``input`` and any of its dtypes.
        * ``token_weight``: weights of the rows, of the shape of ``input`` without ``dim``;
          optional.
        * ``class_mask``: the classes that take part, as in the function; optional.
        * Result: a scalar, or with ``reduction="none"`` one value per row, of the shape of
          ``input`` without ``dim``.

    Example:
        >>> import torch, fastdiv
        >>> renyi = fastdiv.nn.RenyiDivLoss(target_type="probs", alpha=2)
        >>> renyi(torch.zeros(1, 2), torch.tensor([[0.9, 0.1]]))  # ln 1.64
        tensor(0.4947)

    Source: :func:`fastdiv.renyi_div`.
    """

    function = "renyi_div"
    shown = (*DivergenceModule.shown, "alpha")

    def __init__(
        self,
        *,
        target_type: TargetType,
        alpha: float,
        dim: int = -1,
        reduction: Reduction = "batchmean",
        temperature: float | Tensor = 1.0,
        scale_by_temperature: bool = False,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(
            target_type=target_type,
            dim=dim,
            reduction=reduction,
            temperature=temperature,
            scale_by_temperature=scale_by_temperature,
            inplace_backward=inplace_backward,
        )
        self.alpha = alpha
