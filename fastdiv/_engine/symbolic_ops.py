"""The row ops with their float options in a tensor, as ``torch.compile`` needs them.

They are for options that change from step to step; see ``symbolic``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference import Spec
from . import ops
from .symbolic import as_tensor

Rows = tuple[Tensor | None, ...]  # x, t, label, class_weight, row_weight


def row_loss(spec: Spec, stats: bool, rows: Rows, differentiable: bool) -> tuple[Tensor, ...]:
    """What ``ops.forward`` or ``ops.forward_stats`` returns, with a gradient if asked for."""
    floats = as_tensor(ops.float_options(spec))
    if differentiable:
        return _SymbolicRowLoss.apply(spec, stats, floats, *rows)
    return tuple(forward(*rows, ops.int_options(spec, stats), floats, stats))


class _SymbolicRowLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, spec: Spec, stats: bool, floats: Tensor, *rows: Tensor | None
    ) -> tuple[Tensor, ...]:
        out = forward(*rows, ops.int_options(spec, stats), floats, stats)
        ctx.spec = spec
        ctx.mark_non_differentiable(*out[1:])
        ctx.save_for_backward(*rows, *out[1:3], floats)
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        need_x, need_t = ctx.needs_input_grad[3:5]
        *tensors, floats = ctx.saved_tensors
        ints = ops.int_options(ctx.spec)
        dx, dt = backward(grad.contiguous(), *tensors, ints, floats, need_x, need_t)
        return None, None, None, dx if need_x else None, dt if need_t else None, None, None, None


@torch.library.custom_op("fastdiv::_symbolic_row_forward", mutates_args=())
def forward(
    x: Tensor,
    t: Tensor | None,
    label: Tensor | None,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    ints: Sequence[int],
    floats: Tensor,
    stats: bool,
) -> list[Tensor]:
    """Value, record, divisor, and statistics with their argmax if asked for."""
    op = ops.forward_stats if stats else ops.forward
    return list(op(x, t, label, class_weight, row_weight, *ints, *floats.tolist()))


@forward.register_fake
def _(x, t, label, class_weight, row_weight, ints, floats, stats):  # type: ignore[no-untyped-def]
    return list(ops.fake_forward(x, ints, stats))


@torch.library.custom_op("fastdiv::_symbolic_row_backward", mutates_args=())
def backward(
    grad: Tensor,
    x: Tensor,
    t: Tensor | None,
    label: Tensor | None,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    record: Tensor,
    total: Tensor,
    ints: Sequence[int],
    floats: Tensor,
    need_x: bool,
    need_t: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of input and target."""
    tensors = (grad, x, t, label, class_weight, row_weight, record, total)
    return ops.backward(*tensors, *ints, *floats.tolist(), need_x, need_t)


@backward.register_fake
def _(grad, x, t, label, cw, rw, record, total, ints, floats, need_x, need_t):  # type: ignore[no-untyped-def]
    return ops.fake_gradient(x, x, need_x), ops.fake_gradient(t, x, need_t)
