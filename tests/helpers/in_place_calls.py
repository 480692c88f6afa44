"""Every function and module that takes ``inplace_backward``, called alike."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastdiv
import fastdiv.distributed as sharded
from helpers.cases import LOSSES, Case, TopKCase, module_of

# A loss of logits ``[4, C]``, of a target of their shape or labels, and of options.
Call = Callable[..., Tensor]
PROGRAMS: dict[str, tuple[Case, Call]] = {}


def takes_it(function: Any) -> bool:
    return "inplace_backward" in inspect.signature(function).parameters


def _in_a_module(kind: Any, case: Case) -> Call:
    def call(x: Tensor, t: Tensor, token_weight: Tensor | None = None, **options: Any) -> Tensor:
        if isinstance(case, TopKCase):
            module = kind(values_type=case.target, **case.options, **options)
            return module(x, *t, token_weight)
        options = {**case.options, **options}
        if case.divergence:
            options["target_type"] = case.target
        return kind(**options)(x, t, token_weight)

    return call


def _of_values(function: Any, case: Case) -> Call:
    """A top-k loss, whose target is a pair."""
    return lambda x, t, **options: function(
        x, *t, values_type=case.target, **case.options, **options
    )


def _of_shard(function: Any, case: Case) -> Call:
    kind = {"target_type": case.target} if case.divergence else {}
    return lambda x, t, **options: function(x, t, **case.options, **kind, **options)


def _label_smoothing(x: Tensor, t: Tensor, inplace_backward: bool = False) -> Tensor:
    loss = fastdiv.nn.LabelSmoothingLoss(x.shape[-1], -1, 0.1, inplace_backward=inplace_backward)
    return loss(x.unsqueeze(0), t.unsqueeze(0))


for case in LOSSES:
    function = getattr(fastdiv, case.name)
    if not takes_it(function):
        continue
    topk = isinstance(case, TopKCase)
    PROGRAMS[str(case)] = (case, _of_values(function, case) if topk else case.call)
    module = module_of(case.name)
    PROGRAMS[f"nn.{module.__name__}-{case}"] = (case, _in_a_module(module, case))
    if case.name in sharded.__all__:
        function = getattr(sharded, case.name)
        PROGRAMS[f"distributed.{case}"] = (case, _of_shard(function, case))
PROGRAMS["nn.LabelSmoothingLoss"] = (LOSSES[0], _label_smoothing)


def target_of(case: Case, t: Tensor) -> Any:
    """The target of a case from logits of a teacher."""
    if isinstance(case, TopKCase):
        values, indices = t.topk(3, -1)
        return (values if case.target == "logits" else values.log_softmax(-1).exp()), indices
    return case.make_target(t, t)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape).requires_grad_()
