"""The modules of log-probabilities of a linear layer's logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._linear.log_prob import linear_log_prob, linear_log_prob_and_entropy
from .._losses.entropy import log_prob, log_prob_and_entropy
from .linear import LinearModule


class _OfClasses(LinearModule):
    """A function of hidden states and the indices of classes."""

    def forward(self, input: Tensor, index: Tensor, class_mask: Tensor | None = None) -> Any:
        """Compute the log-probabilities of classes from these hidden states."""

        def of_layer(input: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
            options = {"class_mask": class_mask, **self._options_of_layer}
            return self.function(input, weight, index, linear_bias=bias, **options)

        def of_logits(logits: Tensor) -> Any:
            return self.of_logits(logits, index, class_mask=class_mask, **self.options_of_logits)

        return self.loss_of(input, of_layer, of_logits)


class LinearLogProb(_OfClasses):
    """Log-probabilities of the logits of a linear layer, as a module.

    It holds the layer, ``linear``, and calls :func:`fastdiv.linear_log_prob`, which has the formula
    and lists the errors.

    Args:
        in_features: Size :math:`H` of the hidden states.
        num_classes: Number :math:`C` of classes.
        bias: Whether the layer has a bias.
        device: Device of the layer.
        dtype: Dtype of the layer.
        temperature: :math:`T`, which divides the logits.  A tensor holds one number, or one for
            each row; it is learnt if it is a ``Parameter``.
        softcap: Replace the logits by ``softcap * tanh(x / softcap)`` first; None for no cap.
        logits_dtype: ``torch.float32`` keeps logits of layers in half precision as the float32 sums
            that they are.  Their gradient is rounded only for the products that follow.  None
            rounds logits to the dtype of the layer, where the device multiplies in it.
        chunk_size: Rows whose logits are held at a time; by default 256, or as many as take a tenth
            of the memory of all logits if those are more.

    Shape:
        * ``input``: hidden states, shape ``(..., in_features)``; float32, bfloat16, float16 or
          float64.
        * ``index``: class indices (int64, int32, int16, uint8), shape ``(...)``, or k in each row,
          shape ``(..., k)``; -1 is padding.
        * ``class_mask``: the classes that take part, as in the function; optional.
        * Result: log-probabilities of the shape of ``index``.

    Example:
        >>> import torch, fastdiv
        >>> log_prob = fastdiv.nn.LinearLogProb(2, 4)
        >>> log_prob(torch.zeros(1, 2), torch.tensor([[2, 0, -1]])).detach()
        tensor([[-1.3863, -1.3863,  0.0000]])

    Source: :func:`fastdiv.linear_log_prob`.
    """

    function = staticmethod(linear_log_prob)
    of_logits = staticmethod(log_prob)


class LinearLogProbAndEntropy(_OfClasses):
    """Log-probability and entropy of the logits of a linear layer, as a module.

    It holds the layer, ``linear``, and calls :func:`fastdiv.linear_log_prob_and_entropy`, which has
    the formula and lists the errors.

    Args:
        in_features: Size :math:`H` of the hidden states.
        num_classes: Number :math:`C` of classes.
        bias: Whether the layer has a bias.
        device: Device of the layer.
        dtype: Dtype of the layer.
        temperature: :math:`T`, which divides the logits.  A tensor holds one number, or one for
            each row; it is learnt if it is a ``Parameter``.
        softcap: Replace the logits by ``softcap * tanh(x / softcap)`` first; None for no cap.
        logits_dtype: ``torch.float32`` keeps logits of layers in half precision as the float32 sums
            that they are.  Their gradient is rounded only for the products that follow.  None
            rounds logits to the dtype of the layer, where the device multiplies in it.
        chunk_size: Rows whose logits are held at a time; by default 256, or as many as take a tenth
            of the memory of all logits if those are more.

    Shape:
        * ``input``: hidden states, shape ``(..., in_features)``; float32, bfloat16, float16 or
          float64.
        * ``index``: class indices (int64, int32, uint8), shape ``(...)``; -1 is padding.
        * ``class_mask``: the classes that take part, as in the function; optional.
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
