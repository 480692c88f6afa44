"""From matrices of logits to a differentiable loss: the ops, their fakes and the autograd.Function.

Everything above this module speaks of losses, everything below of rows.  The kernels give values and
first derivatives; second derivatives are those of ``reference.loss``, which the kernels compute.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._backend import _C, use_kernel
from .reference import Spec, Stats, value_dtype

RECORD_SIZE = 8  # numbers a row that the forward leaves for the backward: Row in row_state.h

_LOSS_IDS = {} if _C is None else {name: i for i, name in enumerate(_C.loss_names())}
_TARGET_TYPES = {"none": 0, "logits": 1, "log_probs": 2, "probs": 3}
_REDUCTIONS = {"none": 0, "sum": 1, "mean": 2, "batchmean": 3}

if _C is not None:
    _forward_op = torch.ops.fastdiv._row_forward.default
    _forward_stats_op = torch.ops.fastdiv._row_forward_stats.default
    _backward_op = torch.ops.fastdiv._row_backward.default
    _backward_in_place_op = torch.ops.fastdiv._row_backward_.default


def _options(spec: Spec, stats: bool = False, reduction: str | None = None) -> tuple[Any, ...]:
    """The options of an op, in the order of FD_OPTIONS_SCHEMA in row_ops.h."""
    return (
        _LOSS_IDS[spec.loss + "_stats" if stats else spec.loss],
        _TARGET_TYPES[spec.target_type],
        _REDUCTIONS[reduction or spec.reduction],
        spec.batch,
        spec.ignore_index,
        spec.scale,
        spec.softcap,
        spec.shape,
        spec.label,
        spec.spread,
        spec.z_loss,
    )


def row_loss(
    spec: Spec,
    x: Tensor,
    t: Tensor | None = None,
    label: Tensor | None = None,
    class_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
) -> Tensor:
    """The loss of a matrix of logits ``[R, C]``, reduced as the spec says."""
    if not use_kernel(x, spec.reduction == "pointwise"):
        return reference.loss(spec, x, t, label, class_weight, row_weight)
    rows = (x, t, label, class_weight, row_weight)
    if torch.compiler.is_compiling():
        return _TracedRowLoss.apply(spec, False, *rows)[0]
    if torch._C._are_functorch_transforms_active():
        return _RowLoss.apply(spec, False, *rows)[0]
    if torch.is_grad_enabled():
        return _apply(spec, False, *rows)[0]
    return _forward_op(*rows, *_options(spec))[0]


def row_loss_and_stats(
    spec: Spec,
    x: Tensor,
    t: Tensor | None = None,
    label: Tensor | None = None,
    class_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """The loss, and statistics of its rows from the same pass."""
    rows = (x, t, label, class_weight, row_weight)
    if not use_kernel(x):
        return reference.loss(spec, *rows), reference.stats(spec, x, t, label)
    function = _TracedRowLoss if torch.compiler.is_compiling() else _RowLoss
    value, _, _, stats, argmax = function.apply(spec, True, *rows)
    lse, entropy, log_prob = stats.unbind(0)
    return value, Stats(lse, entropy, argmax, log_prob)


class _TracedRowLoss(torch.autograd.Function):
    """One function for every loss; this form of it is what ``torch.compile`` can trace."""

    generate_vmap_rule = True

    @staticmethod
    def forward(spec: Spec, stats: bool, *rows: Tensor | None) -> tuple[Tensor, ...]:
        op = _forward_stats_op if stats else _forward_op
        return op(*rows, *_options(spec, stats))

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
        dx, dt = _backward_op(
            grad.contiguous(), *ctx.saved_tensors, *_options(ctx.spec), need_x, need_t
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
        *rows, record, total = ctx.saved_tensors
        x = rows[0]
        each = replace(spec, reduction="none", inplace=False)
        value = x.new_zeros(x.shape[0], dtype=record.dtype)

        def tangent(grad: Tensor) -> Tensor:
            gx, gt = _RowLossBackward.apply(
                each, dx is not None, dt is not None, grad, *rows, record, total
            )
            out = torch.zeros_like(value)
            for g, d in ((gx, dx), (gt, dt)):
                if d is not None:
                    out = out + (g.to(value.dtype) * d.to(value.dtype)).sum(-1)
            return out

        one, zero = torch.ones_like(value), torch.zeros_like(value)
        if spec.loss == "log_prob_and_entropy":
            out = torch.stack([tangent(torch.stack([one, zero])), tangent(torch.stack([zero, one]))])
        else:
            out = tangent(one)
        if spec.reduction != "none":
            out = out.sum() / total
        return (out, *[None] * (ctx.outputs - 1))


# Function.apply looks up the signature of forward at every call, for longer than all of the rest
# takes; what it then calls does not, and is enough where no torch.func transform is active.
_apply = super(torch.autograd.Function, _RowLoss).apply


class _RowLossBackward(torch.autograd.Function):
    """The backward kernel, differentiable in turn through the reference formulas."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        spec: Spec, need_x: bool, need_t: bool, grad: Tensor, *saved: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return _backward_op(
            grad.contiguous(), *saved, *_options(spec), need_x, need_t
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.spec, ctx.need_x, ctx.need_t, grad, *saved = inputs
        ctx.save_for_backward(grad, *saved[:5])
        ctx.save_for_forward(grad, *saved[:5])

    @staticmethod
    def _reference(ctx: Any) -> tuple[Any, list[Tensor]]:
        """The reference gradient as a function of upstream gradient and needed rows."""
        grad, x, t, label, class_weight, row_weight = ctx.saved_tensors
        needed = [v for v, need in ((x, ctx.need_x), (t, ctx.need_t)) if need]

        def gradient(grad: Tensor, *needed: Tensor) -> tuple[Tensor, ...]:
            def loss(*needed: Tensor) -> Tensor:
                rest = list(needed)
                xs = rest.pop(0) if ctx.need_x else x
                ts = rest.pop(0) if ctx.need_t else t
                return reference.loss(ctx.spec, xs, ts, label, class_weight, row_weight)

            return torch.func.vjp(loss, *needed)[1](grad)

        return gradient, [grad, *needed]

    @staticmethod
    def backward(ctx: Any, ddx: Tensor, ddt: Tensor) -> tuple[Tensor | None, ...]:
        gradient, inputs = _RowLossBackward._reference(ctx)
        cotangents = tuple(d for d, need in ((ddx, ctx.need_x), (ddt, ctx.need_t)) if need)
        dgrad, *rest = torch.func.vjp(gradient, *inputs)[1](cotangents)
        dx = rest.pop(0) if ctx.need_x else None
        dt = rest.pop(0) if ctx.need_t else None
        return None, None, None, dgrad, dx, dt, *[None] * 5

    @staticmethod
    def jvp(ctx: Any, _s: None, _nx: None, _nt: None, *tangents: Tensor | None) -> tuple[Any, ...]:
        gradient, inputs = _RowLossBackward._reference(ctx)
        dgrad, dx, dt = tangents[:3]
        given = [dgrad, *[d for d, need in ((dx, ctx.need_x), (dt, ctx.need_t)) if need]]
        # Expanded tangents (of a sum, say) must be cloned for forward over reverse.
        filled = [torch.zeros_like(v) if d is None else d.clone() for v, d in zip(inputs, given)]
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
        raise RuntimeError(
            "inplace_backward=True overwrites the logits, of which a second derivative "
            "(create_graph=True, torch.func) has need: call the loss with inplace_backward=False"
        )
    x = saved[0]
    assert x is not None
    dt = _backward_in_place_op(
        grad.contiguous(), *saved, *_options(spec), need_t
    )
    # Whoever else saved the logits for a backward of his own now gets torch's error.
    torch.autograd.graph.increment_version(x)
    return x.detach(), dt


# --- fakes: what torch.compile and torch.export need to know ---------------------------------------


def _fake_forward(x: Tensor, options: tuple[Any, ...], stats: bool) -> tuple[Tensor, ...]:
    rows, dtype = x.shape[0], value_dtype(x.dtype)
    none = options[2] == _REDUCTIONS["none"]
    two = options[0] == _LOSS_IDS["log_prob_and_entropy"]
    value = x.new_empty(((2, rows) if two else (rows,)) if none else (), dtype=dtype)
    out = (value, x.new_empty((rows, RECORD_SIZE), dtype=dtype), x.new_empty((), dtype=dtype))
    if not stats:
        return out
    return (*out, x.new_empty((3, rows), dtype=dtype), x.new_empty(rows, dtype=torch.int64))


def _fake_gradient(x: Tensor, needed: bool) -> Tensor:
    return x.new_empty(x.shape if needed else (0,))


# --- vmap: the batch is more rows ------------------------------------------------------------------


def _fold(v: Tensor | None, dim: int | None, batch: int) -> Tensor | None:
    if v is None:
        return None
    v = v.unsqueeze(0).expand(batch, *v.shape) if dim is None else v.movedim(dim, 0)
    return v.reshape(-1, *v.shape[2:])


def _fold_rows(
    rows: tuple[Any, ...], dims: tuple[Any, ...], batch: int
) -> tuple[Tensor | None, ...]:
    if dims[3] is not None:
        raise RuntimeError("vmap over class weights is not supported: pass the same to every call")
    x, t, label, class_weight, row_weight = rows
    folded = [_fold(v, d, batch) for v, d in zip((x, t, label), dims)]
    return (*folded, class_weight, _fold(row_weight, dims[4], batch))


def _spec_of(options: tuple[Any, ...]) -> Spec:
    """What of a spec the total weight depends on."""
    return Spec("", ignore_index=options[4], batch=options[3])


def _vmap_forward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    return _vmap_any_forward(info.batch_size, in_dims, args, stats=False)


def _vmap_forward_stats(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    return _vmap_any_forward(info.batch_size, in_dims, args, stats=True)


def _vmap_any_forward(
    batch: int, in_dims: tuple[Any, ...], args: tuple[Any, ...], stats: bool
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    folded, options = _fold_rows(args[:5], in_dims[:5], batch), args[5:]
    reduction = options[2]
    options = (*options[:2], _REDUCTIONS["none"], *options[3:])
    op = _forward_stats_op if stats else _forward_op
    value, record, total, *more = op(*folded, *options)
    value = value.unflatten(-1, (batch, -1)).movedim(-2, 0)
    total = total.new_ones(batch)
    if reduction == _REDUCTIONS["mean"]:
        x, _, label, class_weight, row_weight = folded

        def weight(*parts: Tensor | None) -> Tensor:
            return reference.total_weight(
                _spec_of(options), parts[0], parts[1], class_weight, parts[2]
            )

        split = [None if v is None else v.unflatten(0, (batch, -1)) for v in (x, label, row_weight)]
        total = torch.stack(
            [weight(*(None if v is None else v[i] for v in split)) for i in range(batch)]
        )
    elif reduction == _REDUCTIONS["batchmean"]:
        total = total * options[3]
    if reduction != _REDUCTIONS["none"]:
        value = value.sum(-1) / total
    record = record.unflatten(0, (batch, -1))
    out = [value, record, total]
    if more:
        out += [more[0].unflatten(-1, (batch, -1)).movedim(-2, 0), more[1].unflatten(0, (batch, -1))]
    return tuple(out), (0,) * len(out)


def _vmap_backward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    batch = info.batch_size
    grad, rows, record, total = args[0], args[1:6], args[6], args[7]
    *options, need_x, need_t = args[8:]
    folded = _fold_rows(rows, in_dims[1:6], batch)
    count = folded[0].shape[0] // batch
    grad = grad.expand(batch, *grad.shape) if in_dims[0] is None else grad.movedim(in_dims[0], 0)
    if options[2] in (_REDUCTIONS["mean"], _REDUCTIONS["batchmean"]):
        grad = grad / (total if in_dims[7] is None else total.movedim(in_dims[7], 0))
    if grad.dim() == 1:
        grad = grad.unsqueeze(-1).expand(batch, count)
    grad = grad.movedim(0, -2).flatten(-2).contiguous()
    options[2] = _REDUCTIONS["none"]
    out = _backward_op(
        grad,
        *folded,
        _fold(record, in_dims[6], batch).contiguous(),
        grad.new_ones(()),
        *options,
        need_x,
        need_t,
    )
    shaped = tuple(d.unflatten(0, (batch, -1)) if n else d for d, n in zip(out, (need_x, need_t)))
    return shaped, tuple(0 if n else None for n in (need_x, need_t))


if _C is not None:
    _register = torch.library.register_fake
    _register("fastdiv::_row_forward")(lambda x, *a: _fake_forward(x, a[4:], False))
    _register("fastdiv::_row_forward_stats")(lambda x, *a: _fake_forward(x, a[4:], True))
    _register("fastdiv::_row_backward")(
        lambda grad, x, *a: (_fake_gradient(x, a[-2]), _fake_gradient(x, a[-1]))
    )
    _register("fastdiv::_row_backward_")(lambda grad, x, *a: _fake_gradient(x, a[-1]))
    _register("fastdiv::_row_forward_grad")(
        lambda grad, x, *a: (_fake_forward(x, a[4:-1], False)[0], _fake_gradient(x, a[-1]))
    )
    torch.library.register_vmap("fastdiv::_row_forward", _vmap_forward)
    torch.library.register_vmap("fastdiv::_row_forward_stats", _vmap_forward_stats)
    torch.library.register_vmap("fastdiv::_row_backward", _vmap_backward)
