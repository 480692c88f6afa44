"""Linear losses as calls of their ops, and as losses of ``F.linear`` where the ops do not serve.

Transforms of torch.func, second derivatives, a vmap over upstream gradients and devices without
kernels take the loss of ``F.linear``, which holds the logits whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._engine import arguments
from .._engine import ops as row_ops
from .._engine.autograd import row_loss, row_loss_and_stats
from .._engine.backend import use_kernel
from .._engine.inference import savable
from .._engine.loss_call import Forward, run
from .._engine.symbolic import is_true
from .._engine.torch_private import is_transformed
from ..reference import Spec, Stats
from ..reference.choices import Accumulate
from . import flops, ops
from .dtypes import bytes_of_logit, whole_logits
from .loops import budget_of, device_of
from .ops import N_HEAD_TENSORS, N_INPUTS, Tensors


@dataclass
class LinearCall:
    """A linear loss with all of its options that are not tensors."""

    n_inputs: ClassVar[int] = N_INPUTS
    spec: Spec
    stats: bool = False
    chunk_size: int = 0
    accumulate: Accumulate | None = None
    logits_dtype: torch.dtype | None = None

    def forward(self, tensors: Tensors, needed: Sequence[bool], symbolic: Tensor | None) -> Forward:
        """See ``LossCall``."""
        at_once = any(needed) and self._at_once(tensors, needed)
        now = needed if at_once else (False,) * N_INPUTS
        options = row_ops.packed(self.spec, symbolic)
        out = ops.forward(*tensors, *options, self.stats, self.chunk_size, self.logits_dtype, now)
        value, divisor, record, stats, argmax, *gradients = out
        outputs, kept = (value, stats, argmax), (divisor, record)
        if not at_once:
            return Forward(outputs, kept)
        return Forward(outputs, kept, gradients, divisor if ops.rounds(tensors, needed) else None)

    def _at_once(self, tensors: Tensors, needed: Sequence[bool]) -> bool:
        """Return whether the forward also computes the gradients.

        It does not with ``reduction="none"``, since the upstream gradients per row are not known
        yet.  In half precision it sums them in float32.  Unless the caller accepts that by
        ``accumulate="weight"``, the sum of a weight's gradient must fit into half of the budget.
        """
        if self.spec.reduction == "none" or self.accumulate == "rows":
            return False
        x, weight, _, t, t_weight, _ = tensors[:N_HEAD_TENSORS]
        assert x is not None and weight is not None
        # The gradient of given logits is as large as all logits, so it has no sum in float32.
        given = needed[3] and t is not None and t_weight is None and t.dtype.itemsize == 2
        if self.accumulate == "weight":
            if given:
                raise ValueError(
                    "accumulate='weight' gives no gradient to a target of logits in half "
                    f"precision, got {t.dtype if t is not None else None}: detach it, make it "
                    "float32, or use accumulate=None"
                )
            return True
        layers = ((weight, needed[1]), (t_weight, needed[4]))
        halves = [v for v, need in layers if need and v is not None and v.dtype.itemsize == 2]
        if given or not halves:
            return not given
        beyond = sum(4 * v.shape[0] * v.shape[1] for v in halves)
        itemsize = bytes_of_logit(x, self.logits_dtype)
        budget = budget_of(x.shape[0], weight.shape[0], itemsize, device_of(x))
        return is_true(2 * beyond <= budget)

    def backward(
        self,
        grad: Tensor,
        tensors: Tensors,
        kept: Sequence[Tensor],
        needed: Sequence[bool],
        symbolic: Tensor | None,
    ) -> Sequence[Tensor | None]:
        """See ``LossCall``."""
        options = row_ops.packed(self.spec, symbolic)
        of_tiles = (self.chunk_size, self.logits_dtype)
        return ops.backward(grad.contiguous(), *kept, *tensors, *options, *of_tiles, needed)

    def differentiable_value(self, tensors: Tensors) -> Tensor:
        """See ``LossCall``."""
        return _of_whole_logits(LinearCall(self.spec, logits_dtype=self.logits_dtype), tensors)[0]


def linear_loss(call: LinearCall, *tensors: Tensor | None) -> tuple[Tensor, Stats | None]:
    """Compute the loss, reduced as the spec says, and statistics if the call asks for them."""
    tensors = savable(*tensors)
    x = tensors[0]
    assert x is not None
    if is_transformed() or not use_kernel(x):
        return _of_whole_logits(call, tensors)
    flops.tell_counters()
    value, stats, argmax = run(call, tensors)
    return value, row_ops.stats_of(stats, argmax) if call.stats else None


def _of_whole_logits(call: LinearCall, tensors: Tensors) -> tuple[Tensor, Stats | None]:
    x, weight, bias, t, t_weight, t_bias, scale, label, class_weight, row_weight, mask = tensors
    assert x is not None and weight is not None
    x = whole_logits(x, weight, bias, call.logits_dtype)
    if t is not None:
        t = t if t_weight is None else whole_logits(t, t_weight, t_bias, call.logits_dtype)
        dtype = torch.promote_types(x.dtype, t.dtype)
        x, t = x.to(dtype), arguments.as_rows(t.to(dtype), 1)
    rows = (arguments.as_rows(x, 1), t, label, class_weight, row_weight)
    if call.stats:
        return row_loss_and_stats(call.spec, *rows, scale=scale, mask=mask)
    return row_loss(call.spec, *rows, scale=scale, mask=mask), None
