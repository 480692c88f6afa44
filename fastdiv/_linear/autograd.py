"""Linear losses as torch sees them: one autograd.Function, and where it does not serve.

Where a transform of torch.func is active, or no kernel fits, the loss of ``F.linear`` is taken
instead, its logits held whole; second derivatives, and a vmap over upstream gradients, are those of
that, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._engine import arguments
from .._engine.autograd import is_differentiated, row_loss, row_loss_and_stats
from .._engine.backend import use_kernel
from .._engine.inference import savable
from .._engine.torch_private import is_transformed
from ..reference import Stats
from . import flops, ops
from .ops import HEADS, LinearCall, Tensors


def linear_loss(call: LinearCall, *tensors: Tensor | None) -> tuple[Tensor, Stats | None]:
    """The loss, reduced as the spec says, and statistics if the call asks for them."""
    tensors = savable(*tensors)
    x, given = tensors[0], tensors[:HEADS]
    assert x is not None
    if is_transformed() or not use_kernel(x):
        return _unfused(call, *tensors)
    flops.tell_counters()
    recording = torch.is_grad_enabled()
    needed = tuple(recording and v is not None and v.requires_grad for v in given)
    symbolic = call.symbolic()
    if not any(needed):
        out = ops.forward(*tensors, *call.options(symbolic), needed, symbolic)
        value, _, _, stats, argmax = out[:5]
    elif torch.compiler.is_compiling():
        value, stats, argmax = _TracedLinearLoss.apply(call, needed, symbolic, *tensors)
    else:
        value, stats, argmax = _LinearLoss.apply(call, needed, symbolic, *tensors)
    return value, Stats(stats[0], stats[1], argmax, stats[2]) if call.stats else None


def _unfused(call: LinearCall, *tensors: Tensor | None) -> tuple[Tensor, Stats | None]:
    x, weight, bias, t, t_weight, t_bias, label, class_weight, row_weight = tensors
    assert x is not None and weight is not None
    x = F.linear(x, weight, bias)
    if t is not None:
        t = t if t_weight is None else F.linear(t, t_weight, t_bias)
        dtype = torch.promote_types(x.dtype, t.dtype)
        x, t = x.to(dtype), arguments.as_rows(t.to(dtype), 1)
    rows = (arguments.as_rows(x, 1), t, label, class_weight, row_weight)
    if call.stats:
        return row_loss_and_stats(call.spec, *rows)
    return row_loss(call.spec, *rows), None


def _at_once(call: LinearCall, tensors: Tensors) -> bool:
    """Whether the gradients are computed with the value.

    Not for what comes from upstream for each row; nor for halves: their weight's gradient would
    need a second, larger one to be summed in, and a loss scale that comes later could not save
    what is too small for them.
    """
    head = [v for v in tensors[:HEADS] if v is not None]
    return call.spec.reduction != "none" and all(v.dtype.itemsize > 2 for v in head)


def _forward_of(
    ctx: Any,
    call: LinearCall,
    needed: tuple[bool, ...],
    symbolic: Tensor | None,
    tensors: Tensors,
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensors, list[Tensor]]:
    """What a forward returns, what it saves, and the gradients if they are computed with it."""
    ctx.call, ctx.needed, ctx.at_once = call, needed, _at_once(call, tensors)
    at_once = needed if ctx.at_once else (False,) * HEADS
    out = ops.forward(*tensors, *call.options(symbolic), at_once, symbolic)
    value, divisor, record, stats, argmax, *gradients = out
    ctx.mark_non_differentiable(stats, argmax)
    return (value, stats, argmax), (*tensors, symbolic, divisor, record), gradients


class _TracedLinearLoss(torch.autograd.Function):
    """The form that ``torch.compile`` can trace."""

    @staticmethod
    def forward(
        ctx: Any,
        call: LinearCall,
        needed: tuple[bool, ...],
        symbolic: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, saved, gradients = _forward_of(ctx, call, needed, symbolic, tensors)
        ctx.save_for_backward(*saved, *gradients)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors[: HEADS + 3]
        symbolic, divisor, record, *gradients = ctx.saved_tensors[HEADS + 3 :]
        if ctx.at_once:
            gradients = [g * grad for g in gradients]
        else:
            gradients = _recomputed(ctx, grad, divisor, record, tensors, symbolic)
        return _for_apply(ctx, gradients)


class _LinearLoss(_TracedLinearLoss):
    """The same with second derivatives, and without a copy of the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        call: LinearCall,
        needed: tuple[bool, ...],
        symbolic: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, saved, ctx.gradients = _forward_of(ctx, call, needed, symbolic, tensors)
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (HEADS + 6)
        *tensors, _, divisor, record = ctx.saved_tensors
        if is_differentiated(grad):
            return _for_apply(ctx, _differentiable(ctx, grad, tensors))
        if not ctx.at_once:
            return _for_apply(ctx, _recomputed(ctx, grad, divisor, record, tensors))
        # They go to whoever asks first; another backward through a retained graph makes new ones.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            gradients = ops.forward(*tensors, *ctx.call.options(), ctx.needed)[5:]
        # Where looking costs nothing, as on a CPU, an upstream of 1 saves a sweep over them.
        if not (grad.is_cpu and arguments.values_may_be_read(grad) and grad == 1):
            gradients = [g.mul_(grad) for g in gradients]
        return _for_apply(ctx, gradients)


def _recomputed(
    ctx: Any,
    grad: Tensor,
    divisor: Tensor,
    record: Tensor,
    tensors: Sequence[Tensor | None],
    symbolic: Tensor | None = None,
) -> list[Tensor]:
    ints, floats, _, chunk = ctx.call.options(symbolic)
    return ops.backward(
        grad.contiguous(), divisor, record, *tensors, ints, floats, chunk, ctx.needed, symbolic
    )


def _differentiable(
    ctx: Any, grad: Tensor, tensors: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients that may be differentiated or batched, from logits that are held whole."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Each its own alias: one tensor in two places would get the gradient of both twice.
        own = [None if v is None else v.view_as(v) for v in tensors]
        value, _ = _unfused(LinearCall(ctx.call.spec), *own)
    wanted = [v for v, need in zip(own, ctx.needed, strict=False) if need and v is not None]
    found = iter(torch.autograd.grad(value, wanted, grad, create_graph=create_graph))
    return [next(found) if need else None for need in ctx.needed]


def _for_apply(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """One for each argument of ``apply``."""
    of_heads = (g if need else None for g, need in zip(gradients, ctx.needed, strict=True))
    return None, None, None, *of_heads, None, None, None
