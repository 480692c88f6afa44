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
from ..reference.choices import KLMissing

RowLoss = Callable[..., Tensor]  # of logits and target, where there is a target

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

    def topk(name: str, kind: str, missing: KLMissing) -> CheckedLoss:
        function = getattr(fastdiv, name)
        options = {"values_type": kind, "missing": missing, "reduction": "none"}

        def best(t: Tensor) -> tuple[Tensor, Tensor]:
            return t.topk(min(64, t.shape[-1] // 2))

        def rows(x: Tensor, t: Tensor) -> Tensor:
            return function(x, *best(t), **options)

        def of_layer(hidden: Tensor, weight: Tensor, t: Tensor, **_: Any) -> Tensor:
            return function(hidden, weight, *best(t), **options)

        of_rows = _of_layer(of_layer) if name.startswith("linear") else rows
        return CheckedLoss(name, f"{kind}, {missing}", of_rows)

    def log_prob_and_entropy(x: Tensor, y: Tensor) -> Tensor:
        return torch.stack(fastdiv.log_prob_and_entropy(x, y))

    of_topk = ["topk_kl_div", "topk_reverse_kl_div", "topk_js_div"]
    of_topk += ["linear_topk_kl_div", "linear_topk_reverse_kl_div"]
    losses = [
        CheckedLoss("cross_entropy", "labels", cross_entropy),
        CheckedLoss("cross_entropy", "labels, smoothed", smoothed),
        CheckedLoss("cross_entropy", "labels, masked", _masked(cross_entropy)),
        CheckedLoss("cross_entropy", "labels, temperatures", _by_temperatures(smoothed)),
        CheckedLoss(
            "cross_entropy", "labels, weighted", partial(smoothed, token_weight="probability")
        ),
        CheckedLoss("cross_entropy", "probs", cross_entropy),
        CheckedLoss("entropy", "none", lambda x, _: fastdiv.entropy(x)),
        CheckedLoss("log_prob", "labels", fastdiv.log_prob),
        CheckedLoss("log_prob", "labels, k", lambda x, y: fastdiv.log_prob(x, _several(y))),
        CheckedLoss("log_prob_and_entropy", "labels", log_prob_and_entropy),
        *(
            CheckedLoss(name, target_type, _divergence(name, target_type))
            for name in reference.DIVERGENCES
            for target_type in TARGET_TYPES
        ),
        CheckedLoss("kl_div", "logits, masked", _masked(_divergence("kl_div", "logits"))),
        CheckedLoss(
            "js_div", "logits, temperatures", _by_temperatures(_divergence("js_div", "logits"))
        ),
        *(topk("topk_kl_div", v, "ignore") for v in TARGET_TYPES),
        topk("topk_kl_div", "probs", "uniform"),
        *(topk(name, "log_probs", "tail") for name in of_topk),
        *(topk(name, "probs", "renormalize") for name in of_topk),
        CheckedLoss("linear_cross_entropy", "labels", _of_layer(fastdiv.linear_cross_entropy)),
        CheckedLoss("linear_cross_entropy", "probs", _of_layer(fastdiv.linear_cross_entropy)),
        CheckedLoss("linear_log_prob", "labels", _of_layer(_linear_log_prob)),
        CheckedLoss("linear_log_prob", "labels, k", _of_layer(_linear_log_probs)),
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


def _masked(loss: RowLoss) -> RowLoss:
    """Mask every third class, in bits for an even number of rows."""

    def rows(x: Tensor, t: Tensor) -> Tensor:
        classes = torch.arange(x.shape[-1], device=x.device)
        mask = classes % 3 != torch.arange(x.shape[0], device=x.device).unsqueeze(-1) % 3
        if x.shape[0] % 2 == 0:
            padded = torch.nn.functional.pad(mask, (0, -x.shape[-1] % 8)).unflatten(-1, (-1, 8))
            powers = 2 ** torch.arange(8, device=x.device)
            mask = (padded * powers).sum(-1).to(torch.uint8)
        return loss(x, t, class_mask=mask)

    return rows


def _by_temperatures(loss: RowLoss) -> RowLoss:
    def rows(x: Tensor, t: Tensor) -> Tensor:
        # A colder row has larger logits, whose rounding its exponentials would magnify.
        temperature = torch.linspace(1, 2, x.shape[0], device=x.device)
        return loss(x, t, temperature=temperature)

    return rows


def _of_layer(function: Callable[..., Tensor]) -> RowLoss:
    """Turn a linear loss into one of logits: with unit vectors the weight holds the logits."""

    def rows(x: Tensor, t: Tensor) -> Tensor:
        x = x.where(x.isfinite(), -60.0)  # 0 times infinity would be NaN
        hidden = torch.eye(x.shape[0], dtype=x.dtype, device=x.device)
        return function(hidden, x.t(), t, reduction="none")

    return rows


def _several(y: Tensor) -> Tensor:
    """Make three indices of each label: itself, class 0 and padding."""
    return torch.stack([y, torch.zeros_like(y), torch.full_like(y, -1)], -1)


def _linear_log_prob(hidden: Tensor, weight: Tensor, y: Tensor, reduction: str) -> Tensor:
    return fastdiv.linear_log_prob(hidden, weight, y)


def _linear_log_probs(hidden: Tensor, weight: Tensor, y: Tensor, reduction: str) -> Tensor:
    return fastdiv.linear_log_prob(hidden, weight, _several(y))


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
    kind = target.partition(",")[0]
    if kind == "logits":
        return x, t
    log_p = t.double().log_softmax(-1)
    return x, (log_p if kind == "log_probs" else log_p.exp()).to(combination.dtype)
