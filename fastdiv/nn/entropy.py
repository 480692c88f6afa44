"""The module of the entropy."""

from __future__ import annotations

from torch import Tensor, nn

from .._losses.entropy import entropy
from ..reference.choices import Reduction
from .base import as_text


class EntropyLoss(nn.Module):
    """Entropy of logits as a module, with a mean by default.

    It calls :func:`fastdiv.entropy`, which has the formula and lists the errors.

    Args:
        dim: Dimension of the classes.
        temperature: :math:`T`, which divides the logits.  A tensor holds one number, or one for
            each row; it is learnt if it is a ``Parameter``.
        base: Base of the logarithm: None for nats, 2 for bits.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` or ``"batchmean"`` (sum /
            ``input.size(0)``).

    Shape:
        * ``input``: logits of any shape and strides, with the :math:`C` classes on ``dim``;
          float32, bfloat16, float16 or float64.
        * ``class_mask``: the classes that take part, as in the function; optional.
        * Result: a scalar, or with ``reduction="none"`` one value per row, of the shape of
          ``input`` without ``dim``.

    Example:
        >>> import torch, fastdiv
        >>> fastdiv.nn.EntropyLoss(base=2)(torch.zeros(3, 8))
        tensor(3.)

    Source: :func:`fastdiv.entropy`.
    """

    def __init__(
        self,
        *,
        dim: int = -1,
        temperature: float | Tensor = 1.0,
        base: float | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.dim = dim
        self.temperature = temperature
        self.base = base
        self.reduction = reduction

    def forward(self, input: Tensor, class_mask: Tensor | None = None) -> Tensor:
        """Compute the entropy of these logits."""
        return entropy(
            input,
            dim=self.dim,
            temperature=self.temperature,
            base=self.base,
            reduction=self.reduction,
            class_mask=class_mask,
        )

    def extra_repr(self) -> str:
        """Return the options as text."""
        return (
            f"dim={self.dim}, temperature={as_text(self.temperature)}, base={self.base}, "
            f"reduction={self.reduction!r}"
        )
