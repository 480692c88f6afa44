"""Modules of divergences share their options here, and find the functions by their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._engine.symbolic import term, times
from .._losses import alpha, distance, divergence
from ..reference.choices import Divergence, DivergenceReduction, TargetType

FUNCTIONS: dict[Divergence, Callable[..., Tensor]] = {
    "kl_div": divergence.kl_div,
    "reverse_kl_div": divergence.reverse_kl_div,
    "js_div": divergence.js_div,
    "skew_kl_div": divergence.skew_kl_div,
    "alpha_div": alpha.alpha_div,
    "renyi_div": alpha.renyi_div,
    "tv_distance": distance.tv_distance,
    "hellinger_distance": distance.hellinger_distance,
}


def squared(temperature: float | Tensor, value: Tensor, reduction: str) -> float | Tensor:
    """Return the square of the temperature, as a factor of this value."""
    if not isinstance(temperature, Tensor):
        squared: float | Tensor = term(temperature) ** 2
        return squared
    if temperature.numel() == 1:
        temperature = temperature.reshape(())
    elif reduction != "none":
        raise ValueError(
            "scale_by_temperature=True with a temperature for each row needs reduction='none', got "
            f"{reduction!r}"
        )
    return temperature.to(value.device, torch.float64) ** 2


def as_text(value: object) -> str:
    """Return an option as text; of a tensor, the shape."""
    if isinstance(value, Tensor):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    return repr(value)


class RowModule(nn.Module):
    """The options of every divergence; ``shown`` names those of its function, in order."""

    shown: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        dim: int,
        reduction: DivergenceReduction,
        temperature: float | Tensor,
        scale_by_temperature: bool,
        inplace_backward: bool,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.reduction = reduction
        self.temperature = temperature
        self.scale_by_temperature = scale_by_temperature
        self.inplace_backward = inplace_backward

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.shown}

    def _scaled(self, value: Tensor) -> Tensor:
        if not self.scale_by_temperature:
            return value
        return times(value, squared(self.temperature, value, self.reduction))

    def extra_repr(self) -> str:
        """Return the options as text."""
        shown = {**self._options(), "scale_by_temperature": self.scale_by_temperature}
        return ", ".join(f"{name}={as_text(value)}" for name, value in shown.items())


class DivergenceModule(RowModule):
    """A divergence whose target has the shape of the logits."""

    function: ClassVar[Divergence]
    shown: ClassVar[tuple[str, ...]] = (
        "target_type",
        "dim",
        "reduction",
        "temperature",
        "inplace_backward",
    )

    def __init__(
        self,
        *,
        target_type: TargetType,
        dim: int = -1,
        reduction: DivergenceReduction = "batchmean",
        temperature: float | Tensor = 1.0,
        scale_by_temperature: bool = False,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(dim, reduction, temperature, scale_by_temperature, inplace_backward)
        self.target_type = target_type

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        token_weight: Tensor | None = None,
        class_mask: Tensor | None = None,
    ) -> Tensor:
        """Compute the divergence of these logits from the target."""
        value = FUNCTIONS[self.function](
            input, target, token_weight=token_weight, class_mask=class_mask, **self._options()
        )
        return self._scaled(value)
