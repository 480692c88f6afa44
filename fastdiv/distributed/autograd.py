"""The one autograd.Function of the sharded losses of whole rows.

The forward is the op of ``shard``; the backward, from the record of whole rows, is the kernels'
own and needs no exchange.  Second derivatives, transforms of torch.func and devices without kernels
take the loss of the gathered rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._engine import arguments, ops, symbolic_ops
from .._engine.autograd import (
    is_differentiated,
    overwritten,
    refuse_second_derivative,
    row_loss,
    row_loss_and_stats,
)
from .._engine.backend import use_kernel
from .._engine.inference import savable
from .._engine.symbolic import as_tensor
from .._engine.torch_private import is_transformed
from ..reference import Spec, Stats
from . import shard
from .whole import gathered
from .world import Shards

Tensors = Sequence[Tensor | None]  # x, t, label (global), class_weight, row_weight


@dataclass
class Call:
    """A sharded loss with all of its options that are not tensors."""

    spec: Spec
    shards: Shards
    stats: bool = False

    def options(self) -> tuple[Any, ...]:
        """Lists the arguments of the op that come after its tensors and ``floats``.

        No label is left to ignore, since weights of 0 say which rows do not count.
        """
        ints, world = list(ops.int_options(self.spec)), self.shards.world
        ints[ops.IGNORE_INDEX] = arguments.NO_LABEL_IGNORED
        return ints, list(self.shards.sizes), world.rank, world.name, self.stats

    def floats(self) -> Tensor:
        """The float options, in a tensor: the compiler may know one of them by name only."""
        return as_tensor(ops.float_options(self.spec))


def shard_loss(call: Call, *rows: Tensor | None) -> tuple[Tensor, Tensor, Stats | None]:
    """The loss, the sum of the weights in a mean, and statistics if the call asks for them."""
    rows = savable(*rows)
    x, t, label, class_weight, row_weight = rows
    assert x is not None
    if call.shards.world.size == 1 or is_transformed() or not use_kernel(x):
        return whole_loss(call, *rows)
    weight = row_weight
    if label is not None:
        weight = reference.row_weights(call.spec.ignore_index, x, label, row_weight)
        label = label - call.shards.first
    rows = (x, t, label, class_weight, weight)
    if not torch.is_grad_enabled() or not any(v is not None and v.requires_grad for v in (x, t)):
        out = shard.forward(*rows, call.floats(), *call.options(), False)
        value, _, total, stats, argmax = out
    else:
        function = _TracedShardLoss if torch.compiler.is_compiling() else _ShardLoss
        value, _, total, stats, argmax = function.apply(call, call.floats(), *rows)
    found = Stats(stats[0], stats[1], argmax, stats[2]) if call.stats else None
    return value, total, found


def whole_loss(call: Call, *rows: Tensor | None) -> tuple[Tensor, Tensor, Stats | None]:
    """The same of gathered rows, or of a single rank's."""
    x, t, label, class_weight, row_weight = rows
    if call.shards.world.size > 1:
        x, t, class_weight = (
            None if v is None else gathered(call.shards, v) for v in (x, t, class_weight)
        )
    assert x is not None
    weights = (label, class_weight, row_weight)
    total = reference.mean_weights(call.spec.ignore_index, x, *weights).sum()
    if call.stats:
        value, stats = row_loss_and_stats(call.spec, x, t, *weights)
        return value, total, stats
    return row_loss(call.spec, x, t, *weights), total, None


class _TracedShardLoss(torch.autograd.Function):
    """The form that ``torch.compile`` can trace."""

    @staticmethod
    def forward(ctx: Any, call: Call, floats: Tensor, *rows: Tensor | None) -> tuple[Tensor, ...]:
        out = shard.forward(*rows, floats, *call.options(), ctx.needs_input_grad[3])
        ctx.call = call
        ctx.mark_non_differentiable(*out[1:])
        ctx.save_for_backward(floats, *rows, *out[1:3])
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        need_x, need_t = ctx.needs_input_grad[2:4]
        grad, ints = _for_kernel(ctx, grad)
        floats, *saved = ctx.saved_tensors
        dx, dt = symbolic_ops.backward(grad, *saved, ints, floats, need_x, need_t)
        return None, None, dx if need_x else None, dt if need_t else None, None, None, None


class _ShardLoss(_TracedShardLoss):
    """The same with gradients in place and second derivatives."""

    @staticmethod
    def forward(ctx: Any, call: Call, floats: Tensor, *rows: Tensor | None) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return _TracedShardLoss.forward(ctx, call, floats, *rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        need_x, need_t = ctx.needs_input_grad[2:4]
        differentiated = is_differentiated(grad)
        if ctx.call.spec.inplace and need_x:
            if differentiated:
                refuse_second_derivative()
            grad, ints = _for_kernel(ctx, grad)
            saved, options = ctx.saved_tensors[1:], (*ints, *ops.float_options(ctx.call.spec))
            dt = ops.backward_in_place(grad, *saved, *options, need_t)
            return None, None, overwritten(saved[0]), dt if need_t else None, None, None, None
        if differentiated:
            return _differentiable(ctx, grad)
        return _TracedShardLoss.backward(ctx, grad)


def _for_kernel(ctx: Any, grad: Tensor) -> tuple[Tensor, list[int]]:
    """Upstream gradient and options of an op whose divisor is 1."""
    spec, (ints, *_) = ctx.call.spec, ctx.call.options()
    if spec.reduction in ("mean", "batchmean"):
        grad = grad / (ctx.saved_tensors[-1] if spec.reduction == "mean" else spec.batch)
        ints[ops.REDUCTION] = ops.REDUCTIONS["sum"]
    return grad.contiguous(), ints


def _differentiable(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients that may be differentiated or batched."""
    create_graph = torch.is_grad_enabled()
    x, t, label, class_weight, weight = ctx.saved_tensors[1:6]
    needed = ctx.needs_input_grad[2:4]
    with torch.enable_grad():
        # Each its own alias: one tensor in two places would get the gradient of both twice.
        own = [None if v is None else v.view_as(v) for v in (x, t)]
        label = None if label is None else label + ctx.call.shards.first
        call = Call(replace(ctx.call.spec, inplace=False), ctx.call.shards)
        value = whole_loss(call, *own, label, class_weight, weight)[0]
    wanted = [v for v, need in zip(own, needed, strict=True) if need and v is not None]
    found = iter(torch.autograd.grad(value, wanted, grad, create_graph=create_graph))
    return None, None, *(next(found) if need else None for need in needed), None, None, None
