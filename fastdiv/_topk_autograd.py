"""topk_kl_div on the kernels: one dense pass forward, one backward, all else of size ``[R, k]``.

The gradient of every class that the teacher does not name is linear in its probability, which the
kernel writes to all classes; the k others are then put in their places, complete, from what the
forward kept of them.  So there is one dense tensor, the gradient, and in place not even that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _ops, reference_topk
from ._autograd import overwritten, refuse_second_derivative
from ._backend import use_kernel
from .reference import Spec
from .reference_divergences import masked_product
from .reference_topk import TopKSpec, row_sums


def topk_loss(
    spec: TopKSpec, x: Tensor, values: Tensor, indices: Tensor, weight: Tensor | None
) -> Tensor:
    """The loss of a matrix of logits ``[R, C]`` and a teacher ``[R, k]``, reduced."""
    if not use_kernel(x) or torch.compiler.is_compiling():
        return reference_topk.loss(spec, x, values, indices, weight)
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        if spec.inplace and x.requires_grad:
            refuse_second_derivative()
        return reference_topk.loss(spec, x, values, indices, weight)
    return _TopKLoss.apply(spec, x, values, indices, weight)


def _kernel_options(spec: TopKSpec) -> tuple[Any, ...]:
    return _ops.options(Spec("log_sum_exp_and_sum", scale=spec.scale))


def _student(
    spec: TopKSpec, x: Tensor, indices: Tensor, record: Tensor
) -> tuple[Tensor, Tensor | None]:
    """What :func:`reference_topk.student` returns, from the forward kernel's record."""
    classes, k = x.shape[-1], indices.shape[-1]
    largest, log_z, total, finite = (record[:, i] for i in _ops.LOG_SUM_EXP_AND_SUM)
    largest = largest.unsqueeze(-1)
    shifted = (x.gather(-1, indices).to(record.dtype) - largest) * spec.scale
    log_q = shifted - log_z.unsqueeze(-1)
    others = classes - k
    if not spec.spreads(others):
        return log_q, None
    if 2 * k > classes:
        # The few others as a difference of two sums would lose digits; a row is no longer than 2k.
        row = ((x.to(record.dtype) - largest) * spec.scale).scatter(-1, indices, 0.0)
        return log_q, row_sums(row) / others - log_z
    infinite = torch.isinf(shifted)
    excluded = others - (finite - (~infinite).sum(-1))  # -inf outside of the k
    uncertain = classes >> 24  # a count in float32 is exact up to 2^24
    mean = (total - row_sums(torch.where(infinite, 0.0, shifted))) / others
    return log_q, torch.where(excluded > uncertain, -torch.inf, mean) - log_z


class _TopKLoss(torch.autograd.Function):
    """The loss; no torch.func transform may be active."""

    @staticmethod
    def forward(
        ctx: Any,
        spec: TopKSpec,
        x: Tensor,
        values: Tensor,
        indices: Tensor,
        weight: Tensor | None,
    ) -> Tensor:
        counts = None if weight is None else (weight != 0).to(weight.dtype)
        options = _kernel_options(spec)
        _, record, total = _ops.forward(x, None, None, None, counts, *options)
        log_q, mean = _student(spec, x, indices, record)
        ctx.spec = spec
        ctx.save_for_backward(x, values, indices, weight, counts, record, total, log_q, mean)
        others = x.shape[-1] - indices.shape[-1]
        value = reference_topk.rows(spec, log_q, mean, values, weight, others)
        return reference_topk.reduced(spec, value, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        spec, saved = ctx.spec, ctx.saved_tensors
        need_x, need_values = ctx.needs_input_grad[1:3]
        transformed = torch._C._are_functorch_transforms_active()
        if spec.inplace and need_x and (torch.is_grad_enabled() or transformed):
            refuse_second_derivative()
        if transformed:  # a vmap over the upstream gradients
            gradient, inputs = _reference_gradient(spec, need_x, need_values, grad, *saved[:4])
            found = iter(gradient(*inputs))
            dx, dv = (next(found) if need else None for need in (need_x, need_values))
        elif torch.is_grad_enabled():  # create_graph=True
            dx, dv = _TopKBackward.apply(spec, need_x, need_values, grad, *saved)
        else:
            dx, dv = _gradients(spec, need_x, need_values, grad, *saved)
        return None, dx if need_x else None, dv if need_values else None, None, None


class _TopKBackward(torch.autograd.Function):
    """The backward kernel, differentiable in turn through the reference."""

    @staticmethod
    def forward(
        ctx: Any, spec: TopKSpec, need_x: bool, need_values: bool, grad: Tensor, *saved: Any
    ) -> tuple[Tensor, Tensor]:
        ctx.options = spec, need_x, need_values
        ctx.save_for_backward(grad, *saved[:4])
        return _gradients(spec, need_x, need_values, grad, *saved)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor, ddv: Tensor) -> tuple[Tensor | None, ...]:
        _, need_x, need_values = ctx.options
        gradient, inputs = _reference_gradient(*ctx.options, *ctx.saved_tensors)
        given = tuple(d for d, need in ((ddx, need_x), (ddv, need_values)) if need)
        return None, None, None, *torch.func.vjp(gradient, *inputs)[1](given), *[None] * 7


def _reference_gradient(
    spec: TopKSpec,
    need_x: bool,
    need_values: bool,
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    weight: Tensor | None,
) -> tuple[Any, tuple[Tensor, ...]]:
    """The reference's gradient by the sides that need it, and what it is a function of."""

    def gradient(grad: Tensor, x: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        def loss(*needed: Tensor) -> Tensor:
            rest = list(needed)
            xs = rest.pop(0) if need_x else x
            return reference_topk.loss(spec, xs, rest[0] if rest else values, indices, weight)

        sides = [v for v, need in ((x, need_x), (values, need_values)) if need]
        return torch.func.vjp(loss, *sides)[1](grad)

    return gradient, (grad, x, values)


def _gradients(
    spec: TopKSpec,
    need_x: bool,
    need_values: bool,
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    weight: Tensor | None,
    counts: Tensor | None,
    record: Tensor,
    total: Tensor,
    log_q: Tensor,
    mean: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of the logits, in place if asked, and of the teacher's values."""
    others = x.shape[-1] - indices.shape[-1]
    if spec.reduction != "none":
        grad = (grad / reference_topk.divisor(spec, log_q, weight)).expand(x.shape[0])
    if weight is not None:
        grad = torch.where(weight != 0, grad, 0.0)
    # The derivatives of every row; where nothing comes from upstream, nothing goes down, whatever
    # they are.
    with torch.enable_grad():
        log_q, v = (w.detach().to(log_q.dtype).requires_grad_() for w in (log_q, values))
        mean = None if mean is None else mean.detach().requires_grad_()
        rows = reference_topk.rows(spec, log_q, mean, v, weight, others)
        wanted = [w for w in (log_q, mean) if w is not None] if need_x else []
        wanted += [v] if need_values else []
        found = list(torch.autograd.grad(rows, wanted, torch.ones_like(rows)))
    column = grad.unsqueeze(-1)
    dv = values.new_empty(0)
    if need_values:
        dv = masked_product(column, found.pop()).to(values.dtype)
    if not need_x:
        return x.new_empty(0), dv
    of_k = masked_product(column, found[0])
    of_mean = torch.zeros_like(grad) if mean is None else masked_product(grad, found[1])
    mass = row_sums(of_k) + of_mean  # less the probability mass that has a price
    upstream = torch.stack((-mass, of_mean / max(others, 1)))
    call = (x, None, None, None, counts, record, total, *_kernel_options(spec))
    if spec.inplace:
        _ops.backward_in_place(upstream, *call, False)
        dx = overwritten(x)
    else:
        dx, _ = _ops.backward(upstream, *call, True, False)
    entries = (of_k - masked_product(mass.unsqueeze(-1), log_q.exp())) * spec.scale
    _put(dx, indices, entries.to(dx.dtype))
    return dx, dv


def _put(dx: Tensor, indices: Tensor, entries: Tensor) -> None:
    if dx.dtype.itemsize == 2:  # of halves scatter_ makes a copy in float32, of the whole
        dx, entries = dx.view(torch.int16), entries.view(torch.int16)
    dx.scatter_(-1, indices, entries)
