"""Losses as functions of logits alone, to be differentiated in double."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from helpers.cases import Case, make_inputs

SHAPE = (3, 3)


def problem(case: Case, **options: object) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Return the loss as a function of logits of both sides, and where to differentiate it.

    Log-probabilities and probabilities come from logits inside the function: a perturbed target
    stays a distribution.
    """
    x, t = make_inputs(SHAPE, torch.float64, scale=1.5)
    x.requires_grad_()
    if case.target in ("labels", "none"):
        target = case.make_target(x, t)
        return lambda x: case.call(x, target, **options), [x]

    def loss(x: Tensor, t: Tensor) -> Tensor:
        as_target = {
            "logits": lambda: t,
            "log_probs": lambda: t.log_softmax(-1),
            "probs": lambda: t.softmax(-1),
        }
        return case.call(x, as_target[case.target](), **options)

    return loss, [x, t.requires_grad_()]
