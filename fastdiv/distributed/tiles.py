"""Sharded losses of a linear layer's logits, as torch sees them: ops, and their autograd.Function.

Every rank has the rows of the weight that belong to its classes; hidden states are the same on all.
The logits of a shard are made tile by tile, in the forward and once more in the backward, and all
rows are merged in one exchange in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .._engine import ops
from .._engine.autograd import is_differentiated
from .._engine.backend import use_kernel
from .._engine.inference import savable
from .._engine.torch_private import is_transformed
from .._linear import flops
from .._linear import ops as linear_ops
from .._linear.autograd import linear_loss
from .._linear.chunks import Problem, by_classes, by_rows
from .._linear.ops import HEADS, LinearCall, Tensors
from .._linear.tiles import Head
from ..reference import Spec, Stats
from . import shard
from .autograd import Call, whole_loss
from .local import Forward, Odd
from .shard import ShardedRows
from .whole import shared
from .world import Shards, World, sum_over


@dataclass
class LayerCall(Call):
    """A sharded linear loss with all of its options that are not tensors."""

    chunk_size: int = 0


@dataclass
class Tiles:
    """The logits of a shard's layer, and of a teacher's, of which a tile is held at a time."""

    tensors: Tensors
    chunk_size: int

    def _problem(self, spec: Spec, label: Any, class_weight: Any, weight: Any) -> Problem:
        x, w, b, t, t_weight, t_bias = self.tensors[:HEADS]
        assert x is not None
        teacher = None if t is None else Head(t, t_weight, t_bias)
        rows = (label, class_weight, weight)
        return Problem(Head(x, w, b), teacher, *rows, [*ops.options(spec)], self.chunk_size)

    def forward(
        self,
        spec: Spec,
        label: Any,
        class_weight: Any,
        weight: Any,
        stats: bool,
        odd: Odd | None = None,
    ) -> Forward:
        """See ``Kernels``."""
        p = self._problem(spec, label, class_weight, weight)
        sums: Tensor | None = None

        def look(rows: Any, tiles: Any, value: Tensor, record: Tensor) -> None:
            nonlocal sums
            found = None if odd is None else odd(value, record, tiles[-1])
            if found is not None:
                if sums is None:
                    sums = record.new_zeros(p.rows, ops.TERM_SUMS)
                of_rows, which = found
                sums[rows] = ops.terms(*tiles[:-1], which, of_rows, *p.options)

        out = by_rows(p, ops.options(spec, stats=True)[0] if stats else -1, None, [], look)
        of_rows, argmax = (out.stats, out.argmax) if stats else (None, None)
        return Forward(out.value, out.record, of_rows, argmax, sums)

    def terms(self, spec: Spec, record: Tensor, weight: Tensor) -> Tensor:
        """See ``Kernels``."""
        p = self._problem(spec, None, None, weight)
        sums = record.new_zeros(p.rows, ops.TERM_SUMS)
        for rows in p.pieces(p.rows_of_chunk(False)):
            tiles = p.tiles(rows, slice(0, p.classes))
            sums[rows] = ops.terms(*tiles, record[rows], *p.options)
        return sums


def layer_loss(call: LayerCall, *tensors: Tensor | None) -> tuple[Tensor, Tensor, Stats | None]:
    """The loss, the sum of the weights in a mean, and statistics if the call asks for them."""
    tensors = savable(*tensors)
    x, weight, *_ = tensors
    assert x is not None and weight is not None
    if call.shards.world.size == 1:
        value, stats = linear_loss(LinearCall(call.spec, call.stats, call.chunk_size), *tensors)
        logits = x.new_empty(()).expand(len(x), len(weight))  # for its shape
        total = reference.mean_weights(call.spec.ignore_index, logits, *tensors[HEADS:]).sum()
        return value, total.to(value.dtype), stats
    if is_transformed() or not use_kernel(x):
        return _whole_layer(call, *tensors)
    flops.tell_counters()
    label, class_weight, row_weight = tensors[HEADS:]
    if label is not None:
        row_weight = reference.row_weights(call.spec.ignore_index, x, label, row_weight)
        label = label - call.shards.first
    tensors = (*tensors[:HEADS], label, class_weight, row_weight)
    recording = torch.is_grad_enabled()
    needed = tuple(recording and v is not None and v.requires_grad for v in tensors[:HEADS])
    if not any(needed):
        out = forward(*tensors, call.floats(), *call.options(), False, call.chunk_size)
        value, _, total, found, argmax = out
    else:
        function = _TracedLayerLoss if torch.compiler.is_compiling() else _LayerLoss
        value, _, total, found, argmax = function.apply(call, needed, call.floats(), *tensors)
    return value, total, Stats(found[0], found[1], argmax, found[2]) if call.stats else None


def _whole_layer(call: Call, *tensors: Tensor | None) -> tuple[Tensor, Tensor, Stats | None]:
    """The same of logits that are gathered."""
    x, weight, bias, t, t_weight, t_bias, *rest = tensors
    assert x is not None and weight is not None
    x = F.linear(shared(call.shards, x), weight, bias)
    if t is not None:
        t = t if t_weight is None else F.linear(shared(call.shards, t), t_weight, t_bias)
        dtype = torch.promote_types(x.dtype, t.dtype)
        x, t = x.to(dtype), t.to(dtype)
    return whole_loss(call, x, t, *rest)


class _TracedLayerLoss(torch.autograd.Function):
    """The form that ``torch.compile`` can trace."""

    @staticmethod
    def forward(
        ctx: Any, call: LayerCall, needed: tuple[bool, ...], floats: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        out = forward(*tensors, floats, *call.options(), any(needed[3:]), call.chunk_size)
        ctx.call, ctx.needed = call, needed
        ctx.mark_non_differentiable(*out[1:])
        ctx.save_for_backward(*tensors, floats, *out[1:3])
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        *tensors, floats, record, total = ctx.saved_tensors
        call = ctx.call
        spec = call.spec
        if spec.reduction in ("mean", "batchmean"):
            grad = grad / (total if spec.reduction == "mean" else spec.batch)
        ints, _, _, name, _ = call.options()
        gradients = backward(
            grad.contiguous(), record, *tensors, floats, ints, call.chunk_size, ctx.needed, name
        )
        return _for_apply(ctx, gradients)


class _LayerLoss(_TracedLayerLoss):
    """The same with second derivatives."""

    @staticmethod
    def forward(
        ctx: Any, call: LayerCall, needed: tuple[bool, ...], floats: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return _TracedLayerLoss.forward(ctx, call, needed, floats, *tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (HEADS + 6)
        if is_differentiated(grad):
            return _for_apply(ctx, _differentiable(ctx, grad))
        return _TracedLayerLoss.backward(ctx, grad)


def _differentiable(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """Gradients that may be differentiated or batched, from logits that are held whole."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Each its own alias: one tensor in two places would get the gradient of both twice.
        own = [None if v is None else v.view_as(v) for v in ctx.saved_tensors[: HEADS + 3]]
        if own[HEADS] is not None:
            own[HEADS] = own[HEADS] + ctx.call.shards.first
        call = Call(ctx.call.spec, ctx.call.shards)
        value = _whole_layer(call, *own)[0]
    wanted = [v for v, need in zip(own, ctx.needed, strict=False) if need and v is not None]
    found = iter(torch.autograd.grad(value, wanted, grad, create_graph=create_graph))
    return [next(found) if need else None for need in ctx.needed]


def _for_apply(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """One for each argument of ``apply``."""
    of_heads = (g if need else None for g, need in zip(gradients, ctx.needed, strict=True))
    return None, None, None, *of_heads, None, None, None


# --- the ops ----------------------------------------------------------------------------------


@torch.library.custom_op("fastdiv::_shard_linear_forward", mutates_args=())
def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    t: Tensor | None,
    t_weight: Tensor | None,
    t_bias: Tensor | None,
    label: Tensor | None,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    floats: Tensor,
    ints: Sequence[int],
    sizes: Sequence[int],
    rank: int,
    group: str,
    stats: bool,
    need_t: bool,
    chunk_size: int,
) -> list[Tensor]:
    """Of whole rows: value, record, sum of the weights, statistics and argmax."""
    shards = Shards(World(group, rank, len(sizes)), tuple(sizes))
    tensors = (x, weight, bias, t, t_weight, t_bias)
    dtype, spec = linear_ops.dtype_of_value(x, t), ops.spec_of([*ints, *floats.tolist()])
    rows = ShardedRows(spec, shards, label, class_weight, row_weight, stats, need_t)
    if stats and t is not None:
        rows = replace(rows, mass=t.sum(-1, dtype=dtype))
    with torch.autocast(x.device.type, enabled=False):
        return shard.results(rows, rows.whole(Tiles(tensors, chunk_size), dtype), dtype)


@forward.register_fake
def _(x, weight, bias, t, tw, tb, label, cw, rw, floats, ints, sizes, rank, group, stats, need, n):  # type: ignore[no-untyped-def]
    return shard.fake_results(x, ints, linear_ops.dtype_of_value(x, t), stats)


@torch.library.custom_op("fastdiv::_shard_linear_backward", mutates_args=())
def backward(
    grad: Tensor,
    record: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    t: Tensor | None,
    t_weight: Tensor | None,
    t_bias: Tensor | None,
    label: Tensor | None,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    floats: Tensor,
    ints: Sequence[int],
    chunk_size: int,
    needed: Sequence[bool],
    group: str,
) -> list[Tensor]:
    """The gradients that are needed; those of hidden states added up over the ranks."""
    tensors = (x, weight, bias, t, t_weight, t_bias, label, class_weight, row_weight)
    p = linear_ops._problem(tensors, ints, (), chunk_size, floats)
    if grad.dim() == 0:
        grad = grad.expand(p.rows)
    with torch.autocast(x.device.type, enabled=False):
        gradients = linear_ops._gradients(p, needed)
        by_classes(p, grad, record, gradients)
        for g in gradients:
            if g.of_input is not None and g.head.weight is not None:
                g.of_input.copy_(sum_over(group, g.of_input))
    return linear_ops._results(x, gradients)


@backward.register_fake
def _(grad, record, x, w, b, t, tw, tb, label, cw, rw, floats, ints, chunk, needed, group):  # type: ignore[no-untyped-def]
    return linear_ops._fake_gradients((x, w, b, t, tw, tb), needed)


def _forward_flops(*args: Any, out_val: Any = None) -> int:
    return flops.of_products(args[:HEADS], [False] * HEADS)


def _backward_flops(grad: Tensor, record: Tensor, *args: Any, **_: Any) -> int:
    return flops.of_products(args[:HEADS], args[-2])


flops.register(torch.ops.fastdiv._shard_linear_forward, _forward_flops)
flops.register(torch.ops.fastdiv._shard_linear_backward, _backward_flops)
