"""The module of the entropy."""

from __future__ import annotations

from torch import Tensor, nn

from .._losses.entropy import entropy
from ..reference.choices import Reduction


class EntropyLoss(nn.Module):
    """Module form of :func:`fastdiv.entropy`, with a mean by default.

    Args:
        dim: Dimension of the classes.
        temperature: :math:`T`.
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
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.dim = dim
        self.temperature = temperature
        self.base = base
        self.reduction = reduction

    def forward(self, input: Tensor) -> Tensor:
        """The entropy of these logits."""
        return entropy(
            input,
            dim=self.dim,
            temperature=self.temperature,
            base=self.base,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """The options."""
        return (
            f"dim={self.dim}, temperature={self.temperature}, base={self.base}, "
            f"reduction={self.reduction!r}"
        )
