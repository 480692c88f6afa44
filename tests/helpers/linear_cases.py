"""Linear losses with random tensors and options, and what they must equal: loss(linear(...))."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiv
from helpers.cases import rand, randn
from helpers.values import value_and_gradients

DIVERGENCES = ("kl_div", "reverse_kl_div", "js_div")
NAMES = ("cross_entropy", *DIVERGENCES, "log_prob_and_entropy")


@dataclass
class LinearCase:
    """A linear loss; ``leaves`` are its tensors that may have a gradient, by argument."""

    name: str  # of the row loss
    leaves: dict[str, Tensor]
    label: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        shapes = {k: tuple(v.shape) for k, v in self.leaves.items()}
        return f"linear_{self.name}({shapes}, {self.leaves['input'].dtype}, {self.options})"

    def call(self, leaves: Mapping[str, Tensor] | None = None, **options: Any) -> Tensor:
        """Our loss."""
        given = dict(leaves or self.leaves)
        second = self.label if self.label is not None else given.pop("target")
        arguments = (given.pop("input"), given.pop("linear_weight"), second)
        value = getattr(fastdiv, f"linear_{self.name}")(
            *arguments, **given, **{**self.options, **options}
        )
        return torch.stack(value) if isinstance(value, tuple) else value

    def unfused(self, leaves: Mapping[str, Tensor] | None = None, **options: Any) -> Tensor:
        """The row loss of logits that are held whole."""
        v = leaves or self.leaves
        options = {**self.options, **options}
        for of_tiles in ("chunk_size", "accumulate"):
            options.pop(of_tiles, None)
        x = F.linear(v["input"], v["linear_weight"], v.get("linear_bias"))
        second = v["target"] if self.label is None else self.label
        if "target_linear_weight" in v:
            second = F.linear(second, v["target_linear_weight"], v.get("target_linear_bias"))
            options["target_type"] = "logits"
        if self.name == "cross_entropy":
            options["dim"] = -1
        value = getattr(fastdiv, self.name)(x, second, **options)
        return torch.stack(value) if isinstance(value, tuple) else value

    def double(self) -> LinearCase:
        """The same numbers in float64."""
        options = {k: v.double() if isinstance(v, Tensor) else v for k, v in self.options.items()}
        leaves = {k: v.double() for k, v in self.leaves.items()}
        return LinearCase(self.name, leaves, self.label, options)

    def truth(self, upstream: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Value and gradients by the reference in float64."""
        case = self.double()
        with fastdiv.backend("reference"):
            return named_gradients(case.unfused, case.leaves, upstream)


def named_gradients(
    function: Any, leaves: Mapping[str, Tensor], upstream: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the value of a function of named tensors, and the gradient of each by its name.

    The upstream gradient goes from 1 to 2 if none is given.
    """

    def upstream_of(value: Tensor) -> Tensor:
        given = torch.linspace(1, 2, value.numel()) if upstream is None else upstream
        return given.to(value).view_as(value)

    value, *found = value_and_gradients(
        lambda *tensors: function(dict(zip(leaves, tensors, strict=True))),
        *leaves.values(),
        upstream=upstream_of,
    )
    return value, dict(zip(leaves, found, strict=True))


def make_case(
    name: str = "cross_entropy",
    rows: tuple[int, ...] = (37,),
    hidden: int = 8,
    classes: int = 300,
    dtype: torch.dtype = torch.float32,
    target: str = "labels",
    bias: bool = True,
    teacher_hidden: int = 5,
    seed: int = 0,
    **options: Any,
) -> LinearCase:
    """Random tensors; ``target`` is "labels", "probs", "logits", "log_probs" or "hidden"."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    leaves = {
        "input": random(*rows, hidden),
        "linear_weight": random(classes, hidden, scale=2 * hidden**-0.5),
    }
    if bias:
        leaves["linear_bias"] = random(classes)
    label = None
    if target == "labels":
        label = (rand(rows, generator=generator) * classes).long()
    elif target == "hidden":
        leaves["target"] = random(*rows, teacher_hidden)
        leaves["target_linear_weight"] = random(classes, teacher_hidden)
        if bias:
            leaves["target_linear_bias"] = random(classes)
    else:
        t = random(*rows, classes, scale=2.0).double()
        t = {"logits": t, "log_probs": t.log_softmax(-1), "probs": t.softmax(-1)}[target]
        leaves["target"] = t.to(dtype)
    if name in DIVERGENCES and target != "hidden":
        options["target_type"] = target
    return LinearCase(name, leaves, label, options)


TARGETS = [
    ("cross_entropy", "labels"),
    ("cross_entropy", "probs"),
    ("log_prob_and_entropy", "labels"),
    *[(n, t) for n in DIVERGENCES for t in ("logits", "log_probs", "probs", "hidden")],
]
