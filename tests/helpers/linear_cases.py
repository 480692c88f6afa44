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
TOPK = ("topk_kl_div", "topk_reverse_kl_div")
OF_CLASSES = ("log_prob", "log_prob_and_entropy")  # which have no reduction


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
        arguments = (given.pop("input"), given.pop("linear_weight"), *self.second_of(given))
        value = getattr(fastdiv, f"linear_{self.name}")(
            *arguments, **given, **{**self.options, **options}
        )
        return torch.stack(value) if isinstance(value, tuple) else value

    def second_of(self, given: dict[str, Tensor]) -> list[Tensor]:
        """Take what follows hidden states and weight out of the leaves, and add the label."""
        taken = [given.pop(k) for k in ("target", "values") if k in given]
        return taken if self.label is None else [*taken, self.label]

    def unfused(self, leaves: Mapping[str, Tensor] | None = None, **options: Any) -> Tensor:
        """The row loss of logits that are held whole."""
        v = dict(leaves or self.leaves)
        options = {**self.options, **options}
        for of_tiles in ("chunk_size", "accumulate", "logits_dtype"):
            options.pop(of_tiles, None)
        x = F.linear(v["input"], v["linear_weight"], v.get("linear_bias"))
        second = self.second_of(v)
        if "target_linear_weight" in v:
            layer = v["target_linear_weight"], v.get("target_linear_bias")
            second = [F.linear(second[0], *layer)]
            options["target_type"] = "logits"
        if self.name == "cross_entropy":
            options["dim"] = -1
        value = getattr(fastdiv, self.name)(x, *second, **options)
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
    """Random tensors; ``target`` is what follows them.

    It is "labels", "several" (four classes in each row, one of them padding at times), "probs",
    "logits", "log_probs" or "hidden".  A top-k teacher knows four classes of such a target.
    """
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
    elif target == "several":
        label = (rand((*rows, 4), generator=generator) * (classes + 1)).long() - 1
    elif target == "hidden":
        leaves["target"] = random(*rows, teacher_hidden)
        leaves["target_linear_weight"] = random(classes, teacher_hidden)
        if bias:
            leaves["target_linear_bias"] = random(classes)
    else:
        t = random(*rows, classes, scale=2.0).double()
        t = {"logits": t, "log_probs": t.log_softmax(-1), "probs": t.softmax(-1)}[target]
        if name in TOPK:
            values, label = t.topk(min(4, classes))
            leaves["values"] = values.to(dtype)
            options = {"values_type": target, "missing": "tail", **options}
        else:
            leaves["target"] = t.to(dtype)
    if name in DIVERGENCES and target != "hidden":
        options["target_type"] = target
    return LinearCase(name, leaves, label, options)


TARGETS = [
    ("cross_entropy", "labels"),
    ("cross_entropy", "probs"),
    ("log_prob", "labels"),
    ("log_prob", "several"),
    ("log_prob_and_entropy", "labels"),
    *[(n, "log_probs") for n in TOPK],
    *[(n, t) for n in DIVERGENCES for t in ("logits", "log_probs", "probs", "hidden")],
]
