"""The modules of Kullback-Leibler divergences, skewed and averaged."""

from __future__ import annotations

from torch import Tensor

from ..reference.choices import DivergenceReduction, TargetType
from .base import DivergenceModule


class KLDivLoss(DivergenceModule):
    """Kullback-Leibler divergence KL(p || q) from a target p, as a module.

    It calls :func:`fastdiv.kl_div`, which has the formula and lists the errors.

    Args:
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``.
            Probabilities are used as they are, normalised or not.
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
        >>> kl = fastdiv.nn.KLDivLoss(target_type="probs")
        >>> kl(torch.zeros(1, 3), torch.tensor([[9 / 25, 12 / 25, 4 / 25]]))
        tensor(0.0853)

    Source: :func:`fastdiv.kl_div`.
    """

    function = "kl_div"


class ReverseKLDivLoss(DivergenceModule):
    """Reverse Kullback-Leibler divergence KL(q || p) from a target p, as a module.

    It calls :func:`fastdiv.reverse_kl_div`, which has the formula and lists the errors.

    Args:
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``.
            Probabilities are used as they are, normalised or not.
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
        >>> kl = fastdiv.nn.ReverseKLDivLoss(target_type="probs")
        >>> kl(torch.zeros(1, 3), torch.tensor([[9 / 25, 12 / 25, 4 / 25]]))
        tensor(0.0975)

    Source: :func:`fastdiv.reverse_kl_div`.
    """

    function = "reverse_kl_div"


class JSDivLoss(DivergenceModule):
    r"""Generalised Jensen-Shannon divergence from a target, as a module.

    It calls :func:`fastdiv.js_div`, which has the formula and lists the errors.

    Args:
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``.
            Probabilities are used as they are, normalised or not.
        beta: :math:`\beta` in [0, 1], the share of the target in the mixture.
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
        >>> js = fastdiv.nn.JSDivLoss(target_type="logits", beta=0.5)
        >>> js(torch.tensor([[0.0, torch.inf * -1]]), torch.tensor([[-torch.inf, 0.0]]))  # ln 2
        tensor(0.6931)

    Source: :func:`fastdiv.js_div`.
    """

    function = "js_div"
    shown = (*DivergenceModule.shown, "beta")

    def __init__(
        self,
        *,
        target_type: TargetType,
        beta: float = 0.5,
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
        self.beta = beta


class SkewKLDivLoss(DivergenceModule):
    r"""Skewed Kullback-Leibler divergence from a target, as a module.

    It calls :func:`fastdiv.skew_kl_div`, which has the formula and lists the errors.

    Args:
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``.
            Probabilities are used as they are, normalised or not.
        skew: :math:`\lambda` in [0, 1], the share of the first distribution in the mixture.
        reverse: Compute the reversed divergence.
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
        >>> skew = fastdiv.nn.SkewKLDivLoss(target_type="probs", skew=0.5)
        >>> skew(torch.tensor([[0.0, -torch.inf]]), torch.tensor([[0.0, 1.0]]))  # ln 2
        tensor(0.6931)

    Source: :func:`fastdiv.skew_kl_div`.
    """

    function = "skew_kl_div"
    shown = (*DivergenceModule.shown, "skew", "reverse")

    def __init__(
        self,
        *,
        target_type: TargetType,
        skew: float = 0.1,
        reverse: bool = False,
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
        self.skew = skew
        self.reverse = reverse
