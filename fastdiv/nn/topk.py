"""The modules of the divergences from a top-k teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from .._losses.topk import topk_js_div, topk_kl_div, topk_reverse_kl_div
from ..reference.choices import KLMissing, Missing, Reduction, TargetType
from .base import RowModule


class TopKModule(RowModule):
    """A divergence from a top-k teacher."""

    function: ClassVar[Callable[..., Tensor]]
    shown: ClassVar[tuple[str, ...]] = (
        "values_type",
        "missing",
        "dim",
        "reduction",
        "temperature",
    )

    def forward(
        self,
        input: Tensor,
        values: Tensor,
        indices: Tensor,
        token_weight: Tensor | None = None,
        class_mask: Tensor | None = None,
    ) -> Tensor:
        """Compute the divergence of these logits from the teacher."""
        value = type(self).function(
            input,
            values,
            indices,
            token_weight=token_weight,
            class_mask=class_mask,
            inplace_backward=self.inplace_backward,
            **self._options(),
        )
        return self._scaled(value)


class TopKKLDivLoss(TopKModule):
    """KL divergence from a teacher that is known at :math:`k` classes, as a module.

    It calls :func:`fastdiv.topk_kl_div`, which has the formula and lists the errors.

    Args:
        values_type: What ``values`` holds: ``"logits"`` (:math:`p` is their softmax at the same
            temperature), ``"log_probs"`` or ``"probs"`` (which are used as they are).
        missing: ``"ignore"``, ``"renormalize"``, ``"tail"`` or ``"uniform"``: what is done with the
            teacher's mass in other classes.
        dim: Dimension of the classes.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``) or ``"batchmean"`` (sum / ``input.size(0)``).
        temperature: :math:`T`, which divides the input, and ``values`` if they are logits.  A
            tensor holds one number, or one for each row; it is learnt if it is a ``Parameter``.
        scale_by_temperature: Multiply the value by :math:`T^2`, which keeps the size of its
            gradient about the same for all temperatures (Hinton et al., 2015).
        inplace_backward: Write the gradient over the memory of the logits.  Autograd raises if
            another backward still needs them.  They must be neither a leaf of autograd's graph
            nor a view of one, and must not share memory with other arguments.  Under
            ``torch.compile`` a fresh gradient is used instead.

    Shape:
        * ``input``: logits of any shape and strides, with the :math:`C` classes on ``dim``;
          float32, bfloat16, float16 or float64.
        * ``values``: the teacher at the :math:`k` classes, of the shape of ``input`` but with
          :math:`k` for :math:`C`.
        * ``indices``: the :math:`k` classes (int64, int32, int16, uint8), of the shape of
          ``values``; -1 is padding.
        * ``token_weight``: weights of the rows, of the shape of ``input`` without ``dim``;
          optional.
        * ``class_mask``: the classes that take part, as in the function; optional.
        * Result: a scalar, or with ``reduction="none"`` one value per row, of the shape of
          ``input`` without ``dim``.

    Example:
        >>> import torch, fastdiv
        >>> loss = fastdiv.nn.TopKKLDivLoss(values_type="logits")
        >>> loss(torch.zeros(1, 4), torch.zeros(1, 2), torch.tensor([[3, 0]]))  # ln 4 - ln 2
        tensor(0.6931)

    Source: :func:`fastdiv.topk_kl_div`.
    """

    function = staticmethod(topk_kl_div)

    def __init__(
        self,
        *,
        values_type: TargetType,
        missing: KLMissing = "ignore",
        dim: int = -1,
        reduction: Reduction = "batchmean",
        temperature: float | Tensor = 1.0,
        scale_by_temperature: bool = False,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(dim, reduction, temperature, scale_by_temperature, inplace_backward)
        self.values_type = values_type
        self.missing = missing


class TopKReverseKLDivLoss(TopKModule):
    """Reverse KL divergence from a teacher that is known at :math:`k` classes, as a module.

    It calls :func:`fastdiv.topk_reverse_kl_div`, which has the formula and lists the errors.

    Args:
        values_type: What ``values`` holds: ``"logits"`` (:math:`p` is their softmax at the same
            temperature), ``"log_probs"`` or ``"probs"`` (which are used as they are).
        missing: ``"ignore"``, ``"renormalize"`` or ``"tail"``: what is done outside of the
            :math:`k` classes.
        dim: Dimension of the classes.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``) or ``"batchmean"`` (sum / ``input.size(0)``).
        temperature: :math:`T`, which divides the input, and ``values`` if they are logits.  A
            tensor holds one number, or one for each row; it is learnt if it is a ``Parameter``.
        scale_by_temperature: Multiply the value by :math:`T^2`, which keeps the size of its
            gradient about the same for all temperatures (Hinton et al., 2015).
        inplace_backward: Write the gradient over the memory of the logits.  Autograd raises if
            another backward still needs them.  They must be neither a leaf of autograd's graph
            nor a view of one, and must not share memory with other arguments.  Under
            ``torch.compile`` a fresh gradient is used instead.

    Shape:
        * ``input``: logits of any shape and strides, with the :math:`C` classes on ``dim``;
          float32, bfloat16, float16 or float64.
        * ``values``: the teacher at the :math:`k` classes, of the shape of ``input`` but with
          :math:`k` for :math:`C`.
        * ``indices``: the :math:`k` classes (int64, int32, int16, uint8), of the shape of
          ``values``; -1 is padding.
        * ``token_weight``: weights of the rows, of the shape of ``input`` without ``dim``;
          optional.
        * ``class_mask``: the classes that take part, as in the function; optional.
        * Result: a scalar, or with ``reduction="none"`` one value per row, of the shape of
          ``input`` without ``dim``.

    Example:
        >>> import torch, fastdiv
        >>> loss = fastdiv.nn.TopKReverseKLDivLoss(values_type="probs", missing="tail")
        >>> loss(torch.zeros(1, 4), torch.tensor([[0.5, 0.3]]), torch.tensor([[2, 0]]))
        tensor(0.2393)

    Source: :func:`fastdiv.topk_reverse_kl_div`.
    """

    function = staticmethod(topk_reverse_kl_div)

    def __init__(
        self,
        *,
        values_type: TargetType,
        missing: Missing = "ignore",
        dim: int = -1,
        reduction: Reduction = "batchmean",
        temperature: float | Tensor = 1.0,
        scale_by_temperature: bool = False,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(dim, reduction, temperature, scale_by_temperature, inplace_backward)
        self.values_type = values_type
        self.missing = missing


class TopKJSDivLoss(TopKModule):
    r"""Jensen-Shannon divergence from a teacher that is known at :math:`k` classes, as a module.

    It calls :func:`fastdiv.topk_js_div`, which has the formula and lists the errors.

    Args:
        values_type: What ``values`` holds: ``"logits"`` (:math:`p` is their softmax at the same
            temperature), ``"log_probs"`` or ``"probs"`` (which are used as they are).
        beta: :math:`\beta` in [0, 1], the share of the target in the mixture.
        missing: ``"ignore"``, ``"renormalize"`` or ``"tail"``: what is done outside of the
            :math:`k` classes.
        dim: Dimension of the classes.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``) or ``"batchmean"`` (sum / ``input.size(0)``).
        temperature: :math:`T`, which divides the input, and ``values`` if they are logits.  A
            tensor holds one number, or one for each row; it is learnt if it is a ``Parameter``.
        scale_by_temperature: Multiply the value by :math:`T^2`, which keeps the size of its
            gradient about the same for all temperatures (Hinton et al., 2015).
        inplace_backward: Write the gradient over the memory of the logits.  Autograd raises if
            another backward still needs them.  They must be neither a leaf of autograd's graph
            nor a view of one, and must not share memory with other arguments.  Under
            ``torch.compile`` a fresh gradient is used instead.

    Shape:
        * ``input``: logits of any shape and strides, with the :math:`C` classes on ``dim``;
          float32, bfloat16, float16 or float64.
        * ``values``: the teacher at the :math:`k` classes, of the shape of ``input`` but with
          :math:`k` for :math:`C`.
        * ``indices``: the :math:`k` classes (int64, int32, int16, uint8), of the shape of
          ``values``; -1 is padding.
        * ``token_weight``: weights of the rows, of the shape of ``input`` without ``dim``;
          optional.
        * ``class_mask``: the classes that take part, as in the function; optional.
        * Result: a scalar, or with ``reduction="none"`` one value per row, of the shape of
          ``input`` without ``dim``.

    Example:
        >>> import torch, fastdiv
        >>> loss = fastdiv.nn.TopKJSDivLoss(values_type="probs", missing="tail")
        >>> loss(torch.zeros(1, 4), torch.tensor([[0.5, 0.3]]), torch.tensor([[2, 0]]))
        tensor(0.0556)

    Source: :func:`fastdiv.topk_js_div`.
    """

    function = staticmethod(topk_js_div)
    shown = (*TopKModule.shown, "beta")

    def __init__(
        self,
        *,
        values_type: TargetType,
        beta: float = 0.5,
        missing: Missing = "ignore",
        dim: int = -1,
        reduction: Reduction = "batchmean",
        temperature: float | Tensor = 1.0,
        scale_by_temperature: bool = False,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(dim, reduction, temperature, scale_by_temperature, inplace_backward)
        self.values_type = values_type
        self.missing = missing
        self.beta = beta
