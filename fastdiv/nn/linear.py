"""The linear losses as modules that hold their layer, ``linear``, a ``torch.nn.Linear``.

To share its weight with an embedding, assign ``loss.linear.weight = embedding.weight``.  The layer
is called like any other, so hooks and parametrisations of it keep working (see ``layer``).
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypedDict, TypeVar

import torch
from torch import Tensor, nn

from .._linear.cross_entropy import linear_cross_entropy
from .._linear.several import apart, check_lists, check_shared, joined
from .._losses.cross_entropy import cross_entropy
from ..reference.choices import Accumulate, Reduction, Smoothing, TokenWeight
from .base import as_text
from .layer import OfLayer, OfLogits, loss_through

if sys.version_info >= (3, 11):
    from typing import Unpack
else:
    from typing_extensions import Unpack  # which torch brings along


T = TypeVar("T")


class CrossEntropyOptions(TypedDict, total=False):
    """What :class:`LinearCrossEntropyLoss` passes on to its function."""

    ignore_index: int | None
    label_smoothing: float
    options: Any
    smoothing: Smoothing
    temperature: float | Tensor
    softcap: float | None
    z_loss: float
    return_stats: bool
    chunk_size: int | None
    accumulate: Accumulate | None
    logits_dtype: torch.dtype | None


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
        if isinstance(options.get("temperature"), nn.Parameter):
            self.temperature = options.pop("temperature")  # torch registers it, to be learnt
        self.options = options

    @property
    def _options_of_layer(self) -> dict[str, Any]:
        """The options, with a temperature that is learnt."""
        learnt = self._parameters.get("temperature")
        return self.options if learnt is None else {**self.options, "temperature": learnt}

    @property
    def options_of_logits(self) -> dict[str, Any]:
        """The options without those that set which logits are held, and how."""
        of_tiles = ("chunk_size", "accumulate", "logits_dtype", "options")
        return {k: v for k, v in self._options_of_layer.items() if k not in of_tiles}

    def loss_of(self, input: Tensor, of_layer: OfLayer[T], of_logits: OfLogits[T]) -> T:
        """Compute the loss of these hidden states through the layer."""
        dtype = self.options.get("logits_dtype")
        return loss_through(self.linear, input, of_layer, of_logits, dtype)

    def extra_repr(self) -> str:
        """Return the options as text."""
        shown = self._options_of_layer.items()
        return ", ".join(f"{name}={as_text(value)}" for name, value in shown)


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
        token_weight: ``"probability"`` weights a row by the probability of its label, where a call
            gives no weights.
        ignore_index: Rows with this label do not count: their loss and gradient are 0, whatever
            they hold.  On a CPU their logits are not computed.  None means -100.
        label_smoothing: :math:`\varepsilon` in [0, 1].
        options: ``torch.nn.LinearCrossEntropyOptions``, of which only ``batch_chunk_size`` is used,
            if ``chunk_size`` is None.
        smoothing: ``"all"`` spreads :math:`\varepsilon` over all classes, ``"others"`` over all but
            the label.
        temperature: :math:`T`, which divides the logits.  A tensor holds one number, or one for
            each row; it is learnt if it is a ``Parameter``.
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
        logits_dtype: ``torch.float32`` keeps logits of layers in half precision as the float32 sums
            that they are.  Their gradient is rounded only for the products that follow.  None
            rounds logits to the dtype of the layer, where the device multiplies in it.

    Shape:
        * ``input``: hidden states, shape ``(..., in_features)``; float32, bfloat16, float16 or
          float64.
        * ``target``: class indices (int64, int32, uint8), shape ``(...)``, or probabilities
          (floating), shape ``(..., num_classes)``.
        * ``token_weight``: weights of the rows, shape ``(...)``, or ``"probability"``; optional.
        * ``class_mask``: the classes that take part, as in the function; optional.
        * Result: a scalar, or with ``reduction="none"`` one value per row; with ``return_stats`` a
          pair of it and the statistics.
        * With lists or tuples of the first three, the result is a tuple, of the loss of each input.

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
        token_weight: TokenWeight | None = None,
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
        self.token_weight = token_weight

    def forward(
        self,
        input: Tensor | Sequence[Tensor],
        target: Tensor | Sequence[Tensor],
        token_weight: Tensor | Sequence[Tensor] | TokenWeight | None = None,
        class_mask: Tensor | None = None,
    ) -> Tensor | tuple[Any, ...]:
        """Compute the loss of these hidden states, or of each in a list."""
        rows: Any = self.token_weight if token_weight is None else token_weight
        of_call: dict[str, Any] = {"weight": self.weight, "class_mask": class_mask}
        several = None if isinstance(input, Tensor) else input
        if several is not None:
            check_lists(several, target, rows)
            check_shared(self._options_of_layer.get("temperature"), class_mask)

        def of_layer(input: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
            given: Any = input if several is None else apart(input, several)
            if len(self.shape) > 1:
                weight = weight.unflatten(0, self.shape)
                bias = None if bias is None else bias.unflatten(0, self.shape)
            tensors = {"linear_bias": bias, "token_weight": rows, **of_call}
            labels: Any = target
            return self.function(given, weight, labels, **tensors, **self._options_of_layer)

        def of_logits(logits: Tensor) -> Any:
            options = self.options_of_logits
            if options.get("ignore_index", 0) is None:  # which linear_cross_entropy takes for -100
                del options["ignore_index"]

            def one(logits: Tensor, target: Any, token_weight: Any) -> Any:
                dim, tensors = logits.dim() - 1, {"token_weight": token_weight, **of_call}
                logits = logits.unflatten(-1, self.shape)
                return self.of_logits(logits, target, dim=dim, **tensors, **options)

            if several is None:
                return one(logits, target, rows)
            shared = rows is None or isinstance(rows, str)
            weights = [rows] * len(several) if shared else rows
            return tuple(map(one, apart(logits, several), target, weights))

        hidden = input if isinstance(input, Tensor) else joined(input)
        return self.loss_of(hidden, of_layer, of_logits)

    def extra_repr(self) -> str:
        """Return the options as text."""
        of_rows = f"token_weight={self.token_weight!r}" if self.token_weight else ""
        return ", ".join(filter(None, (super().extra_repr(), of_rows)))
