"""The module of the cross entropy."""

from __future__ import annotations

from torch import Tensor, nn

from .._losses.cross_entropy import cross_entropy
from ..reference import Stats
from ..reference.choices import Reduction, Smoothing, TokenWeight
from .base import as_text


class CrossEntropyLoss(nn.Module):
    r"""Cross entropy of logits with class indices or probabilities, as a module.

    It calls :func:`fastdiv.cross_entropy`, which has the formula and lists the errors.  It is a
    drop-in for ``torch.nn.CrossEntropyLoss``.

    Args:
        weight: Weights of the classes, shape ``(C,)``, kept as a buffer; 1 by default.
        ignore_index: Rows with this label do not count: their loss and gradient are 0, whatever
            they hold.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight`` and the class weight of the label; NaN if no row counts) or
            ``"batchmean"`` (sum / ``input.size(0)``).
        label_smoothing: :math:`\varepsilon` in [0, 1].
        dim: Dimension of the classes; by default 1, as in torch, or 0 if ``input`` has one
            dimension.
        smoothing: ``"all"`` spreads :math:`\varepsilon` over all classes, ``"others"`` over all but
            the label.
        temperature: :math:`T`, which divides the logits.  A tensor holds one number, or one for
            each row; it is learnt if it is a ``Parameter``.
        softcap: Replace the logits by ``softcap * tanh(x / softcap)`` first; None for no cap.
        z_loss: :math:`z`, the factor of the squared log-sum-exp.  :math:`\omega` is the class
            weight of the label, and 1 for probabilities.
        inplace_backward: Write the gradient over the memory of the logits.  Autograd raises if
            another backward still needs them.  They must be neither a leaf of autograd's graph
            nor a view of one, and must not share memory with other arguments.  Under
            ``torch.compile`` a fresh gradient is used instead.
        return_stats: Also return :class:`fastdiv.Stats`: ``lse``, ``entropy``, ``argmax`` and
            ``log_prob`` of every row, without gradient.  ``log_prob`` is that of the label (0 where
            the row does not count), or :math:`\sum_c p_c \log q_c` for probabilities.
        token_weight: ``"probability"`` weights a row by the probability of its label, where a call
            gives no weights.

    Shape:
        * ``input``: logits of any shape and strides, with the :math:`C` classes on ``dim``;
          float32, bfloat16, float16 or float64.
        * ``target``: class indices (int64, int32, uint8) of the shape of ``input`` without ``dim``,
          or probabilities (floating) of the shape of ``input``.
        * ``token_weight``: weights of the rows, of the shape of ``input`` without ``dim``, or
          ``"probability"``; optional.
        * ``class_mask``: the classes that take part, as in the function; optional.
        * Result: a scalar, or with ``reduction="none"`` one value per row; with ``return_stats`` a
          pair of it and the statistics.

    Example:
        >>> import torch, fastdiv
        >>> fastdiv.nn.CrossEntropyLoss(label_smoothing=0.1)(
        ...     torch.zeros(2, 4), torch.tensor([0, 3])
        ... )
        tensor(1.3863)

    Source: :func:`fastdiv.cross_entropy`, :class:`torch.nn.CrossEntropyLoss`.
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
        temperature: float | Tensor = 1.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        inplace_backward: bool = False,
        return_stats: bool = False,
        token_weight: TokenWeight | None = None,
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
        self.token_weight = token_weight

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        token_weight: Tensor | TokenWeight | None = None,
        class_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Stats]:
        """Compute the loss of these logits."""
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
            token_weight=self.token_weight if token_weight is None else token_weight,
            class_mask=class_mask,
            inplace_backward=self.inplace_backward,
            return_stats=self.return_stats,  # type: ignore[call-overload]
        )

    def extra_repr(self) -> str:
        """Return the options as text."""
        return (
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, "
            f"label_smoothing={self.label_smoothing}, dim={self.dim}, "
            f"smoothing={self.smoothing!r}, temperature={as_text(self.temperature)}, "
            f"softcap={self.softcap}, z_loss={self.z_loss}, "
            f"inplace_backward={self.inplace_backward}, return_stats={self.return_stats}, "
            f"token_weight={self.token_weight!r}"
        )
