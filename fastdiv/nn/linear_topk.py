"""The modules of divergences of a linear layer from a top-k teacher."""

from __future__ import annotations

import sys
from typing import Any, TypedDict

import torch
from torch import Tensor

from .._engine.symbolic import times
from .._linear.topk import linear_topk_kl_div, linear_topk_reverse_kl_div
from .._losses.topk import topk_kl_div, topk_reverse_kl_div
from ..reference.choices import KLMissing, Missing, Reduction, TargetType
from .base import squared
from .linear import LinearModule

if sys.version_info >= (3, 11):
    from typing import Unpack
else:
    from typing_extensions import Unpack  # which torch brings along


class TopKOptions(TypedDict, total=False):
    """Name the options that modules pass on."""

    reduction: Reduction
    temperature: float | Tensor
    chunk_size: int | None
    logits_dtype: torch.dtype | None


class _LinearTopKLoss(LinearModule):
    """A divergence from a top-k teacher."""

    scale_by_temperature: bool

    def forward(
        self,
        input: Tensor,
        values: Tensor,
        indices: Tensor,
        token_weight: Tensor | None = None,
        class_mask: Tensor | None = None,
    ) -> Tensor:
        """Compute the divergence of these hidden states from the teacher."""
        of_call = {"token_weight": token_weight, "class_mask": class_mask}

        def of_layer(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            options = {**of_call, **self._options_of_layer}
            return self.function(input, weight, values, indices, linear_bias=bias, **options)

        def of_logits(logits: Tensor) -> Tensor:
            return self.of_logits(logits, values, indices, **of_call, **self.options_of_logits)

        value = self.loss_of(input, of_layer, of_logits)
        if not self.scale_by_temperature:
            return value
        options = self._options_of_layer
        reduction, temperature = options.get("reduction", ""), options.get("temperature", 1.0)
        return times(value, squared(temperature, value, reduction))


class LinearTopKKLDivLoss(_LinearTopKLoss):
    """KL divergence of a linear layer from a top-k teacher, as a module.

    It holds the layer, ``linear``, and calls :func:`fastdiv.linear_topk_kl_div`, which has the
    formula and lists the errors.

    Args:
        in_features: Size :math:`H` of the hidden states.
        num_classes: Number :math:`C` of classes.
        bias: Whether the layer has a bias.
        device: Device of the layer.
        dtype: Dtype of the layer.
        scale_by_temperature: Multiply the value by :math:`T^2`, which keeps the size of its
            gradient about the same for all temperatures (Hinton et al., 2015).
        values_type: What ``values`` holds: ``"logits"`` (:math:`p` is their softmax at the same
            temperature), ``"log_probs"`` or ``"probs"`` (which are used as they are).
        missing: ``"ignore"``, ``"renormalize"``, ``"tail"`` or ``"uniform"``: what is done with the
            teacher's mass in other classes.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``) or ``"batchmean"`` (sum / ``input.size(0)``).
        temperature: :math:`T`, which divides the logits, and ``values`` if they are logits.  A
            tensor holds one number, or one for each row; it is learnt if it is a ``Parameter``.
        logits_dtype: ``torch.float32`` keeps logits of layers in half precision as the float32 sums
            that they are.  Their gradient is rounded only for the products that follow.  None
            rounds logits to the dtype of the layer, where the device multiplies in it.
        chunk_size: Rows whose logits are held at a time; by default 256, or as many as take a tenth
            of the memory of all logits if those are more.

    Shape:
        * ``input``: hidden states, shape ``(..., in_features)``; float32, bfloat16, float16 or
          float64.
        * ``values``: the teacher at the :math:`k` classes, shape ``(..., k)``.
        * ``indices``: the :math:`k` classes (int64, int32, int16, uint8), of the shape of
          ``values``; -1 is padding.
        * ``token_weight``: weights of the rows, shape ``(...)``; optional.
        * ``class_mask``: the classes that take part, as in the function; optional.
        * Result: a scalar, or with ``reduction="none"`` one value per row, shape ``(...)``.

    Example:
        >>> import torch, fastdiv
        >>> loss = fastdiv.nn.LinearTopKKLDivLoss(2, 4, values_type="probs", missing="tail")
        >>> p, classes = torch.tensor([[0.5, 0.3]]), torch.tensor([[2, 0]])
        >>> loss(torch.zeros(1, 2), p, classes).detach()
        tensor(0.2180)

    Source: :func:`fastdiv.linear_topk_kl_div`.
    """

    function = staticmethod(linear_topk_kl_div)
    of_logits = staticmethod(topk_kl_div)

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        scale_by_temperature: bool = False,
        values_type: TargetType,
        missing: KLMissing = "ignore",
        **options: Unpack[TopKOptions],
    ) -> None:
        layer: Any = {"bias": bias, "device": device, "dtype": dtype}
        own: Any = {"values_type": values_type, "missing": missing}
        super().__init__(in_features, num_classes, **layer, **own, **options)
        self.scale_by_temperature = scale_by_temperature


class LinearTopKReverseKLDivLoss(_LinearTopKLoss):
    """Reverse KL divergence of a linear layer from a top-k teacher, as a module.

    It holds the layer, ``linear``, and calls :func:`fastdiv.linear_topk_reverse_kl_div`, which
    has the formula and lists the errors.

    Args:
        in_features: Size :math:`H` of the hidden states.
        num_classes: Number :math:`C` of classes.
        bias: Whether the layer has a bias.
        device: Device of the layer.
        dtype: Dtype of the layer.
        scale_by_temperature: Multiply the value by :math:`T^2`, which keeps the size of its
            gradient about the same for all temperatures (Hinton et al., 2015).
        values_type: What ``values`` holds: ``"logits"`` (:math:`p` is their softmax at the same
            temperature), ``"log_probs"`` or ``"probs"`` (which are used as they are).
        missing: ``"ignore"``, ``"renormalize"`` or ``"tail"``: what is done outside of the
            :math:`k` classes.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``) or ``"batchmean"`` (sum / ``input.size(0)``).
        temperature: :math:`T`, which divides the logits, and ``values`` if they are logits.  A
            tensor holds one number, or one for each row; it is learnt if it is a ``Parameter``.
        logits_dtype: ``torch.float32`` keeps logits of layers in half precision as the float32 sums
            that they are.  Their gradient is rounded only for the products that follow.  None
            rounds logits to the dtype of the layer, where the device multiplies in it.
        chunk_size: Rows whose logits are held at a time; by default 256, or as many as take a tenth
            of the memory of all logits if those are more.

    Shape:
        * ``input``: hidden states, shape ``(..., in_features)``; float32, bfloat16, float16 or
          float64.
        * ``values``: the teacher at the :math:`k` classes, shape ``(..., k)``.
        * ``indices``: the :math:`k` classes (int64, int32, int16, uint8), of the shape of
          ``values``; -1 is padding.
        * ``token_weight``: weights of the rows, shape ``(...)``; optional.
        * ``class_mask``: the classes that take part, as in the function; optional.
        * Result: a scalar, or with ``reduction="none"`` one value per row, shape ``(...)``.

    Example:
        >>> import torch, fastdiv
        >>> loss = fastdiv.nn.LinearTopKReverseKLDivLoss(2, 4, values_type="probs", missing="tail")
        >>> p, classes = torch.tensor([[0.5, 0.3]]), torch.tensor([[2, 0]])
        >>> loss(torch.zeros(1, 2), p, classes).detach()
        tensor(0.2393)

    Source: :func:`fastdiv.linear_topk_reverse_kl_div`.
    """

    function = staticmethod(linear_topk_reverse_kl_div)
    of_logits = staticmethod(topk_reverse_kl_div)

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        scale_by_temperature: bool = False,
        values_type: TargetType,
        missing: Missing = "ignore",
        **options: Unpack[TopKOptions],
    ) -> None:
        layer: Any = {"bias": bias, "device": device, "dtype": dtype}
        own: Any = {"values_type": values_type, "missing": missing}
        super().__init__(in_features, num_classes, **layer, **own, **options)
        self.scale_by_temperature = scale_by_temperature
