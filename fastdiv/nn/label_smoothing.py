"""Label smoothing as speech toolkits define it, a KL divergence."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .._engine import arguments
from .._engine.recording import recordable
from .._engine.symbolic import log
from .._losses.cross_entropy import cross_entropy


class LabelSmoothingLoss(nn.Module):
    r"""KL divergence of the prediction from the smoothed label, as WeNet and ESPnet train with it.

    It is a drop-in for their class of this name: same constructor, value and gradient.  With
    :math:`V` classes, :math:`q = \mathrm{softmax}(x)`, and a true distribution :math:`p` of
    :math:`1 - \varepsilon` on the label and :math:`\varepsilon / (V - 1)` on every other class,

    .. math::
        \ell = \frac1n \sum_{y_i \ne \mathrm{padding}} \mathrm{KL}(p_i \,\|\, q_i)
        = \frac1n \sum_{y_i \ne \mathrm{padding}} \bigl(H(p_i, q_i) - H(p_i)\bigr),

    where :math:`n` is the batch size, or with ``normalize_length`` the number of labels that are
    not padding.  The cross entropy takes one pass over the logits, and :math:`H(p)` is a constant.
    The true distributions are never written out, and the host waits for no number.

    A model that holds the module can be scripted, as WeNet scripts its own; the loss does not run
    there.

    Args:
        size: Number of classes :math:`V`.
        padding_idx: Label of padding.  The logits may hold anything there.
        smoothing: :math:`\varepsilon` in [0, 1].
        normalize_length: Divide by the number of labels instead of the batch size.
        inplace_backward: Write the gradient over the memory of the logits.  Autograd raises if
            another backward still needs them.  They must be neither a leaf of autograd's graph
            nor a view of one, and must not share memory with other arguments.  Under
            ``torch.compile`` a fresh gradient is used instead.

    Shape:
        * ``x``: the logits, ``(batch, length, size)``; float32, bfloat16, float16 or float64.
        * ``target``: ``(batch, length)``, int64 or int32.
        * Result: a scalar in nats, float32 (float64 for float64 logits).  For a batch that is all
          padding it is 0, or NaN with ``normalize_length``, with gradient 0.

    Raises:
        TypeError: A tensor has another dtype.
        ValueError: Shapes do not match, or the smoothing is not in [0, 1] or there is one class
            only.
        IndexError: A label is neither a class nor padding (on a CPU; elsewhere the value is NaN).

    Example:
        >>> import torch, fastdiv
        >>> loss = fastdiv.nn.LabelSmoothingLoss(4, padding_idx=-1, smoothing=0.1)
        >>> loss(torch.zeros(2, 3, 4), torch.tensor([[0, 3, 1], [2, -1, -1]]))
        tensor(1.9027)

    A model that holds it can be scripted, as WeNet scripts its own; the loss does not run there.

    Source: ``wenet/models/transformer/label_smoothing_loss.py``,
    ``espnet/nets/pytorch_backend/transformer/label_smoothing_loss.py``, without the argument
    ``criterion`` of the latter.
    """

    def __init__(
        self,
        size: int,
        padding_idx: int,
        smoothing: float,
        normalize_length: bool = False,
        *,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__()
        self.size = size
        self.padding_idx = arguments.check_ignored(padding_idx, "padding_idx")
        self.smoothing = arguments.check_share(smoothing, "smoothing")
        self.normalize_length = normalize_length
        self.inplace_backward = inplace_backward

    @torch.jit.unused  # users script a recogniser together with its training loss
    @recordable
    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """Compute the loss of these logits."""
        arguments.check_logits(x, "x")
        if x.dim() != 3 or x.shape[-1] != self.size:
            raise ValueError(f"x must be of shape (batch, length, {self.size}), got {(*x.shape,)}")
        value = cross_entropy(
            x,
            target,
            dim=-1,
            ignore_index=self.padding_idx,
            reduction="mean" if self.normalize_length else "batchmean",
            label_smoothing=self.smoothing,
            smoothing="others",
            inplace_backward=self.inplace_backward,
        )
        entropy = _entropy_of_smoothed_label(self.smoothing, self.size)
        if not self.normalize_length:
            labels = (target != self.padding_idx).sum(dtype=value.dtype)
            entropy = labels / x.shape[0] * entropy
        return (value - entropy).to(value.dtype)

    def extra_repr(self) -> str:
        """Return the options as text."""
        return (
            f"size={self.size}, padding_idx={self.padding_idx}, smoothing={self.smoothing}, "
            f"normalize_length={self.normalize_length}"
        )


def _entropy_of_smoothed_label(epsilon: float, classes: int) -> float | Tensor:
    """Add the entropy of label or not to that of which other class."""
    if epsilon == 0:
        return 0.0
    other = epsilon * (math.log(max(classes - 1, 1)) - log(epsilon))
    return other if epsilon == 1 else other - (1 - epsilon) * log(1 - epsilon)
