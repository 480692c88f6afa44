"""The linear losses as modules, which hold the layer: ``linear`` is a ``torch.nn.Linear``.

A head that shares its weight with an embedding says ``loss.linear.weight = embedding.weight``.
The layer is called as any other, so what hangs on it keeps its meaning (see ``layer``).
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from typing import Any, ClassVar, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._engine.symbolic import term, times
from .._linear.cross_entropy import linear_cross_entropy, linear_log_prob_and_entropy
from .._linear.divergence import check_teacher, linear_js_div, linear_kl_div, linear_reverse_kl_div
from .._losses.cross_entropy import cross_entropy
from .._losses.divergence import js_div, kl_div, reverse_kl_div
from .._losses.entropy import log_prob_and_entropy
from ..reference import Stats
from ..reference.choices import Reduction, Smoothing, TargetType
from .layer import loss_through

if sys.version_info >= (3, 11):
    from typing import Unpack
else:
    from typing_extensions import Unpack  # which torch brings along


class CrossEntropyOptions(TypedDict, total=False):
    """What :class:`LinearCrossEntropyLoss` passes on to its function."""

    ignore_index: int | None
    label_smoothing: float
    options: Any
    smoothing: Smoothing
    temperature: float
    softcap: float | None
    z_loss: float
    return_stats: bool
    chunk_size: int | None


class DivergenceOptions(TypedDict, total=False):
    """What the modules of divergences pass on; only :class:`LinearJSDivLoss` takes ``beta``."""

    target_type: TargetType | None
    beta: float
    reduction: Reduction
    temperature: float
    chunk_size: int | None


class _LinearLoss(nn.Module):
    """A layer and options."""

    function: ClassVar[Callable[..., Any]]
    of_logits: ClassVar[Callable[..., Any]]  # the same of logits, for layers that must make them

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        of_call = {*inspect.signature(self.forward).parameters, "linear_weight", "linear_bias"}
        known = inspect.signature(self.function).parameters.keys() - of_call
        if unknown := options.keys() - known:
            raise TypeError(f"{type(self).__name__} has no options {sorted(unknown)}")
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.options = options

    @property
    def options_of_logits(self) -> dict[str, Any]:
        """The options without those that say how many logits are held."""
        return {k: v for k, v in self.options.items() if k not in ("chunk_size", "options")}

    def extra_repr(self) -> str:
        """The options."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class LinearCrossEntropyLoss(_LinearLoss):
    """Module form of :func:`fastdiv.linear_cross_entropy`.

    A drop-in for ``torch.nn.LinearCrossEntropyLoss``, parameters included.

    Args:
        in_features: Size of the hidden states.
        num_classes: Number of classes.
        out_features: Sizes of further dimensions, as torch has them; with them logits are held.
        bias: Whether the layer has a bias.
        device: Where the layer is.
        dtype: Of the layer.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` or ``"batchmean"``.
        weight: Class weights, kept as a buffer.
        **options: All others of the function.

    Example:
        >>> import torch, fastdiv
        >>> loss = fastdiv.nn.LinearCrossEntropyLoss(2, 4, label_smoothing=0.1)
        >>> loss(torch.zeros(3, 2), torch.tensor([0, 3, 1]))
        tensor(1.3863, grad_fn=<_LinearLossBackward>)
    """

    function = staticmethod(linear_cross_entropy)
    of_logits = staticmethod(cross_entropy)
    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: Reduction = "mean",
        weight: Tensor | None = None,
        **options: Unpack[CrossEntropyOptions],
    ) -> None:
        outputs = math.prod(out_features, start=num_classes)
        super().__init__(
            in_features,
            outputs,
            bias=bias,
            device=device,
            dtype=dtype,
            reduction=reduction,
            **options,
        )
        self.register_buffer("weight", weight)
        self.shape = (num_classes, *out_features)

    def forward(
        self, input: Tensor, target: Tensor, token_weight: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Stats]:
        """The loss of these hidden states."""
        weights: dict[str, Any] = {"weight": self.weight, "token_weight": token_weight}

        def of_layer(input: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
            if len(self.shape) > 1:
                weight = weight.unflatten(0, self.shape)
                bias = None if bias is None else bias.unflatten(0, self.shape)
            return self.function(input, weight, target, linear_bias=bias, **weights, **self.options)

        def of_logits(logits: Tensor) -> Any:
            options = self.options_of_logits
            if options.get("ignore_index", 0) is None:  # linear_cross_entropy's word for -100
                del options["ignore_index"]
            logits = logits.unflatten(-1, self.shape)
            return self.of_logits(logits, target, dim=input.dim() - 1, **weights, **options)

        return loss_through(self.linear, input, of_layer, of_logits)


class _LinearDivergenceLoss(_LinearLoss):
    """Options that every divergence has."""

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
        *,
        target_linear_weight: Tensor | None = None,
        target_linear_bias: Tensor | None = None,
    ) -> Tensor:
        """The divergence of these hidden states from the target, a teacher's with its layer."""
        teacher = (target_linear_weight, target_linear_bias)

        def of_layer(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return self.function(
                input,
                weight,
                target,
                linear_bias=bias,
                target_linear_weight=target_linear_weight,
                target_linear_bias=target_linear_bias,
                token_weight=token_weight,
                **self.options,
            )

        def of_logits(logits: Tensor) -> Tensor:
            options = self.options_of_logits
            target_type, _ = check_teacher(
                logits, target, options.pop("target_type", None), *teacher
            )
            rows = target
            if target_linear_weight is not None:
                rows = F.linear(target, target_linear_weight, target_linear_bias)
            return self.of_logits(
                logits, rows, target_type=target_type, token_weight=token_weight, **options
            )

        value = loss_through(self.linear, input, of_layer, of_logits)
        if not self.scale_by_temperature:
            return value
        return times(value, term(self.options.get("temperature", 1.0)) ** 2)


class LinearKLDivLoss(_LinearDivergenceLoss):
    """Module form of :func:`fastdiv.linear_kl_div`: KL(p || q) with q of the module's layer.

    Args:
        in_features: Size of the hidden states.
        num_classes: Number of classes.
        bias: Whether the layer has a bias.
        device: Where the layer is.
        dtype: Of the layer.
        scale_by_temperature: Multiply the value by T squared (Hinton et al., 2015).
        **options: ``target_type``, ``reduction``, ``temperature``, ``chunk_size`` of the function.

    Example:
        >>> import torch, fastdiv
        >>> kl = fastdiv.nn.LinearKLDivLoss(2, 3, target_type="probs")
        >>> kl(torch.zeros(1, 2), torch.tensor([[9 / 25, 12 / 25, 4 / 25]])).item()
        0.0853
    """

    function = staticmethod(linear_kl_div)
    of_logits = staticmethod(kl_div)


class LinearReverseKLDivLoss(_LinearDivergenceLoss):
    """Module form of :func:`fastdiv.linear_reverse_kl_div`; arguments of :class:`LinearKLDivLoss`.

    Example:
        >>> import torch, fastdiv
        >>> kl = fastdiv.nn.LinearReverseKLDivLoss(2, 3, target_type="probs")
        >>> kl(torch.zeros(1, 2), torch.tensor([[9 / 25, 12 / 25, 4 / 25]])).item()
        0.0975
    """

    function = staticmethod(linear_reverse_kl_div)
    of_logits = staticmethod(reverse_kl_div)


class LinearJSDivLoss(_LinearDivergenceLoss):
    """Module form of :func:`fastdiv.linear_js_div`.

    Arguments are those of :class:`LinearKLDivLoss`, and ``beta``.

    Example:
        >>> import torch, fastdiv
        >>> js = fastdiv.nn.LinearJSDivLoss(2, 3, beta=0.1)  # from a teacher's hidden states
        >>> js(torch.zeros(1, 2), torch.zeros(1, 5), target_linear_weight=torch.ones(3, 5)).item()
        0.0
    """

    function = staticmethod(linear_js_div)
    of_logits = staticmethod(js_div)


class LinearLogProbAndEntropy(_LinearLoss):
    """Module form of :func:`fastdiv.linear_log_prob_and_entropy`.

    Args:
        in_features: Size of the hidden states.
        num_classes: Number of classes.
        bias: Whether the layer has a bias.
        device: Where the layer is.
        dtype: Of the layer.
        **options: ``temperature`` and ``chunk_size`` of the function.

    Example:
        >>> import torch, fastdiv
        >>> both = fastdiv.nn.LinearLogProbAndEntropy(2, 4)
        >>> [v.item() for v in both(torch.zeros(1, 2), torch.tensor([2]))]
        [-1.3863, 1.3863]
    """

    function = staticmethod(linear_log_prob_and_entropy)
    of_logits = staticmethod(log_prob_and_entropy)

    def forward(self, input: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """The log-probabilities and entropies of these hidden states."""

        def of_layer(input: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
            return self.function(input, weight, index, linear_bias=bias, **self.options)

        def of_logits(logits: Tensor) -> Any:
            return self.of_logits(logits, index, **self.options_of_logits)

        return loss_through(self.linear, input, of_layer, of_logits)
