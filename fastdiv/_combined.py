"""Modules that put functions of the library together: label smoothing as a KL, distillation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import _check
from ._divergence_modules import FUNCTIONS
from ._recording import recordable
from ._symbolic import log, term, times
from .cross_entropy import cross_entropy


class LabelSmoothingLoss(nn.Module):
    r"""KL divergence of the prediction from the smoothed label, as WeNet and ESPnet train with it.

    A drop-in for their class of this name: same constructor, value and gradient.  With :math:`V`
    classes, :math:`q = \mathrm{softmax}(x)`, and a true distribution :math:`p` of
    :math:`1 - \varepsilon` on the label and :math:`\varepsilon / (V - 1)` on every other class,

    .. math::
        \ell = \frac1n \sum_{y_i \ne \mathrm{padding}} \mathrm{KL}(p_i \,\|\, q_i)
        = \frac1n \sum_{y_i \ne \mathrm{padding}} \bigl(H(p_i, q_i) - H(p_i)\bigr),

    where :math:`n` is the batch size, or with ``normalize_length`` the number of labels that are
    not padding.  The cross entropy takes one pass over the logits, :math:`H(p)` is a constant; the
    true distributions, which theirs writes out, are never held, and no number goes to the host.

    Args:
        size: Number of classes :math:`V`.
        padding_idx: Label of padding; what the logits hold there does not matter.
        smoothing: :math:`\varepsilon` in [0, 1].
        normalize_length: Divide by the number of labels instead of the batch size.
        inplace_backward: Write the gradient over the logits, see :func:`fastdiv.cross_entropy`.

    Shape:
        ``x``, the logits: ``(batch, length, size)``, of a dtype that :func:`fastdiv.cross_entropy`
        takes; ``target``: ``(batch, length)``, int64 or int32.  The result is a scalar in nats,
        float32 (float64 for float64 logits): 0 of a batch that is all padding, NaN with
        ``normalize_length``, both with gradient 0.

    Raises:
        TypeError: a dtype that is none of these.
        ValueError: shapes that do not fit, a smoothing outside [0, 1] or of a single class.
        IndexError: a label that is neither a class nor padding (on CPU; elsewhere it gives NaN).

    Example:
        >>> import torch, fastdiv
        >>> loss = fastdiv.nn.LabelSmoothingLoss(4, padding_idx=-1, smoothing=0.1)
        >>> loss(torch.zeros(2, 3, 4), torch.tensor([[0, 3, 1], [2, -1, -1]]))
        tensor(1.9027)

    A model that holds it can be scripted, as WeNet scripts its own; the loss does not run there.

    Source: ``wenet/models/transformer/label_smoothing_loss.py``,
    ``espnet/nets/pytorch_backend/transformer/label_smoothing_loss.py``, whose argument
    ``criterion`` it has not.
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
        self.padding_idx = _check.check_ignored(padding_idx, "padding_idx")
        self.smoothing = _check.check_share(smoothing, "smoothing")
        self.normalize_length = normalize_length
        self.inplace_backward = inplace_backward

    @torch.jit.unused  # a recogniser is scripted for its users with the loss it was trained with
    @recordable
    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        _check.check_logits(x, "x")
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
        return (
            f"size={self.size}, padding_idx={self.padding_idx}, smoothing={self.smoothing}, "
            f"normalize_length={self.normalize_length}"
        )


def _entropy_of_smoothed_label(epsilon: float, classes: int) -> float | Tensor:
    """Adds the entropy of label or not to that of which other class."""
    if epsilon == 0:
        return 0.0
    other = epsilon * (math.log(max(classes - 1, 1)) - log(epsilon))
    return other if epsilon == 1 else other - (1 - epsilon) * log(1 - epsilon)


class DistillationLoss(nn.Module):
    r"""Distillation: cross entropy with the labels, and a divergence from the teacher.

    .. math::
        \ell = (1 - \alpha)\, \mathrm{CE}(x, y)
        + \alpha\, T^2\, D\bigl(\mathrm{softmax}(t / T), \mathrm{softmax}(x / T)\bigr)

    without the factor :math:`T^2` unless ``scale_by_temperature``, and with the cross entropy at
    temperature 1.  Both parts are reduced alike, over the rows whose label is not
    ``ignore_index``; the others may hold anything, in student and teacher.  A part of weight 0 is
    not computed.

    Args:
        divergence: Name of the function that is :math:`D`: ``"kl_div"``, ``"reverse_kl_div"``,
            ``"js_div"`` or another divergence of :mod:`fastdiv`.
        alpha: :math:`\alpha` in [0, 1], the weight of the divergence.
        temperature: :math:`T`, of student and teacher logits in the divergence.
        scale_by_temperature: Multiply the divergence by :math:`T^2`, which keeps the size of its
            gradient about the same for every temperature.
        target_type: What the teacher gives: ``"logits"``, ``"log_probs"`` or ``"probs"``.
        ignore_index: Label of the rows that do not count.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` (over the rows that count) or ``"batchmean"``
            (sum / ``input.size(0)``).
        dim: Dimension of the classes.
        divergence_options: What else the divergence takes, as ``{"beta": 0.1}`` for ``js_div``.

    Shape:
        ``input``, the student's logits, and ``target``, the teacher: any one shape with the classes
        on ``dim``; ``labels`` (int64, int32, uint8) and ``token_weight``, weights of the rows: that
        shape without ``dim``.  Dtypes, result and errors are those of :func:`fastdiv.cross_entropy`
        and :func:`fastdiv.kl_div`.  A teacher that requires a gradient gets one.

    There is no ``inplace_backward``: both parts need the logits.

    Example:
        >>> import torch, fastdiv
        >>> student = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 0.0]])
        >>> teacher = torch.tensor([[0.0, 0.0, 3.0], [torch.nan] * 3])
        >>> distillation = fastdiv.nn.DistillationLoss(
        ...     "js_div", temperature=2.0, scale_by_temperature=True
        ... )
        >>> distillation(student, teacher, torch.tensor([2, -100]))
        tensor(0.2455)

    Source: Hinton et al., *Distilling the Knowledge in a Neural Network* (2015).
    """

    def __init__(
        self,
        divergence: str = "kl_div",
        *,
        alpha: float = 0.5,
        temperature: float = 1.0,
        scale_by_temperature: bool = False,
        target_type: str = "logits",
        ignore_index: int = -100,
        reduction: str = "mean",
        dim: int = -1,
        divergence_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if divergence not in FUNCTIONS:
            names = ", ".join(map(repr, FUNCTIONS))
            raise ValueError(f"divergence must be one of {names}, got {divergence!r}")
        _check.check_target_type(target_type)
        _check.check_reduction(reduction)
        self.divergence = divergence
        self.alpha = _check.check_share(alpha, "alpha")
        self.temperature = _check.check_positive(temperature, "temperature")
        self.scale_by_temperature = scale_by_temperature
        self.target_type = target_type
        self.ignore_index = _check.check_ignored(ignore_index)
        self.reduction = reduction
        self.dim = dim
        self.divergence_options = dict(divergence_options or {})

    @recordable
    def forward(
        self, input: Tensor, target: Tensor, labels: Tensor, token_weight: Tensor | None = None
    ) -> Tensor:
        _check.check_logits(input)
        dim = _check.class_dim(input, self.dim)
        y = _check.labels(input, dim, labels, "labels", self.ignore_index)
        parts = []
        if self.alpha < 1:
            hard = cross_entropy(
                input,
                labels,
                dim=dim,
                ignore_index=self.ignore_index,
                reduction=self.reduction,
                token_weight=token_weight,
            )
            parts.append(times(hard, 1 - term(self.alpha)))
        elif _check.values_may_be_read(y):  # no kernel of the cross entropy does
            _check.check_labels(y, input.shape[dim], "labels", self.ignore_index)
        if self.alpha > 0:
            counts: Tensor = labels != self.ignore_index
            soft = FUNCTIONS[self.divergence](
                input,
                target,
                target_type=self.target_type,
                dim=dim,
                reduction=self.reduction,
                temperature=self.temperature,
                token_weight=counts
                if token_weight is None
                else torch.where(counts, token_weight, 0),
                **self.divergence_options,
            )
            weight = term(self.alpha)
            if self.scale_by_temperature:
                weight = weight * term(self.temperature) ** 2
            parts.append(times(soft, weight))
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def extra_repr(self) -> str:
        options = "".join(f", {name}={v!r}" for name, v in self.divergence_options.items())
        return (
            f"{self.divergence!r}, alpha={self.alpha}, temperature={self.temperature}, "
            f"scale_by_temperature={self.scale_by_temperature}, target_type={self.target_type!r}, "
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, dim={self.dim}"
        ) + options
