"""The module of distillation."""

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
from .base import FUNCTIONS, as_text, squared

DIVERGENCES = get_args(Divergence)


class DistillationLoss(nn.Module):
    r"""Distillation: the cross entropy with labels plus a divergence from a teacher, as a module.

    .. math::
        \ell = (1 - \alpha)\, \mathrm{CE}(x, y)
        + \alpha\, T^2\, D\bigl(\mathrm{softmax}(t / T), \mathrm{softmax}(x / T)\bigr)

    The factor :math:`T^2` is there with ``scale_by_temperature`` only; the cross entropy has
    temperature 1.  Both parts are reduced alike, over the rows whose label is not ``ignore_index``.
    All other rows may hold anything, in student and teacher.  A part of weight 0 is not computed.
    There is no ``inplace_backward``, since both parts need the logits.

    Args:
        divergence: Name of the function :math:`D`: ``"kl_div"``, ``"reverse_kl_div"``,
            ``"js_div"``, ``"skew_kl_div"``, ``"alpha_div"``, ``"renyi_div"``, ``"tv_distance"`` or
            ``"hellinger_distance"``.
        alpha: :math:`\alpha` in [0, 1], the weight of the divergence.
        temperature: :math:`T` of student and teacher in the divergence.  A tensor holds one number,
            or one for each row; it is learnt if it is a ``Parameter``.
        scale_by_temperature: Multiply the divergence by :math:`T^2`, which keeps the size of its
            gradient about the same for all temperatures.  A temperature for each row needs
            ``reduction="none"``.
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``.
            Probabilities are used as they are, normalised or not.
        ignore_index: Rows with this label do not count: their loss and gradient are 0, whatever
            they hold.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``) or ``"batchmean"`` (sum / ``input.size(0)``).
        dim: Dimension of the classes.
        divergence_options: Other options of the divergence, such as ``{"beta": 0.1}`` for
            ``"js_div"``.

    Shape:
        * ``input``: the student's logits, of any shape and strides, with the classes on ``dim``;
          float32, bfloat16, float16 or float64.
        * ``target``: the teacher's rows, of the shape of ``input`` and any of its dtypes.  It gets
          a gradient if it requires one.
        * ``labels``: class indices (int64, int32, uint8) of the shape of ``input`` without ``dim``.
        * ``token_weight``: weights of the rows, of the shape of ``input`` without ``dim``;
          optional.
        * ``class_mask``: the classes that take part, as in the functions; optional.
        * Result: a scalar, or with ``reduction="none"`` one value per row, of the shape of
          ``input`` without ``dim``.

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
        temperature: float | Tensor = 1.0,
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
        if not isinstance(temperature, Tensor):  # each call checks one
            temperature = arguments.check_positive(temperature, "temperature")
        self.temperature = temperature
        self.scale_by_temperature = scale_by_temperature
        self.target_type = target_type
        self.ignore_index = arguments.check_ignored(ignore_index)
        self.reduction = reduction
        self.dim = dim
        self.divergence_options = dict(divergence_options or {})

    @recordable
    def forward(
        self,
        input: Tensor,
        target: Tensor,
        labels: Tensor,
        token_weight: Tensor | None = None,
        class_mask: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss of these logits."""
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
                class_mask=class_mask,
            )
            parts.append(times(hard, 1 - term(self.alpha)))
        elif arguments.values_may_be_read(y):  # without a cross entropy, no kernel checks them
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
                class_mask=class_mask,
                **self.divergence_options,
            )
            weight = term(self.alpha)
            if self.scale_by_temperature:
                weight = weight * squared(self.temperature, soft, self.reduction)
            parts.append(times(soft, weight))
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def extra_repr(self) -> str:
        """Return the options as text."""
        options = "".join(f", {name}={v!r}" for name, v in self.divergence_options.items())
        return (
            f"{self.divergence!r}, alpha={self.alpha}, temperature={as_text(self.temperature)}, "
            f"scale_by_temperature={self.scale_by_temperature}, target_type={self.target_type!r}, "
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, dim={self.dim}"
        ) + options
