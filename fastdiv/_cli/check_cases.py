"""The cases of ``python -m fastdiv check``: losses with every kind of target, and their inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import fastdiv

from .. import reference
from .._engine.arguments import FLOATS, TARGET_TYPES
from .._engine.autograd import row_loss

RowLoss = Callable[[Tensor, Any], Tensor]  # (logits, target), where there is a target

# Less than a vector; more than a tile; more than a segment; the vocabulary of GPT-2.
SHAPES = ((3, 7), (5, 1021), (2, 8193), (1, 50257))


@dataclass(frozen=True)
class CheckedLoss:
    """A public function of logits and target that returns a value per row."""

    name: str
    target: str
    rows: RowLoss


@dataclass(frozen=True)
class Combination:
    """A loss with a dtype and a shape of its inputs."""

    loss: CheckedLoss
    dtype: torch.dtype
    shape: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.loss.name} {self.loss.target} {self.dtype_name}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def combinations(names: Sequence[str], quick: bool) -> list[Combination]:
    """Return the losses of these names, or all losses, with every dtype and shape."""
    return [
        Combination(loss, dtype, shape)
        for loss in checked_losses(names)
        for dtype in FLOATS
        for shape in (SHAPES[:2] if quick else SHAPES)
    ]


def checked_losses(names: Sequence[str] = ()) -> list[CheckedLoss]:
    """Return all public losses with all kinds of targets; the reference lists the divergences."""
    cross_entropy = partial(fastdiv.cross_entropy, reduction="none")
    smoothed = partial(cross_entropy, label_smoothing=0.1, z_loss=1e-3)

    def topk(x: Tensor, t: Tensor, **options: Any) -> Tensor:
        values, indices = t.topk(min(64, t.shape[-1] - 1))
        return fastdiv.topk_kl_div(x, values, indices, reduction="none", **options)

    uniform = partial(topk, values_type="probs", missing="uniform")

    def log_prob_and_entropy(x: Tensor, y: Tensor) -> Tensor:
        return torch.stack(fastdiv.log_prob_and_entropy(x, y))

    losses = [
        CheckedLoss("cross_entropy", "labels", cross_entropy),
        CheckedLoss("cross_entropy", "labels, smoothed", smoothed),
        CheckedLoss("cross_entropy", "probs", cross_entropy),
        CheckedLoss("entropy", "none", lambda x, _: fastdiv.entropy(x)),
        CheckedLoss("log_prob", "labels", fastdiv.log_prob),
        CheckedLoss("log_prob_and_entropy", "labels", log_prob_and_entropy),
        *(
            CheckedLoss(name, target_type, _divergence(name, target_type))
            for name in reference.DIVERGENCES
            for target_type in TARGET_TYPES
        ),
        *(CheckedLoss("topk_kl_div", v, partial(topk, values_type=v)) for v in TARGET_TYPES),
        CheckedLoss("topk_kl_div", "probs, uniform", uniform),
        CheckedLoss("linear_cross_entropy", "labels", _of_layer(fastdiv.linear_cross_entropy)),
        CheckedLoss("linear_cross_entropy", "probs", _of_layer(fastdiv.linear_cross_entropy)),
        CheckedLoss("linear_log_prob_and_entropy", "labels", _of_layer(_linear_policy)),
        *(
            CheckedLoss(
                name,
                target_type,
                _of_layer(partial(getattr(fastdiv, name), target_type=target_type)),
            )
            for name in ("linear_kl_div", "linear_reverse_kl_div", "linear_js_div")
            for target_type in TARGET_TYPES
        ),
    ]
    return [loss for loss in losses if not names or loss.name in names]


def _of_layer(function: Callable[..., Tensor]) -> RowLoss:
    """Turn a linear loss into one of logits: with unit vectors the weight holds the logits."""

    def rows(x: Tensor, t: Tensor) -> Tensor:
        x = x.where(x.isfinite(), -60.0)  # 0 times infinity would be NaN
        hidden = torch.eye(x.shape[0], dtype=x.dtype, device=x.device)
        return function(hidden, x.t(), t, reduction="none")

    return rows


def _linear_policy(hidden: Tensor, weight: Tensor, y: Tensor, reduction: str) -> Tensor:
    return torch.stack(fastdiv.linear_log_prob_and_entropy(hidden, weight, y))


def _divergence(name: str, target_type: str) -> RowLoss:
    function = getattr(fastdiv, name, None)
    if function is None:  # reached through an option of another function
        spec = reference.Spec(name, target_type=target_type, param=0.5)
        return lambda x, t: row_loss(spec, x, t)
    options = {
        p.name: 0.5  # for alpha, beta and skew: not the limit of another divergence
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.default is p.empty and p.name != "target_type"
    }
    return partial(function, target_type=target_type, reduction="none", **options)


@cache
def _logits(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Make logits whose first rows have classes at -inf on both sides, on one, on the other."""
    generator = torch.Generator().manual_seed(shape[1])
    x, t = torch.randn(2, *shape, generator=generator, dtype=torch.float64) * 3
    x[:1, -3:] = t[:1, -3:] = -torch.inf
    x[1:2, 2] = t[2:3, 4] = -torch.inf
    return x, t


def make_inputs(combination: Combination) -> tuple[Tensor, Tensor | None]:
    """Make logits and target."""
    x, t = (v.to(combination.dtype) for v in _logits(combination.shape))
    target = combination.loss.target
    if target == "none":
        return x, None
    if target.startswith("labels"):
        y = t.argmax(-1)
        y[1:2] = 2  # at -inf
        return x, y
    if target == "logits":
        return x, t
    log_p = t.double().log_softmax(-1)
    return x, (log_p if target == "log_probs" else log_p.exp()).to(combination.dtype)
