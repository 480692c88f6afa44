"""Sharded linear losses as calls of their ops, and as losses of gathered logits.

Every rank has the rows of the weight that belong to its classes; hidden states are the same on all.
The logits of a shard are computed tile by tile, in the forward and again in the backward.  One
exchange in between merges the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import reference
from .._engine import ops
from .._engine.backend import use_kernel
from .._engine.inference import savable
from .._engine.loss_call import Forward, Tensors, run
from .._engine.torch_private import is_transformed
from .._linear import flops
from .._linear import ops as linear_ops
from .._linear.autograd import LinearCall, linear_loss
from .._linear.dtypes import whole_logits
from .._linear.loops import Problem, by_classes, by_rows
from .._linear.ops import N_HEAD_TENSORS, LayerRows
from ..reference import Rows, Spec, Stats
from . import shard
from .autograd import ShardCall, whole_loss
from .infinite_rows import Odd, ShardForward
from .shard import ShardedRows
from .whole import shared
from .world import Shards, World, sum_over


def layer_rows(tensors: Tensors) -> LayerRows:
    """Return the tensors of a sharded loss as those of a linear loss."""
    x, weight, bias, t, t_weight, t_bias, label, class_weight, row_weight = tensors
    assert x is not None and weight is not None
    rows = (label, class_weight, row_weight)
    return LayerRows(x, weight, bias, t, t_weight, t_bias, None, *rows)


@dataclass
class Tiles:
    """The logits of a shard, and of a teacher, computed tile by tile; see ``Kernels``."""

    tensors: Tensors
    chunk_size: int
    logits_dtype: torch.dtype | None

    def _problem(self, spec: Spec, label: Any, class_weight: Any, weight: Any) -> Problem:
        tensors = layer_rows((*self.tensors[:N_HEAD_TENSORS], label, class_weight, weight))
        return linear_ops.problem(tensors, spec, self.chunk_size, self.logits_dtype)

    def forward(
        self,
        spec: Spec,
        label: Any,
        class_weight: Any,
        weight: Any,
        stats: bool,
        odd: Odd | None = None,
    ) -> ShardForward:
        """See ``Kernels``."""
        p = self._problem(spec, label, class_weight, weight)
        sums: Tensor | None = None

        def look(rows: Any, tiles: Rows, value: Tensor, record: Tensor) -> None:
            nonlocal sums
            found = None if odd is None else odd(value, record, tiles.row_weight)
            if found is not None:
                if sums is None:
                    sums = record.new_zeros(p.rows, ops.TERM_SUMS)
                of_rows, which = found
                of_tile = tiles._replace(row_weight=which)
                sums[rows] = ops.terms(*of_tile, of_rows, *p.options)

        out = by_rows(p, stats, None, [], look)
        of_rows, argmax = (out.stats, out.argmax) if stats else (None, None)
        return ShardForward(out.value, out.record, of_rows, argmax, sums)

    def terms(self, spec: Spec, record: Tensor, weight: Tensor) -> Tensor:
        """See ``Kernels``."""
        p = self._problem(spec, None, None, weight)
        sums = record.new_zeros(p.rows, ops.TERM_SUMS)
        for rows in p.pieces(p.rows_of_chunk()):
            tiles = p.tiles(rows, slice(0, p.classes))
            sums[rows] = ops.terms(*tiles, record[rows], *p.options)
        return sums


@dataclass
class ShardLinearCall(ShardCall):
    """A sharded linear loss with all of its options that are not tensors."""

    n_inputs: ClassVar[int] = N_HEAD_TENSORS
    chunk_size: int = 0
    logits_dtype: torch.dtype | None = None

    def forward(self, tensors: Tensors, needed: Sequence[bool], symbolic: Tensor | None) -> Forward:
        """See ``LossCall``."""
        of_tiles = (self.chunk_size, self.logits_dtype)
        out = forward(*tensors, *self.options(symbolic), any(needed[3:]), *of_tiles)
        return Forward(out, out[1:3])

    def backward(
        self,
        grad: Tensor,
        tensors: Tensors,
        kept: Sequence[Tensor],
        needed: Sequence[bool],
        symbolic: Tensor | None,
    ) -> Sequence[Tensor | None]:
        """See ``LossCall``."""
        record, divisor = kept
        grad, options = self.of_sum(grad, divisor).contiguous(), self.options(symbolic)
        group = self.shards.world.name
        of_tiles = (self.chunk_size, self.logits_dtype)
        return backward(grad, record, *tensors, *options[:3], group, *of_tiles, needed)

    def differentiable_value(self, tensors: Tensors) -> Tensor:
        """See ``LossCall``."""
        call = ShardLinearCall(self.spec, self.shards, logits_dtype=self.logits_dtype)
        return _of_whole_logits(call, self.with_global_label(tensors, N_HEAD_TENSORS))[0]


def shard_linear_loss(
    call: ShardLinearCall, *tensors: Tensor | None
) -> tuple[Tensor, Tensor, Stats | None]:
    """Compute the loss, the divisor of a mean, and statistics if the call asks for them."""
    tensors = savable(*tensors)
    x, weight, *_ = tensors
    assert x is not None and weight is not None
    if call.shards.world.size == 1:
        of_one = LinearCall(call.spec, call.stats, call.chunk_size, logits_dtype=call.logits_dtype)
        value, stats = linear_loss(of_one, *layer_rows(tensors))
        logits = x.new_empty(()).expand(len(x), len(weight))  # for its shape
        ignored, of_rows = call.spec.ignore_index, tensors[N_HEAD_TENSORS:]
        divisor = reference.mean_weights(ignored, logits, *of_rows).sum()
        return value, divisor.to(value.dtype), stats
    if is_transformed() or not use_kernel(x):
        return _of_whole_logits(call, tensors)
    flops.tell_counters()
    label, class_weight, row_weight = tensors[N_HEAD_TENSORS:]
    if label is not None:
        row_weight = reference.row_weights(call.spec.ignore_index, x, label, row_weight)
        label = label - call.shards.first
    of_rows = (label, class_weight, row_weight)
    value, _, divisor, found, argmax = run(call, (*tensors[:N_HEAD_TENSORS], *of_rows))
    return value, divisor, ops.stats_of(found, argmax) if call.stats else None


def _of_whole_logits(
    call: ShardLinearCall, tensors: Tensors
) -> tuple[Tensor, Tensor, Stats | None]:
    """Compute the same from logits that are gathered."""
    x, weight, bias, t, t_weight, t_bias, *rest = tensors
    assert x is not None and weight is not None
    dtype = call.logits_dtype
    x = whole_logits(shared(call.shards, x), weight, bias, dtype)
    if t is not None:
        if t_weight is not None:
            t = whole_logits(shared(call.shards, t), t_weight, t_bias, dtype)
        both = torch.promote_types(x.dtype, t.dtype)
        x, t = x.to(both), t.to(both)
    return whole_loss(call, x, t, *rest)


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
    ints: Sequence[int],
    floats: Sequence[float],
    symbolic: Tensor | None,
    sizes: Sequence[int],
    rank: int,
    group: str,
    stats: bool,
    need_t: bool,
    chunk_size: int,
    logits_dtype: torch.dtype | None,
) -> list[Tensor]:
    """Compute value, record, divisor, statistics and argmax of whole rows."""
    shards = Shards(World(group, rank, len(sizes)), tuple(sizes))
    tensors = (x, weight, bias, t, t_weight, t_bias)
    dtype, spec = linear_ops.dtype_of_value(x, t), ops.unpacked(ints, floats, symbolic)
    rows = ShardedRows(spec, shards, label, class_weight, row_weight, stats, need_t)
    if stats and t is not None:
        rows = replace(rows, mass=t.sum(-1, dtype=dtype))
    tiles = Tiles(tensors, chunk_size, logits_dtype)
    with torch.autocast(x.device.type, enabled=False):
        return shard.results(rows, rows.whole(tiles, dtype), dtype)


@forward.register_fake
def _(x, w, b, t, tw, tb, label, cw, rw, ints, floats, symbolic, sizes, rank, group, stats, *_):  # type: ignore[no-untyped-def]
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
    ints: Sequence[int],
    floats: Sequence[float],
    symbolic: Tensor | None,
    group: str,
    chunk_size: int,
    logits_dtype: torch.dtype | None,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Compute the gradients that are needed; sum those of hidden states over the ranks."""
    tensors = (x, weight, bias, t, t_weight, t_bias, label, class_weight, row_weight)
    spec = ops.unpacked(ints, floats, symbolic)
    p = linear_ops.problem(layer_rows(tensors), spec, chunk_size, logits_dtype)
    if grad.dim() == 0:
        grad = grad.expand(p.rows)
    with torch.autocast(x.device.type, enabled=False):
        gradients = linear_ops.gradients_of(p, needed)
        by_classes(p, grad, record, gradients)
        for g in gradients:
            if g.of_input is not None and g.logits.weight is not None:
                g.of_input.copy_(sum_over(group, g.of_input))
    return linear_ops.results_of(x, gradients)[:N_HEAD_TENSORS]


@backward.register_fake
def _(grad, record, x, w, b, t, tw, tb, label, cw, rw, ints, floats, symbolic, group, *others):  # type: ignore[no-untyped-def]
    return linear_ops.fake_results((x, w, b, t, tw, tb), others[-1])


def _forward_flops(*args: Any, out_val: Any = None) -> int:
    return flops.of_products(args[:N_HEAD_TENSORS], [False] * N_HEAD_TENSORS)


def _backward_flops(grad: Tensor, record: Tensor, *args: Any, **_: Any) -> int:
    return flops.of_products(args[:N_HEAD_TENSORS], args[-1])


flops.register(torch.ops.fastdiv._shard_linear_forward, _forward_flops)
flops.register(torch.ops.fastdiv._shard_linear_backward, _backward_flops)
