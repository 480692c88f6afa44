"""The losses as modules: options in the constructor, tensors in the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from . import cross_entropy as _cross_entropy
from . import divergence as _divergence
from . import entropy as _entropy
from ._combined import DistillationLoss, LabelSmoothingLoss
from ._linear_modules import (
    LinearCrossEntropyLoss,
    LinearJSDivLoss,
    LinearKLDivLoss,
    LinearLogProbAndEntropy,
    LinearReverseKLDivLoss,
)
from .reference import Stats

__all__ = [
    "CrossEntropyLoss",
    "DistillationLoss",
    "EntropyLoss",
    "JSDivLoss",
    "KLDivLoss",
    "LabelSmoothingLoss",
    "LinearCrossEntropyLoss",
    "LinearJSDivLoss",
    "LinearKLDivLoss",
    "LinearLogProbAndEntropy",
    "LinearReverseKLDivLoss",
    "ReverseKLDivLoss",
]


class CrossEntropyLoss(nn.Module):
    """Module form of :func:`fastdiv.cross_entropy`; a drop-in for ``torch.nn.CrossEntropyLoss``.

    Args:
        weight: Class weights, kept as a buffer.
        ignore_index: See the function, as for all that follow.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` or ``"batchmean"``.
        label_smoothing: In [0, 1].
        dim: Dimension of the classes.
        smoothing: ``"all"`` or ``"others"``.
        temperature: Divides the logits.
        softcap: Soft cap of the logits.
        z_loss: Factor of the squared log-sum-exp.
        inplace_backward: Write the gradient over the logits.
        return_stats: Also return statistics of the rows.

    Example:
        >>> import torch, fastdiv
        >>> fastdiv.nn.CrossEntropyLoss(label_smoothing=0.1)(
        ...     torch.zeros(2, 4), torch.tensor([0, 3])
        ... )
        tensor(1.3863)
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        dim: int | None = None,
        smoothing: str = "all",
        temperature: float = 1.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        inplace_backward: bool = False,
        return_stats: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.dim = dim
        self.smoothing = smoothing
        self.temperature = temperature
        self.softcap = softcap
        self.z_loss = z_loss
        self.inplace_backward = inplace_backward
        self.return_stats = return_stats

    def forward(
        self, input: Tensor, target: Tensor, token_weight: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Stats]:
        """The loss of these logits."""
        return _cross_entropy.cross_entropy(
            input,
            target,
            self.weight,
            dim=self.dim,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            smoothing=self.smoothing,
            temperature=self.temperature,
            softcap=self.softcap,
            z_loss=self.z_loss,
            token_weight=token_weight,
            inplace_backward=self.inplace_backward,
            return_stats=self.return_stats,  # type: ignore[call-overload]
        )

    def extra_repr(self) -> str:
        """The options."""
        return (
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, "
            f"label_smoothing={self.label_smoothing}"
        )


class _DivergenceLoss(nn.Module):
    """Options that every divergence has."""

    function: ClassVar[Callable[..., Tensor]]

    def __init__(
        self,
        *,
        target_type: str,
        dim: int = -1,
        reduction: str = "batchmean",
        temperature: float = 1.0,
        scale_by_temperature: bool = False,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__()
        self.target_type = target_type
        self.dim = dim
        self.reduction = reduction
        self.temperature = temperature
        self.scale_by_temperature = scale_by_temperature
        self.inplace_backward = inplace_backward

    def _options(self) -> dict[str, object]:
        return {
            "target_type": self.target_type,
            "dim": self.dim,
            "reduction": self.reduction,
            "temperature": self.temperature,
            "inplace_backward": self.inplace_backward,
        }

    def forward(self, input: Tensor, target: Tensor, token_weight: Tensor | None = None) -> Tensor:
        """The divergence of these logits from the target."""
        value = type(self).function(input, target, token_weight=token_weight, **self._options())
        return value * self.temperature**2 if self.scale_by_temperature else value

    def extra_repr(self) -> str:
        """The options."""
        return ", ".join(f"{name}={value!r}" for name, value in self._options().items())


class KLDivLoss(_DivergenceLoss):
    """Module form of :func:`fastdiv.kl_div`: KL(p || q) with q from the input.

    Args:
        target_type: ``"logits"``, ``"log_probs"`` or ``"probs"``.
        dim: Dimension of the classes.
        reduction: As for the function.
        temperature: T.
        scale_by_temperature: Multiply the value by T squared, which keeps the size of the gradient
            about the same for every temperature (Hinton et al., 2015).
        inplace_backward: Write the gradient over the logits.

    Example:
        >>> import torch, fastdiv
        >>> kl = fastdiv.nn.KLDivLoss(target_type="probs")
        >>> kl(torch.zeros(1, 3), torch.tensor([[9 / 25, 12 / 25, 4 / 25]]))
        tensor(0.0853)
    """

    function = staticmethod(_divergence.kl_div)


class ReverseKLDivLoss(_DivergenceLoss):
    """Module form of :func:`fastdiv.reverse_kl_div`: KL(q || p); arguments of :class:`KLDivLoss`.

    Example:
        >>> import torch, fastdiv
        >>> kl = fastdiv.nn.ReverseKLDivLoss(target_type="probs")
        >>> kl(torch.zeros(1, 3), torch.tensor([[9 / 25, 12 / 25, 4 / 25]]))
        tensor(0.0975)
    """

    function = staticmethod(_divergence.reverse_kl_div)


class JSDivLoss(_DivergenceLoss):
    """Module form of :func:`fastdiv.js_div`; arguments of :class:`KLDivLoss`, and ``beta``.

    Example:
        >>> import torch, fastdiv
        >>> js = fastdiv.nn.JSDivLoss(target_type="logits", beta=0.5)
        >>> js(torch.tensor([[0.0, torch.inf * -1]]), torch.tensor([[-torch.inf, 0.0]]))  # ln 2
        tensor(0.6931)
    """

    function = staticmethod(_divergence.js_div)

    def __init__(
        self,
        *,
        target_type: str,
        beta: float = 0.5,
        dim: int = -1,
        reduction: str = "batchmean",
        temperature: float = 1.0,
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

    def _options(self) -> dict[str, object]:
        return super()._options() | {"beta": self.beta}


class EntropyLoss(nn.Module):
    """Module form of :func:`fastdiv.entropy`, with a mean by default.

    Args:
        dim: Dimension of the classes.
        temperature: T.
        base: Base of the logarithm; nats by default.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` or ``"batchmean"``.

    Example:
        >>> import torch, fastdiv
        >>> fastdiv.nn.EntropyLoss(base=2)(torch.zeros(3, 8))
        tensor(3.)
    """

    def __init__(
        self,
        *,
        dim: int = -1,
        temperature: float = 1.0,
        base: float | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.dim = dim
        self.temperature = temperature
        self.base = base
        self.reduction = reduction

    def forward(self, input: Tensor) -> Tensor:
        """The entropy of these logits."""
        return _entropy.entropy(
            input,
            dim=self.dim,
            temperature=self.temperature,
            base=self.base,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """The options."""
        return f"dim={self.dim}, temperature={self.temperature}, reduction={self.reduction!r}"
