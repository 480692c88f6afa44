"""The linear losses as modules that hold their layer, ``linear``, a ``torch.nn.Linear``.

To share its weight with an embedding, assign ``loss.linear.weight = embedding.weight``.  The layer
is called like any other, so hooks and parametrisations of it keep working (see ``layer``).
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor, nn

from .._linear.cross_entropy import linear_cross_entropy, linear_log_prob_and_entropy
from .._losses.cross_entropy import cross_entropy
from .._losses.entropy import log_prob_and_entropy
from ..reference import Stats
from ..reference.choices import Accumulate, Reduction, Smoothing
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
    accumulate: Accumulate | None


class LinearModule(nn.Module):
    """A linear layer, and the options of its loss."""

    function: ClassVar[Callable[..., Any]]
    of_logits: ClassVar[Callable[..., Any]]  # the same loss of logits, where they must be computed

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
        """The options without those that set how many logits are held."""
        of_tiles = ("chunk_size", "accumulate", "options")
        return {k: v for k, v in self.options.items() if k not in of_tiles}

    def extra_repr(self) -> str:
        """Return the options as text."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class LinearCrossEntropyLoss(LinearModule):
    r"""Cross entropy of the logits of a linear layer, as a module.

    It holds the layer, ``linear``, and calls :func:`fastdiv.linear_cross_entropy`, which has the
    formula and lists the errors.  It is a drop-in for ``torch.nn.LinearCrossEntropyLoss``,
    parameters included.

    Args:
        in_features: Size :math:`H` of the hidden states.
        num_classes: Number :math:`C` of classes.
        out_features: Sizes of further dimensions of the logits, as in torch.  With them all logits
            are held.
        bias: Whether the layer has a bias.
        device: Device of the layer.
        dtype: Dtype of the layer.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight`` and the class weight of the label; NaN if no row counts) or
            ``"batchmean"`` (sum / ``input.size(0)``).
        weight: Weights of the classes, shape ``(C,)``, kept as a buffer; 1 by default.
        ignore_index: Rows with this label do not count: their loss and gradient are 0, whatever
            they hold.  On a CPU their logits are not computed.  None means -100.
        label_smoothing: :math:`\varepsilon` in [0, 1].
        options: ``torch.nn.LinearCrossEntropyOptions``, of which only ``batch_chunk_size`` is used,
            if ``chunk_size`` is None.
        smoothing: ``"all"`` spreads :math:`\varepsilon` over all classes, ``"others"`` over all but
            the label.
        temperature: :math:`T`, which divides the logits.
        softcap: Replace the logits by ``softcap * tanh(x / softcap)`` first; None for no cap.
        z_loss: :math:`z`, the factor of the squared log-sum-exp.
        return_stats: Also return :class:`fastdiv.Stats`: ``lse``, ``entropy``, ``argmax`` and
            ``log_prob`` of every row, without gradient.  ``log_prob`` is that of the label (0 where
            the row does not count), or :math:`\sum_c p_c \log q_c` for probabilities.
        chunk_size: Rows whose logits are held at a time; by default 256, or as many as take a tenth
            of the memory of all logits if those are more.
        accumulate: Which gradient is summed over the tiles.  ``"weight"`` takes chunks of rows and
            three matrix products, for any reduction but ``"none"``.  In half precision it holds a
            float32 sum of the weight's size, :math:`4 C H` bytes, until the backward.  ``"rows"``
            takes blocks of classes and four products, without that sum.  None takes ``"weight"``
            where it needs no such sum, or one of at most 1/24 of all logits and 32 MB (256 MB
            on a GPU); else ``"rows"``.

    Shape:
        * ``input``: hidden states, shape ``(..., in_features)``; float32, bfloat16, float16 or
          float64.
        * ``target``: class indices (int64, int32, uint8), shape ``(...)``, or probabilities
          (floating), shape ``(..., num_classes)``.
        * ``token_weight``: weights of the rows, shape ``(...)``; optional.
        * Result: a scalar, or with ``reduction="none"`` one value per row; with ``return_stats`` a
          pair of it and the statistics.

    Example:
        >>> import torch, fastdiv
        >>> loss = fastdiv.nn.LinearCrossEntropyLoss(2, 4, label_smoothing=0.1)
        >>> loss(torch.zeros(3, 2), torch.tensor([0, 3, 1])).detach()
        tensor(1.3863)

    Source: :func:`fastdiv.linear_cross_entropy`, ``torch.nn.LinearCrossEntropyLoss``.
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
        """Compute the loss of these hidden states."""
        weights: dict[str, Any] = {"weight": self.weight, "token_weight": token_weight}

        def of_layer(input: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
            if len(self.shape) > 1:
                weight = weight.unflatten(0, self.shape)
                bias = None if bias is None else bias.unflatten(0, self.shape)
            return self.function(input, weight, target, linear_bias=bias, **weights, **self.options)

        def of_logits(logits: Tensor) -> Any:
            options = self.options_of_logits
            if options.get("ignore_index", 0) is None:  # which linear_cross_entropy takes for -100
                del options["ignore_index"]
            logits = logits.unflatten(-1, self.shape)
            return self.of_logits(logits, target, dim=input.dim() - 1, **weights, **options)

        return loss_through(self.linear, input, of_layer, of_logits)


class LinearLogProbAndEntropy(LinearModule):
    """Log-probability and entropy of the logits of a linear layer, as a module.

    It holds the layer, ``linear``, and calls :func:`fastdiv.linear_log_prob_and_entropy`, which has
    the formula and lists the errors.

    Args:
        in_features: Size :math:`H` of the hidden states.
        num_classes: Number :math:`C` of classes.
        bias: Whether the layer has a bias.
        device: Device of the layer.
        dtype: Dtype of the layer.
        temperature: :math:`T`, which divides the logits.
        chunk_size: Rows whose logits are held at a time; by default 256, or as many as take a tenth
            of the memory of all logits if those are more.

    Shape:
        * ``input``: hidden states, shape ``(..., in_features)``; float32, bfloat16, float16 or
          float64.
        * ``index``: class indices (int64, int32, uint8), shape ``(...)``.
        * Result: ``(log_prob, entropy)``, shape ``(...)`` each.

    Example:
        >>> import torch, fastdiv
        >>> both = fastdiv.nn.LinearLogProbAndEntropy(2, 4)
        >>> [v.item() for v in both(torch.zeros(1, 2), torch.tensor([2]))]
        [-1.3863, 1.3863]

    Source: :func:`fastdiv.linear_log_prob_and_entropy`.
    """

    function = staticmethod(linear_log_prob_and_entropy)
    of_logits = staticmethod(log_prob_and_entropy)

    def forward(self, input: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the log-probabilities and entropies of these hidden states."""

        def of_layer(input: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
            return self.function(input, weight, index, linear_bias=bias, **self.options)

        def of_logits(logits: Tensor) -> Any:
            return self.of_logits(logits, index, **self.options_of_logits)

        return loss_through(self.linear, input, of_layer, of_logits)
