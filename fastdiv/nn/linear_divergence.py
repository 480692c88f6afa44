"""The modules of divergences of a linear layer's logits."""

from __future__ import annotations

import sys
from typing import TypedDict

import torch
from torch import Tensor

from .._engine.symbolic import times
from .._linear.divergence import check_teacher, linear_js_div, linear_kl_div, linear_reverse_kl_div
from .._linear.dtypes import whole_logits
from .._losses.divergence import js_div, kl_div, reverse_kl_div
from ..reference.choices import Accumulate, Reduction, TargetType

if sys.version_info >= (3, 11):
    from typing import Unpack
else:
    from typing_extensions import Unpack  # which torch brings along
from .base import squared
from .linear import LinearModule


class DivergenceOptions(TypedDict, total=False):
    """Name the options that modules pass on; only :class:`LinearJSDivLoss` takes ``beta``."""

    target_type: TargetType | None
    beta: float
    reduction: Reduction
    temperature: float | Tensor
    chunk_size: int | None
    accumulate: Accumulate | None
    logits_dtype: torch.dtype | None


class _LinearDivergenceLoss(LinearModule):
    """The options of every divergence."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        scale_by_temperature: bool = False,
        **options: Unpack[DivergenceOptions],
    ) -> None:
        super().__init__(in_features, num_classes, bias=bias, device=device, dtype=dtype, **options)
        self.scale_by_temperature = scale_by_temperature

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        token_weight: Tensor | None = None,
        class_mask: Tensor | None = None,
        *,
        target_linear_weight: Tensor | None = None,
        target_linear_bias: Tensor | None = None,
    ) -> Tensor:
        """Compute the divergence of these hidden states from the target, or from a teacher's."""
        teacher = (target_linear_weight, target_linear_bias)
        of_call = {"token_weight": token_weight, "class_mask": class_mask}

        def of_layer(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return self.function(
                input,
                weight,
                target,
                linear_bias=bias,
                target_linear_weight=target_linear_weight,
                target_linear_bias=target_linear_bias,
                **of_call,
                **self._options_of_layer,
            )

        def of_logits(logits: Tensor) -> Tensor:
            options = self.options_of_logits
            target_type, _ = check_teacher(
                logits, target, options.pop("target_type", None), *teacher
            )
            rows = target
            if target_linear_weight is not None:
                layer = (target, target_linear_weight, target_linear_bias)
                rows = whole_logits(*layer, self.options.get("logits_dtype"))
            return self.of_logits(logits, rows, target_type=target_type, **of_call, **options)

        value = self.loss_of(input, of_layer, of_logits)
        if not self.scale_by_temperature:
            return value
        options = self._options_of_layer
        reduction, temperature = options.get("reduction", ""), options.get("temperature", 1.0)
        return times(value, squared(temperature, value, reduction))


class LinearKLDivLoss(_LinearDivergenceLoss):
    """KL divergence KL(p || q) of the logits of a linear layer from a target p, as a module.

    It holds the layer, ``linear``, and calls :func:`fastdiv.linear_kl_div`, which has the formula
    and lists the errors.

    Args:
        in_features: Size :math:`H` of the hidden states.
        num_classes: Number :math:`C` of classes.
        bias: Whether the layer has a bias.
        device: Device of the layer.
        dtype: Dtype of the layer.
        scale_by_temperature: Multiply the value by :math:`T^2`, which keeps the size of its
            gradient about the same for all temperatures (Hinton et al., 2015).
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``.  Required
            unless it holds hidden states.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``) or ``"batchmean"`` (sum / ``input.size(0)``).
        temperature: :math:`T`, which divides all logits, also those of the target.  A tensor holds
            one number, or one for each row; it is learnt if it is a ``Parameter``.
        chunk_size: Rows whose logits are held at a time; by default 256, or as many as take a tenth
            of the memory of all logits if those are more.
        accumulate: Which gradient is summed over the tiles.  ``"weight"`` takes chunks of rows and
            three matrix products, for any reduction but ``"none"``.  In half precision it holds a
            float32 sum of the weight's size, :math:`4 C H` bytes, until the backward.  ``"rows"``
            takes blocks of classes and four products, without that sum.  None takes ``"weight"``
            where it needs no such sum, or one of at most 1/24 of all logits and 32 MB (256 MB
            on a GPU); else ``"rows"``.
        logits_dtype: ``torch.float32`` keeps logits of layers in half precision as the float32 sums
            that they are.  Their gradient is rounded only for the products that follow.  None
            rounds logits to the dtype of the layer, where the device multiplies in it.

    Shape:
        * ``input``: hidden states, shape ``(..., in_features)``; float32, bfloat16, float16 or
          float64.
        * ``target``: the teacher's rows, shape ``(..., num_classes)``, or its hidden states, shape
          ``(..., K)``.
        * ``token_weight``: weights of the rows, shape ``(...)``; optional.
        * ``class_mask``: the classes that take part, as in the function; optional.
        * ``target_linear_weight``, ``target_linear_bias``: the teacher's layer, shapes
          ``(num_classes, K)`` and ``(num_classes,)``, if the target holds hidden states.
        * Result: a scalar, or with ``reduction="none"`` one value per row, shape ``(...)``.

    Example:
        >>> import torch, fastdiv
        >>> kl = fastdiv.nn.LinearKLDivLoss(2, 3, target_type="probs")
        >>> kl(torch.zeros(1, 2), torch.tensor([[9 / 25, 12 / 25, 4 / 25]])).item()
        0.0853

    Source: :func:`fastdiv.linear_kl_div`.
    """

    function = staticmethod(linear_kl_div)
    of_logits = staticmethod(kl_div)


class LinearReverseKLDivLoss(_LinearDivergenceLoss):
    """Reverse KL divergence KL(q || p) of the logits of a linear layer, as a module.

    It holds the layer, ``linear``, and calls :func:`fastdiv.linear_reverse_kl_div`, which has the
    formula and lists the errors.

    Args:
        in_features: Size :math:`H` of the hidden states.
        num_classes: Number :math:`C` of classes.
        bias: Whether the layer has a bias.
        device: Device of the layer.
        dtype: Dtype of the layer.
        scale_by_temperature: Multiply the value by :math:`T^2`, which keeps the size of its
            gradient about the same for all temperatures (Hinton et al., 2015).
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``.  Required
            unless it holds hidden states.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``) or ``"batchmean"`` (sum / ``input.size(0)``).
        temperature: :math:`T`, which divides all logits, also those of the target.  A tensor holds
            one number, or one for each row; it is learnt if it is a ``Parameter``.
        chunk_size: Rows whose logits are held at a time; by default 256, or as many as take a tenth
            of the memory of all logits if those are more.
        accumulate: Which gradient is summed over the tiles.  ``"weight"`` takes chunks of rows and
            three matrix products, for any reduction but ``"none"``.  In half precision it holds a
            float32 sum of the weight's size, :math:`4 C H` bytes, until the backward.  ``"rows"``
            takes blocks of classes and four products, without that sum.  None takes ``"weight"``
            where it needs no such sum, or one of at most 1/24 of all logits and 32 MB (256 MB
            on a GPU); else ``"rows"``.
        logits_dtype: ``torch.float32`` keeps logits of layers in half precision as the float32 sums
            that they are.  Their gradient is rounded only for the products that follow.  None
            rounds logits to the dtype of the layer, where the device multiplies in it.

    Shape:
        * ``input``: hidden states, shape ``(..., in_features)``; float32, bfloat16, float16 or
          float64.
        * ``target``: the teacher's rows, shape ``(..., num_classes)``, or its hidden states, shape
          ``(..., K)``.
        * ``token_weight``: weights of the rows, shape ``(...)``; optional.
        * ``class_mask``: the classes that take part, as in the function; optional.
        * ``target_linear_weight``, ``target_linear_bias``: the teacher's layer, shapes
          ``(num_classes, K)`` and ``(num_classes,)``, if the target holds hidden states.
        * Result: a scalar, or with ``reduction="none"`` one value per row, shape ``(...)``.

    Example:
        >>> import torch, fastdiv
        >>> kl = fastdiv.nn.LinearReverseKLDivLoss(2, 3, target_type="probs")
        >>> kl(torch.zeros(1, 2), torch.tensor([[9 / 25, 12 / 25, 4 / 25]])).item()
        0.0975

    Source: :func:`fastdiv.linear_reverse_kl_div`.
    """

    function = staticmethod(linear_reverse_kl_div)
    of_logits = staticmethod(reverse_kl_div)


class LinearJSDivLoss(_LinearDivergenceLoss):
    r"""Jensen-Shannon divergence of the logits of a linear layer, as a module.

    It holds the layer, ``linear``, and calls :func:`fastdiv.linear_js_div`, which has the formula
    and lists the errors.

    Args:
        in_features: Size :math:`H` of the hidden states.
        num_classes: Number :math:`C` of classes.
        bias: Whether the layer has a bias.
        device: Device of the layer.
        dtype: Dtype of the layer.
        scale_by_temperature: Multiply the value by :math:`T^2`, which keeps the size of its
            gradient about the same for all temperatures (Hinton et al., 2015).
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``.  Required
            unless it holds hidden states.
        beta: :math:`\beta` in [0, 1], the share of the target in the mixture.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``) or ``"batchmean"`` (sum / ``input.size(0)``).
        temperature: :math:`T`, which divides all logits, also those of the target.  A tensor holds
            one number, or one for each row; it is learnt if it is a ``Parameter``.
        chunk_size: Rows whose logits are held at a time; by default 256, or as many as take a tenth
            of the memory of all logits if those are more.
        accumulate: Which gradient is summed over the tiles.  ``"weight"`` takes chunks of rows and
            three matrix products, for any reduction but ``"none"``.  In half precision it holds a
            float32 sum of the weight's size, :math:`4 C H` bytes, until the backward.  ``"rows"``
            takes blocks of classes and four products, without that sum.  None takes ``"weight"``
            where it needs no such sum, or one of at most 1/24 of all logits and 32 MB (256 MB
            on a GPU); else ``"rows"``.
        logits_dtype: ``torch.float32`` keeps logits of layers in half precision as the float32 sums
            that they are.  Their gradient is rounded only for the products that follow.  None
            rounds logits to the dtype of the layer, where the device multiplies in it.

    Shape:
        * ``input``: hidden states, shape ``(..., in_features)``; float32, bfloat16, float16 or
          float64.
        * ``target``: the teacher's rows, shape ``(..., num_classes)``, or its hidden states, shape
          ``(..., K)``.
        * ``token_weight``: weights of the rows, shape ``(...)``; optional.
        * ``class_mask``: the classes that take part, as in the function; optional.
        * ``target_linear_weight``, ``target_linear_bias``: the teacher's layer, shapes
          ``(num_classes, K)`` and ``(num_classes,)``, if the target holds hidden states.
        * Result: a scalar, or with ``reduction="none"`` one value per row, shape ``(...)``.

    Example:
        >>> import torch, fastdiv
        >>> js = fastdiv.nn.LinearJSDivLoss(2, 3, beta=0.1)  # from a teacher's hidden states
        >>> js(torch.zeros(1, 2), torch.zeros(1, 5), target_linear_weight=torch.ones(3, 5)).item()
        0.0

    Source: :func:`fastdiv.linear_js_div`.
    """

    function = staticmethod(linear_js_div)
    of_logits = staticmethod(js_div)
