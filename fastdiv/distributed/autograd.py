"""Sharded losses of whole rows as calls of their op, and as losses of gathered rows.

The forward is the op of ``shard``; the backward, from the record of whole rows, is the kernels'
own and needs no exchange.  Second derivatives, transforms of torch.func and devices without kernels
take the loss of the gathered rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import reference
from .._engine import ops
from .._engine.arguments import NO_LABEL_IGNORED
from .._engine.autograd import row_loss, row_loss_and_stats
from .._engine.backend import use_kernel
from .._engine.inference import savable
from .._engine.loss_call import Forward, Tensors, overwritten, run
from .._engine.symbolic_ops import SymbolicCall
from .._engine.torch_private import is_transformed
from ..reference import Rows, Spec, Stats
from . import shard
from .whole import gathered
from .world import Shards


@dataclass
class ShardCall:
    """A sharded loss with all of its options that are not tensors."""

    n_inputs: ClassVar[int] = 2
    spec: Spec
    shards: Shards
    stats: bool = False

    def options(self, symbolic: Tensor | None) -> tuple[Any, ...]:
        """List the arguments of the op between its tensors and the flags of gradients.

        No label is left to ignore, since weights of 0 say which rows are ignored.
        """
        spec, world = self.spec._replace(ignore_index=NO_LABEL_IGNORED), self.shards.world
        packed = ops.packed(spec, symbolic)
        return *packed, list(self.shards.sizes), world.rank, world.name, self.stats

    def forward(self, tensors: Tensors, needed: Sequence[bool], symbolic: Tensor | None) -> Forward:
        """See ``LossCall``."""
        out = shard.forward(*tensors, *self.options(symbolic), needed[1])
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
        grad, spec = self.of_sum(grad, kept[1]).contiguous(), self.spec
        reduction = "none" if spec.reduction == "none" else "sum"
        spec = spec._replace(reduction=reduction, ignore_index=NO_LABEL_IGNORED)
        if spec.inplace and needed[0] and not torch.compiler.is_compiling():
            x = tensors[0]
            assert x is not None
            options = ops.options(spec)
            dt = ops.backward_in_place(grad, *self._rows(tensors), *kept, *options, needed[1])
            return overwritten(x), dt
        rows = self._rows(tensors)
        if symbolic is None:
            return ops.backward(grad, *rows, *kept, *ops.options(spec), *needed)
        needed = (*needed, False)
        return SymbolicCall(spec, False).backward(grad, rows, kept, needed, symbolic)[:2]

    @staticmethod
    def _rows(tensors: Tensors) -> Rows:
        x, t, label, class_weight, row_weight = tensors
        assert x is not None
        return Rows(x, t, None, label, class_weight, row_weight)

    def of_sum(self, grad: Tensor, divisor: Tensor) -> Tensor:
        """Return the upstream gradient of the sum over the rows, or of each row."""
        if self.spec.reduction not in ("mean", "batchmean"):
            return grad
        return grad / (divisor if self.spec.reduction == "mean" else self.spec.batch)

    def differentiable_value(self, tensors: Tensors) -> Tensor:
        """See ``LossCall``."""
        call = ShardCall(self.spec._replace(inplace=False), self.shards)
        return whole_loss(call, *self.with_global_label(tensors, 2))[0]

    def with_global_label(self, tensors: Tensors, place: int) -> Tensors:
        """Return the tensors with labels that are counted from the first class of all shards."""
        label = tensors[place]
        if label is None:
            return tensors
        return [*tensors[:place], label + self.shards.first, *tensors[place + 1 :]]


def shard_loss(call: ShardCall, *rows: Tensor | None) -> tuple[Tensor, Tensor, Stats | None]:
    """Compute the loss, the divisor of a mean, and statistics if the call asks for them."""
    rows = savable(*rows)
    x, t, label, class_weight, row_weight = rows
    assert x is not None
    if call.shards.world.size == 1 or is_transformed() or not use_kernel(x):
        return whole_loss(call, *rows)
    weight = row_weight
    if label is not None:
        weight = reference.row_weights(call.spec.ignore_index, x, label, row_weight)
        label = label - call.shards.first
    value, _, divisor, stats, argmax = run(call, (x, t, label, class_weight, weight))
    return value, divisor, ops.stats_of(stats, argmax) if call.stats else None


def whole_loss(call: ShardCall, *rows: Tensor | None) -> tuple[Tensor, Tensor, Stats | None]:
    """Compute the same from gathered rows, or from the rows of a single rank."""
    x, t, label, class_weight, row_weight = rows
    if call.shards.world.size > 1:
        x, t, class_weight = (
            None if v is None else gathered(call.shards, v) for v in (x, t, class_weight)
        )
    assert x is not None
    weights = (label, class_weight, row_weight)
    divisor = reference.mean_weights(call.spec.ignore_index, x, *weights).sum()
    if call.stats:
        value, stats = row_loss_and_stats(call.spec, x, t, *weights)
        return value, divisor, stats
    return row_loss(call.spec, x, t, *weights), divisor, None
