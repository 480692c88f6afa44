"""Arguments of sharded losses that are special to autograd, as the ranks of the tests give them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiv.distributed as sharded
from helpers.shard_programs import problem


def inference_tensors(group: Any, rank: int) -> None:
    """Gradients do not depend on whether teachers, labels and weights were made in that mode."""
    x, t, y, mine = problem(group, rank)
    shard, teacher, p = x[:, mine].contiguous(), t[:, mine], t.softmax(-1)[:, mine]
    h, w = x[:, :8].contiguous(), x.t()[mine, :8].contiguous()
    g, v = t[:, :5].contiguous(), t.t()[mine, :5].contiguous()
    weight = torch.arange(len(x)) % 3
    logits = {"target_type": "logits", "token_weight": weight}
    calls: list[tuple[Any, Tensor, tuple[Tensor, ...], dict[str, Any]]] = [
        (sharded.cross_entropy, shard, (y,), {"weight": p[0]}),
        (sharded.cross_entropy, shard, (p,), {}),
        (sharded.log_prob, shard, (y.clamp(min=0),), {}),
        *((f, shard, (teacher,), logits) for f in (sharded.kl_div, sharded.reverse_kl_div)),
        (sharded.js_div, shard, (teacher,), logits),
        (sharded.linear_cross_entropy, h, (w, y), {}),
        (sharded.linear_kl_div, h, (w, teacher), logits),
        (sharded.linear_kl_div, h, (w, g), {"target_linear_weight": v}),
    ]
    for function, first, others, options in calls:
        results = []
        for change in (torch.clone, _inferred):
            leaf = first.clone().requires_grad_()
            given = {k: change(v) if isinstance(v, Tensor) else v for k, v in options.items()}
            value = function(leaf, *map(change, others), group=group, **given)
            results.append(torch.autograd.grad(value.sum(), leaf)[0])
        assert results[0].equal(results[1]), function


def _inferred(v: Tensor) -> Tensor:
    with torch.inference_mode():
        return v.clone()


def in_place(group: Any, rank: int) -> None:
    """All ranks refuse what one of them must."""
    x, t, y, mine = problem(group, rank)
    p = x[:, mine].clone().requires_grad_()
    memory = p.detach().clone()
    computed = p * 1
    options: dict[str, Any] = {"inplace_backward": True, "group": group}
    if rank == 1:
        with pytest.raises(ValueError, match="leaf"):
            sharded.cross_entropy(p.view_as(p), y, **options)
        with pytest.raises(ValueError, match="overwrite target"):
            sharded.kl_div(computed, computed.detach(), target_type="logits", **options)
    else:
        with pytest.raises(RuntimeError, match="rank 1 of the group refused .* leaf"):
            sharded.cross_entropy(p * 1, y, **options)
        with pytest.raises(RuntimeError, match="rank 1 of the group refused .* target"):
            sharded.kl_div(computed, t[:, mine], target_type="logits", **options)
    assert p.detach().equal(memory)
