"""The module of distillation: cross entropy with labels, and a divergence from a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from .._engine import arguments
from .._engine.recording import recordable
from .._engine.symbolic import term, times
from .._losses.cross_entropy import cross_entropy
from ..reference.choices import Divergence, Reduction, TargetType, check_choice
from .divergence import FUNCTIONS

DIVERGENCES = get_args(Divergence)


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
        divergence: Divergence = "kl_div",
        *,
        alpha: float = 0.5,
        temperature: float = 1.0,
        scale_by_temperature: bool = False,
        target_type: TargetType = "logits",
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        dim: int = -1,
        divergence_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_choice(divergence, DIVERGENCES, "divergence")
        arguments.check_target_type(target_type)
        arguments.check_reduction(reduction)
        self.divergence = divergence
        self.alpha = arguments.check_share(alpha, "alpha")
        self.temperature = arguments.check_positive(temperature, "temperature")
        self.scale_by_temperature = scale_by_temperature
        self.target_type = target_type
        self.ignore_index = arguments.check_ignored(ignore_index)
        self.reduction = reduction
        self.dim = dim
        self.divergence_options = dict(divergence_options or {})

    @recordable
    def forward(
        self, input: Tensor, target: Tensor, labels: Tensor, token_weight: Tensor | None = None
    ) -> Tensor:
        arguments.check_logits(input)
        dim = arguments.class_dim(input, self.dim)
        y = arguments.labels(input, dim, labels, "labels", self.ignore_index)
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
        elif arguments.values_may_be_read(y):  # no kernel of the cross entropy does
            arguments.check_labels(y, input.shape[dim], "labels", self.ignore_index)
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
