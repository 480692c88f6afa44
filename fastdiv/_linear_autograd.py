"""Linear losses as torch sees them: two private ops, fakes for the compiler, one autograd.Function.

The ops are Python around the loops of ``_linear``; what happens inside is hidden from autograd,
autocast and the compiler.  Where a transform of torch.func is active, or no kernel fits, the loss
of ``F.linear`` is taken instead, its logits held whole; second derivatives are those of that, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import _check, _ops, reference
from ._autograd import row_loss, row_loss_and_stats
from ._backend import use_kernel
from ._linear import Gradients, Head, Problem, by_classes, by_rows
from .reference import Spec, Stats, value_dtype

# input, linear_weight, linear_bias; the target with a weight and a bias if it is hidden states;
# label, class_weight, row_weight
Tensors = tuple[Tensor | None, ...]
HEADS = 6  # the first of them may need a gradient


@dataclass
class LinearCall:
    """A linear loss with all of its options that are not tensors."""

    spec: Spec
    stats: bool = False
    chunk_size: int = 0

    def options(self) -> tuple[list[int], list[float], int, int]:
        """What the ops take after their tensors."""
        options = _ops.options(self.spec)
        with_stats = _ops.options(self.spec, stats=True)[0] if self.stats else -1
        ints = len(options) - sum(isinstance(o, float) for o in options)
        return list(options[:ints]), list(options[ints:]), with_stats, self.chunk_size


def linear_loss(call: LinearCall, *tensors: Tensor | None) -> tuple[Tensor, Stats | None]:
    """The loss, reduced as the spec says, and statistics if the call asks for them."""
    x, given = tensors[0], tensors[:HEADS]
    assert x is not None
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if transformed or not use_kernel(x):
        return _unfused(call, *tensors)
    tracing = torch.is_grad_enabled()
    needed = tuple(tracing and v is not None and v.requires_grad for v in given)
    if not any(needed):
        value, _, _, stats, argmax = _forward(*tensors, *call.options(), needed)[:5]
    elif torch.compiler.is_compiling():
        value, stats, argmax = _TracedLinearLoss.apply(call, needed, *tensors)
    else:
        value, stats, argmax = _LinearLoss.apply(call, needed, *tensors)
    return value, Stats(stats[0], stats[1], argmax, stats[2]) if call.stats else None


def _unfused(call: LinearCall, *tensors: Tensor | None) -> tuple[Tensor, Stats | None]:
    x, weight, bias, t, t_weight, t_bias, label, class_weight, row_weight = tensors
    assert x is not None and weight is not None
    x = F.linear(x, weight, bias)
    if t is not None:
        t = t if t_weight is None else F.linear(t, t_weight, t_bias)
        dtype = torch.promote_types(x.dtype, t.dtype)
        x, t = x.to(dtype), t.to(dtype)
    rows = (x, t, label, class_weight, row_weight)
    if call.stats:
        return row_loss_and_stats(call.spec, *rows)
    return row_loss(call.spec, *rows), None


# --- the ops ----------------------------------------------------------------------------------


def _problem(tensors: Tensors, ints: Sequence[int], floats: Sequence[float], chunk: int) -> Problem:
    x, weight, bias, t, t_weight, t_bias, label, class_weight, row_weight = tensors
    assert x is not None
    teacher = None if t is None else Head(t, t_weight, t_bias)
    options = _ops.of_each_row([*ints, *floats])
    return Problem(Head(x, weight, bias), teacher, label, class_weight, row_weight, options, chunk)


def _gradients(p: Problem, needed: Sequence[bool]) -> list[Gradients]:
    """Of both sides; none where neither needs any."""
    if not any(needed):
        return []
    student = Gradients(p.student, needed[:3])
    if p.teacher is None or not any(needed[3:]):
        return [student]
    return [student, Gradients(p.teacher, needed[3:])]


def _results(x: Tensor, gradients: list[Gradients]) -> list[Tensor]:
    found = [d for g in gradients for d in g.results()]
    return found + [x.new_empty(0) for _ in range(HEADS - len(found))]


def _divisor(tensors: Tensors, ints: Sequence[int]) -> Tensor | int:
    """What the sum of the rows is divided by."""
    x, weight, label, class_weight, row_weight = *tensors[:2], *tensors[HEADS:]
    assert x is not None and weight is not None
    reduction = ints[_ops.REDUCTION]
    if reduction != _ops.REDUCTIONS["mean"]:
        return ints[_ops.BATCH] if reduction == _ops.REDUCTIONS["batchmean"] else 1
    logits = x.new_empty(()).expand(len(x), len(weight))  # for its shape
    ignored = ints[_ops.IGNORE_INDEX]
    weights = reference.mean_weights(ignored, logits, label, class_weight, row_weight)
    return weights.sum(dtype=torch.float64)


@torch.library.custom_op("fastdiv::_linear_forward", mutates_args=())
def _forward(
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
    loss_with_stats: int,
    chunk_size: int,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Value, divisor, record, statistics, argmax and the gradients that are needed."""
    tensors = (x, weight, bias, t, t_weight, t_bias, label, class_weight, row_weight)
    ignored = ints[_ops.IGNORE_INDEX]
    if label is not None and label.is_cpu:
        named = ("index", None) if ignored == _check.NO_LABEL_IGNORED else ("target", ignored)
        _check.check_labels(label, len(weight), *named)
    p = _problem(tensors, ints, floats, chunk_size)
    divisor = torch.as_tensor(_divisor(tensors, ints), dtype=torch.float64, device=x.device)
    upstream = (1 / divisor).to(p.weight.dtype).expand(p.rows) if any(needed) else None
    with torch.autocast(x.device.type, enabled=False):
        gradients = _gradients(p, needed)
        out = by_rows(p, loss_with_stats, upstream, gradients)
    value = out.value
    if _ops.reduces(ints):
        value = (value.sum(dtype=torch.float64) / divisor).to(value.dtype)
    return [value, divisor, out.record, out.stats, out.argmax, *_results(x, gradients)]


@_forward.register_fake
def _(x, weight, bias, t, t_weight, t_bias, label, cw, rw, ints, floats, with_stats, _, needed):  # type: ignore[no-untyped-def]
    rows = x.shape[0]
    dtype = value_dtype(x.dtype if t is None else torch.promote_types(x.dtype, t.dtype))
    with_rows = rows if with_stats >= 0 else 0
    return [
        x.new_empty(_ops.value_shape(ints, rows), dtype=dtype),
        x.new_empty((), dtype=torch.float64),
        x.new_empty((0 if any(needed) else rows, _ops.RECORD_SIZE), dtype=dtype),
        x.new_empty((3, with_rows), dtype=dtype),
        x.new_empty((with_rows,), dtype=torch.int64),
        *_fake_gradients((x, weight, bias, t, t_weight, t_bias), needed),
    ]


@torch.library.custom_op("fastdiv::_linear_backward", mutates_args=())
def _backward(
    grad: Tensor,
    divisor: Tensor,
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
    chunk_size: int,
    needed: Sequence[bool],
) -> list[Tensor]:
    """The gradients that are needed, from the records of the rows."""
    tensors = (x, weight, bias, t, t_weight, t_bias, label, class_weight, row_weight)
    p = _problem(tensors, ints, floats, chunk_size)
    if _ops.reduces(ints):
        grad = (grad / divisor).to(grad.dtype).expand(p.rows)
    with torch.autocast(x.device.type, enabled=False):
        gradients = _gradients(p, needed)
        by_classes(p, grad, record, gradients)
    return _results(x, gradients)


@_backward.register_fake
def _(grad, divisor, record, x, weight, bias, t, t_weight, t_bias, label, cw, rw, i, f, _, needed):  # type: ignore[no-untyped-def]
    return _fake_gradients((x, weight, bias, t, t_weight, t_bias), needed)


def _fake_gradients(tensors: Tensors, needed: Sequence[bool]) -> list[Tensor]:
    x = tensors[0]
    assert x is not None
    return [
        x.new_empty(0) if v is None or not need else v.new_empty(v.shape)
        for v, need in zip(tensors, needed, strict=True)
    ]


# --- autograd ---------------------------------------------------------------------------------


def _at_once(call: LinearCall, tensors: Tensors) -> bool:
    """Whether the gradients are computed with the value.

    Not for what comes from upstream for each row; nor for halves: their weight's gradient would
    need a second, larger one to be summed in, and a loss scale that comes later could not save
    what is too small for them.
    """
    head = [v for v in tensors[:HEADS] if v is not None]
    return call.spec.reduction != "none" and all(v.dtype.itemsize > 2 for v in head)


def _forward_of(
    ctx: Any, call: LinearCall, needed: tuple[bool, ...], tensors: Tensors
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensors, list[Tensor]]:
    """What a forward returns, what it saves, and the gradients if they are computed with it."""
    ctx.call, ctx.needed, ctx.at_once = call, needed, _at_once(call, tensors)
    at_once = needed if ctx.at_once else (False,) * HEADS
    out = _forward(*tensors, *call.options(), at_once)
    value, divisor, record, stats, argmax, *gradients = out
    ctx.mark_non_differentiable(stats, argmax)
    return (value, stats, argmax), (*tensors, divisor, record), gradients


class _TracedLinearLoss(torch.autograd.Function):
    """The form that ``torch.compile`` can trace."""

    @staticmethod
    def forward(
        ctx: Any, call: LinearCall, needed: tuple[bool, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, saved, gradients = _forward_of(ctx, call, needed, tensors)
        ctx.save_for_backward(*saved, *gradients)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors[: HEADS + 3]
        divisor, record, *gradients = ctx.saved_tensors[HEADS + 3 :]
        if ctx.at_once:
            gradients = [g * grad for g in gradients]
        else:
            gradients = _recomputed(ctx, grad, divisor, record, tensors)
        return _for_apply(ctx, gradients)


class _LinearLoss(_TracedLinearLoss):
    """The same with second derivatives, and without a copy of the gradients."""

    @staticmethod
    def forward(
        ctx: Any, call: LinearCall, needed: tuple[bool, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, saved, ctx.gradients = _forward_of(ctx, call, needed, tensors)
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (HEADS + 5)
        *tensors, divisor, record = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _for_apply(ctx, _differentiable(ctx, grad, tensors))
        if not ctx.at_once:
            return _for_apply(ctx, _recomputed(ctx, grad, divisor, record, tensors))
        # They go to whoever asks first; another backward through a retained graph makes new ones.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            gradients = _forward(*tensors, *ctx.call.options(), ctx.needed)[5:]
        if not (grad.is_cpu and grad == 1):
            gradients = [g.mul_(grad) for g in gradients]
        return _for_apply(ctx, gradients)


def _recomputed(
    ctx: Any, grad: Tensor, divisor: Tensor, record: Tensor, tensors: Sequence[Tensor | None]
) -> list[Tensor]:
    ints, floats, _, chunk = ctx.call.options()
    return _backward(grad.contiguous(), divisor, record, *tensors, ints, floats, chunk, ctx.needed)


def _differentiable(
    ctx: Any, grad: Tensor, tensors: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients with a graph of their own, from logits that are held whole."""
    # Each its own alias: one tensor in two places would get the gradient of both twice.
    own = [None if v is None else v.view_as(v) for v in tensors]
    value, _ = _unfused(LinearCall(ctx.call.spec), *own)
    wanted = [v for v, need in zip(own, ctx.needed, strict=False) if need and v is not None]
    found = iter(torch.autograd.grad(value, wanted, grad, create_graph=True))
    return [next(found) if need else None for need in ctx.needed]


def _for_apply(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """One for each argument of ``apply``."""
    of_heads = (g if need else None for g, need in zip(gradients, ctx.needed, strict=True))
    return None, None, *of_heads, None, None, None
