"""The one autograd.Function of all losses: kernels for values and first derivatives.

Everything above this module speaks of losses, everything below of rows.  Second derivatives are
those of ``reference.loss``, which is what the kernels compute.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..reference import Spec, Stats
from . import ops
from .backend import use_kernel
from .inference import savable
from .op_loss import overwritten, refuse_second_derivative, run
from .symbolic_ops import SymbolicCall
from .torch_private import is_transformed, light_apply, unwrap_if_dead


def row_loss(
    spec: Spec,
    x: Tensor,
    t: Tensor | None = None,
    label: Tensor | None = None,
    class_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
) -> Tensor:
    """The loss of a matrix of logits ``[R, C]``, reduced as the spec says."""
    rows = savable(x, t, label, class_weight, row_weight)
    if not use_kernel(x, spec.reduction == "pointwise"):
        return reference.loss(spec, *rows)
    transformed = is_transformed()
    if torch.compiler.is_compiling():
        # Dynamo cannot trace a function of ours under vmap; operations of torch's it can.
        return reference.loss(spec, *rows) if transformed else _traced(spec, False, rows)[0]
    if transformed:
        return _RowLoss.apply(spec, False, *rows)[0]
    return _apply_eager(spec, False, *[v if v is None else unwrap_if_dead(v) for v in rows])


def row_loss_and_stats(
    spec: Spec,
    x: Tensor,
    t: Tensor | None = None,
    label: Tensor | None = None,
    class_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """The loss, and statistics of its rows from the same pass."""
    rows = savable(x, t, label, class_weight, row_weight)
    if not use_kernel(x):
        return reference.loss(spec, *rows), reference.stats(spec, x, t, label, row_weight)
    if torch.compiler.is_compiling():
        value, _, _, stats, argmax = _traced(spec, True, rows)
    else:
        value, _, _, stats, argmax = _RowLoss.apply(spec, True, *rows)
    lse, entropy, log_prob = stats.unbind(0)
    return value, Stats(lse, entropy, argmax, log_prob)


def _traced(spec: Spec, stats: bool, rows: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """What Dynamo sees; a function without gradient it would call with an argument too many."""
    differentiable = torch.is_grad_enabled() and any(
        v is not None and v.requires_grad for v in rows[:2]
    )
    if ops.symbolic_floats(spec) is not None:
        return tuple(run(SymbolicCall(spec, stats), rows))
    if differentiable:
        return _TracedRowLoss.apply(spec, stats, *rows)
    return _TracedRowLoss.forward(spec, stats, *rows)


class _TracedRowLoss(torch.autograd.Function):
    """One function for every loss; this form of it is what ``torch.compile`` can trace."""

    generate_vmap_rule = True

    @staticmethod
    def forward(spec: Spec, stats: bool, *rows: Tensor | None) -> tuple[Tensor, ...]:
        op = ops.forward_stats if stats else ops.forward
        return op(*rows, *ops.options(spec, stats))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.spec, _, *rows = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*rows, *output[1:3])
        ctx.save_for_forward(*rows, *output[1:3])
        ctx.outputs = len(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        need_x, need_t = ctx.needs_input_grad[2:4]
        dx, dt = ops.backward(
            grad.contiguous(), *ctx.saved_tensors, *ops.options(ctx.spec), need_x, need_t
        )
        return None, None, dx if need_x else None, dt if need_t else None, None, None, None


class _RowLoss(_TracedRowLoss):
    """The same with what Dynamo does not trace: in place, second and forward-mode derivatives."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        need_x, need_t = ctx.needs_input_grad[2:4]
        if ctx.spec.inplace and need_x:
            dx, dt = _backward_in_place(ctx.spec, grad, ctx.saved_tensors, need_t)
        elif torch.is_grad_enabled():  # create_graph=True, or a torch.func transform
            dx, dt = _RowLossBackward.apply(ctx.spec, need_x, need_t, grad, *ctx.saved_tensors)
        else:
            return _TracedRowLoss.backward(ctx, grad)
        return None, None, dx if need_x else None, dt if need_t else None, None, None, None

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _TracedRowLoss.setup_context(ctx, inputs, output)
        ctx.set_materialize_grads(False)  # of the record, which has none

    @staticmethod
    def jvp(ctx: Any, _spec: None, _stats: None, *tangents: Tensor | None) -> tuple[Any, ...]:
        # The gradient of every row by the kernel, times the tangents.  (A torch.func.jvp here would
        # nest forward modes, which gradcheck refuses.)
        spec, (dx, dt) = ctx.spec, tangents[:2]
        *rows, record, divisor = ctx.saved_tensors
        x = rows[0]
        each = spec._replace(reduction="none", inplace=False)
        value = x.new_zeros(x.shape[0], dtype=record.dtype)

        def tangent(grad: Tensor) -> Tensor:
            gx, gt = _RowLossBackward.apply(
                each, dx is not None, dt is not None, grad, *rows, record, divisor
            )
            out = torch.zeros_like(value)
            for g, d in ((gx, dx), (gt, dt)):
                if d is not None:
                    out = out + (g.to(value.dtype) * d.to(value.dtype)).sum(-1)
            return out

        one, zero = torch.ones_like(value), torch.zeros_like(value)
        if spec.loss == "log_prob_and_entropy":
            out = torch.stack(
                [tangent(torch.stack([one, zero])), tangent(torch.stack([zero, one]))]
            )
        else:
            out = tangent(one)
        if spec.reduction != "none":
            out = out.sum() / divisor
        return (out, *[None] * (ctx.outputs - 1))


class _EagerRowLoss(_RowLoss):
    """The same in the form that costs least to call; no transform may be active."""

    setup_context = torch.autograd.Function.setup_context

    @staticmethod
    def forward(ctx: Any, spec: Spec, _: bool, *rows: Tensor | None) -> Tensor:  # type: ignore[override]
        options = ops.options(spec)
        value, record, divisor = ops.forward(*rows, *options)
        ctx.spec, ctx.options = spec, options
        ctx.save_for_backward(*rows, record, divisor)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None or ctx.spec.inplace or torch.is_grad_enabled():
            return _RowLoss.backward(ctx, grad)
        need_x, need_t = ctx.needs_input_grad[2:4]
        grad = grad.contiguous()
        dx, dt = ops.backward(grad, *ctx.saved_tensors, *ctx.options, need_x, need_t)
        return None, None, dx if need_x else None, dt if need_t else None, None, None, None


_apply_eager = light_apply(_EagerRowLoss)


class _RowLossBackward(torch.autograd.Function):
    """The backward kernel, differentiable in turn through the reference formulas."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        spec: Spec, need_x: bool, need_t: bool, grad: Tensor, *saved: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return ops.backward(grad.contiguous(), *saved, *ops.options(spec), need_x, need_t)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.spec, ctx.need_x, ctx.need_t, grad, *saved = inputs
        ctx.save_for_backward(grad, *saved[:5])
        ctx.save_for_forward(grad, *saved[:5])

    @staticmethod
    def _reference(ctx: Any) -> tuple[Any, list[Tensor]]:
        """The reference gradient, and what it is a function of: upstream gradient, x and t.

        Of all of them, also of a side that needs no gradient here: an outer transform may.
        """
        grad, x, t, label, class_weight, row_weight = ctx.saved_tensors
        need_x, need_t = ctx.need_x, ctx.need_t

        def gradient(grad: Tensor, *sides: Tensor) -> tuple[Tensor, ...]:
            def loss(*needed: Tensor) -> Tensor:
                rest = list(needed)
                xs = rest.pop(0) if need_x else sides[0]
                ts = None if t is None else rest.pop(0) if need_t else sides[1]
                return reference.loss(ctx.spec, xs, ts, label, class_weight, row_weight)

            needed = [v for v, need in zip(sides, (need_x, need_t), strict=False) if need]
            return torch.func.vjp(loss, *needed)[1](grad)

        return gradient, [grad, x] if t is None else [grad, x, t]

    @staticmethod
    def backward(ctx: Any, ddx: Tensor, ddt: Tensor) -> tuple[Tensor | None, ...]:
        gradient, inputs = _RowLossBackward._reference(ctx)
        cotangents = tuple(d for d, need in ((ddx, ctx.need_x), (ddt, ctx.need_t)) if need)
        dgrad, dx, *dt = torch.func.vjp(gradient, *inputs)[1](cotangents)
        return None, None, None, dgrad, dx, dt[0] if dt else None, *[None] * 5

    @staticmethod
    def jvp(ctx: Any, _s: None, _nx: None, _nt: None, *tangents: Tensor | None) -> tuple[Any, ...]:
        gradient, inputs = _RowLossBackward._reference(ctx)
        # What is expanded (from a sum, say) must be cloned for forward over reverse.
        inputs = [v.clone() for v in inputs]
        given = tangents[: len(inputs)]
        filled = [
            torch.zeros_like(v) if d is None else d.clone()
            for v, d in zip(inputs, given, strict=True)
        ]
        out = list(torch.func.jvp(gradient, tuple(inputs), tuple(filled))[1])
        empty = inputs[1].new_empty(0)
        return (
            out.pop(0) if ctx.need_x else empty,
            out.pop(0) if ctx.need_t else empty,
        )


def _backward_in_place(
    spec: Spec, grad: Tensor, saved: tuple[Tensor | None, ...], need_t: bool
) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled():
        refuse_second_derivative()
    x = saved[0]
    assert x is not None
    dt = ops.backward_in_place(grad.contiguous(), *saved, *ops.options(spec), need_t)
    return overwritten(x), dt
