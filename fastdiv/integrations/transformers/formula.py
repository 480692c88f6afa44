"""The formula that computes the logits of a training step from its hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._linear.cross_entropy import linear_cross_entropy
from ..._linear.dtypes import whole_logits


@dataclass(frozen=True)
class Formula:
    r"""A formula for logits from tensors :math:`h_1, W_1, h_2, W_2, \dots` and perhaps a last bias.

    The logits are :math:`s\,x` or :math:`g \tanh(s\,x)` of :math:`x = \sum_i h_i W_i^\top + b`.
    """

    dtype: torch.dtype
    scale: float = 1.0
    gain: float | None = None
    logits_dtype: torch.dtype | None = None  # as linear_cross_entropy has it

    def logits(self, *tensors: Tensor) -> Tensor:
        """Compute the logits of these hidden states, weights and bias."""
        layers, bias = _layers(tensors)
        (first, weight), *others = layers
        bias = None if bias is None else bias.to(first.dtype)
        x = whole_logits(first, weight, bias, self.logits_dtype)
        for hidden, weight in others:
            x = x + whole_logits(hidden, weight, None, self.logits_dtype)
        if self.scale != 1:
            x = x * self.scale
        if self.gain is not None:
            x = x.tanh() * self.gain
        return x.to(self.dtype)

    def cross_entropy(self, tensors: tuple[Tensor, ...], target: Tensor, **options: Any) -> Tensor:
        """Compute their cross entropy without holding them."""
        hidden, weight, bias = one_product(tensors)
        cap = None if self.gain is None else 1 / self.scale
        temperature = 1 / (self.scale if self.gain is None else self.scale * self.gain)
        return linear_cross_entropy(
            hidden,
            weight,
            target,
            linear_bias=bias,
            softcap=cap,
            temperature=temperature,
            logits_dtype=self.logits_dtype,
            **options,
        )


def one_product(tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return hidden states, weight and bias of one layer that computes the sum of these layers."""
    layers, bias = _layers(tensors)
    (hidden, weight), *others = layers
    if others:
        hidden, weight = (torch.cat(parts, -1) for parts in zip(*layers, strict=True))
    return hidden, weight, None if bias is None else bias.to(hidden.dtype)


def _layers(tensors: tuple[Tensor, ...]) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
    pairs = list(zip(tensors[0::2], tensors[1::2], strict=False))
    return pairs, tensors[-1] if len(tensors) % 2 else None
