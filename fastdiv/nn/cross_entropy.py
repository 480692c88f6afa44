"""The module of the cross entropy."""

from __future__ import annotations

from torch import Tensor, nn

from .._losses.cross_entropy import cross_entropy
from ..reference import Stats
from ..reference.choices import Reduction, Smoothing


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
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        *,
        dim: int | None = None,
        smoothing: Smoothing = "all",
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
        return cross_entropy(  # type: ignore[misc]  # of so many words, mypy tries no unions
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
            f"label_smoothing={self.label_smoothing}, dim={self.dim}, "
            f"smoothing={self.smoothing!r}, temperature={self.temperature}, "
            f"softcap={self.softcap}, z_loss={self.z_loss}, "
            f"inplace_backward={self.inplace_backward}, return_stats={self.return_stats}"
        )
