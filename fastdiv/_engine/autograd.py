"""The autograd.Functions of losses of whole rows.

Values and first derivatives come from kernels; ``second_derivative.py`` has the second.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..reference import OF_CLASSES, Rows, Spec, Stats
from . import ops
from .backend import use_kernel
from .inference import savable
from .loss_call import Tensors, overwritten, refuse_second_derivative, run
from .second_derivative import BackwardCall, RowLossBackward
from .symbolic_ops import SymbolicCall
from .temperature import scale_gradient
from .torch_private import is_transformed, light_apply, unwrap_if_dead


@dataclass(frozen=True)
class RowCall:
    """A loss of whole rows with all of its options that are not tensors.

    It wraps the spec, a NamedTuple, because torch.func would take a tuple apart.
    """

    spec: Spec
    stats: bool = False


class EagerCall(NamedTuple):
    """A loss of whole rows where no transform is active."""

    spec: Spec
    options: tuple[Any, ...]  # those of the op

    def run(self, rows: Sequence[Any]) -> Tensor:
        """Compute the loss of the tensors of ``Rows``, unwrapped if dead."""
        if torch.is_grad_enabled():
            return _apply_eager(self, *rows)
        return ops.forward(*rows, *self.options)[0]


class Seen(NamedTuple):
    """A call with its rows and its value."""

    call: EagerCall
    rows: Sequence[Any]
    value: Tensor


class Witness(threading.local):
    """Where ``row_loss`` leaves what it has computed, if ``remember.py`` asks for it."""

    asked = False
    seen: Seen | None = None


witness = Witness()


def row_loss(
    spec: Spec,
    x: Tensor,
    t: Tensor | None = None,
    label: Tensor | None = None,
    class_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute the loss of a matrix of logits ``[R, C]``, reduced as the spec says."""
    rows = savable(*Rows(x, t, scale, label, class_weight, row_weight, mask))
    if not use_kernel(x, spec.reduction == "pointwise"):
        return reference.loss(spec, *rows)
    transformed = is_transformed()
    if transformed and scale is not None:  # its gradient is a loop, which has no rule for vmap
        return reference.loss(spec, *rows)
    if torch.compiler.is_compiling():
        # Dynamo cannot trace our autograd.Function under vmap.  It can trace torch operations.
        return reference.loss(spec, *rows) if transformed else _traced(RowCall(spec), rows)[0]
    if transformed:
        return _RowLoss.apply(RowCall(spec), *rows)[0]
    call = EagerCall(spec, ops.options(spec))
    value = call.run([v if v is None else unwrap_if_dead(v) for v in rows])
    if witness.asked:
        witness.seen = Seen(call, rows, value)
    return value


def row_loss_and_stats(
    spec: Spec,
    x: Tensor,
    t: Tensor | None = None,
    label: Tensor | None = None,
    class_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """Compute the loss, and statistics of its rows in the same pass."""
    rows = savable(*Rows(x, t, scale, label, class_weight, row_weight, mask))
    if not use_kernel(x) or (scale is not None and is_transformed()):
        return reference.loss(spec, *rows), reference.stats(spec, Rows(*rows))
    call = RowCall(spec, stats=True)
    if torch.compiler.is_compiling():
        value, _, _, stats, argmax = _traced(call, rows)
    else:
        value, _, _, stats, argmax = _RowLoss.apply(call, *rows)
    return value, ops.stats_of(stats, argmax)


def _traced(call: RowCall, rows: Tensors) -> tuple[Tensor, ...]:
    """Compute the outputs of the op in the form that Dynamo traces."""
    if ops.symbolic_floats(call.spec) is not None:
        return tuple(run(SymbolicCall(call.spec, call.stats), rows))
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in rows[:3]):
        return _TracedRowLoss.apply(call, *rows)
    # Dynamo would call a Function without gradient with an argument too many.
    return _TracedRowLoss.forward(call, *rows)


def _for_apply(
    ctx: Any, dx: Tensor, dt: Tensor, d_scale: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """Return one gradient for each argument of ``apply``."""
    need_x, need_t, need_scale = ctx.needs_input_grad[1:4]
    gradients = dx if need_x else None, dt if need_t else None, d_scale if need_scale else None
    return None, *gradients, *[None] * (len(Rows._fields) - 3)


def _scale_gradient(ctx: Any, grad: Tensor) -> Tensor | None:
    """Compute the gradient of the rows' scales, if it is needed."""
    return scale_gradient(ctx.spec, grad, *ctx.saved_tensors) if ctx.needs_input_grad[3] else None


class _TracedRowLoss(torch.autograd.Function):
    """The form that ``torch.compile`` can trace."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: RowCall, *rows: Tensor | None) -> tuple[Tensor, ...]:
        op = ops.forward_stats if call.stats else ops.forward
        return op(*rows, *ops.options(call.spec, call.stats))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, *rows = inputs
        ctx.spec, ctx.n_outputs = call.spec, len(output)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*rows, *output[1:3])
        ctx.save_for_forward(*rows, *output[1:3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        needed, options = ctx.needs_input_grad[1:3], ops.options(ctx.spec)
        grad = grad.contiguous()
        dx, dt = ops.backward(grad, *ctx.saved_tensors, *options, *needed)
        return _for_apply(ctx, dx, dt, _scale_gradient(ctx, grad))


class _RowLoss(_TracedRowLoss):
    """The form with what Dynamo cannot trace: in place, second and forward-mode derivatives."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _TracedRowLoss.setup_context(ctx, inputs, output)
        ctx.set_materialize_grads(False)  # the record has no gradient

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (1 + len(Rows._fields))
        need_x, need_t, need_scale = ctx.needs_input_grad[1:4]
        if ctx.spec.inplace and need_x:
            if torch.is_grad_enabled():
                refuse_second_derivative()
            saved, options, grad = ctx.saved_tensors, ops.options(ctx.spec), grad.contiguous()
            d_scale = _scale_gradient(ctx, grad)  # before the logits are overwritten
            dt = ops.backward_in_place(grad, *saved, *options, need_t)
            return _for_apply(ctx, overwritten(saved[0]), dt, d_scale)
        if torch.is_grad_enabled():  # create_graph=True, or a torch.func transform
            call = BackwardCall(ctx.spec, need_x, need_t, need_scale)
            return _for_apply(ctx, *RowLossBackward.apply(call, grad, *ctx.saved_tensors))
        return _TracedRowLoss.backward(ctx, grad)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Any, ...]:
        # Multiply the kernel's gradient of every row by the tangents.  A torch.func.jvp would nest
        # forward modes here, which gradcheck refuses.
        spec = ctx.spec
        *rows, record, divisor = ctx.saved_tensors
        x, label = rows[0], Rows(*rows).label
        given = tangents[:3]
        each = spec._replace(reduction="none", inplace=False)
        call = BackwardCall(each, *(d is not None for d in given))
        shape = ops.value_shape(each, x.shape[0], label)
        dtype = ops.value_dtype_of(each, x)

        def tangent(grad: Tensor) -> Tensor:
            out = record.new_zeros(x.shape[0], dtype=dtype)
            gradients = RowLossBackward.apply(call, grad, *rows, record, divisor)
            for g, d in zip(gradients, given, strict=True):
                if d is not None:
                    of_rows = g.to(dtype) * d.to(dtype)
                    out = out + (of_rows.sum(-1) if of_rows.dim() > 1 else of_rows)
            return out

        # A row with several values has a tangent for each.
        one = record.new_ones(x.shape[0], dtype=dtype)
        if len(shape) == 1:
            out = tangent(one)
        else:
            dim = 1 if spec.loss in OF_CLASSES else 0
            parts = torch.eye(shape[dim], dtype=dtype, device=x.device)
            upstream = [torch.stack([one * v for v in part], dim) for part in parts]
            out = torch.stack([tangent(grad) for grad in upstream], dim)
        if spec.reduction != "none":
            out = out.sum() / divisor
        return (out, *[None] * (ctx.n_outputs - 1))


class _EagerRowLoss(_RowLoss):
    """The form that costs least to call; no transform may be active."""

    setup_context = torch.autograd.Function.setup_context

    @staticmethod
    def forward(ctx: Any, call: EagerCall, *rows: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.spec, ctx.options = call
        value, record, divisor = ops.forward(*rows, *call.options)
        ctx.save_for_backward(*rows, record, divisor)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None or ctx.spec.inplace or torch.is_grad_enabled():
            return _RowLoss.backward(ctx, grad)
        need_x, need_t = ctx.needs_input_grad[1:3]
        upstream = grad.contiguous()
        dx, dt = ops.backward(upstream, *ctx.saved_tensors, *ctx.options, need_x, need_t)
        return _for_apply(ctx, dx, dt, _scale_gradient(ctx, upstream))


_apply_eager = light_apply(_EagerRowLoss)
