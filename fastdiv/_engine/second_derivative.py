"""Second derivatives of losses of whole rows: those of ``reference.loss``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..reference import Spec
from . import ops


@dataclass(frozen=True)
class BackwardCall:
    """A backward with all of its arguments that are not tensors."""

    spec: Spec
    need_x: bool
    need_t: bool


class RowLossBackward(torch.autograd.Function):
    """The backward kernel, differentiable in turn through the reference formulas."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: BackwardCall, grad: Tensor, *saved: Tensor | None) -> tuple[Tensor, Tensor]:
        options = ops.options(call.spec)
        return ops.backward(grad.contiguous(), *saved, *options, call.need_x, call.need_t)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.call, grad, *saved = inputs
        ctx.save_for_backward(grad, *saved[:5])
        ctx.save_for_forward(grad, *saved[:5])

    @staticmethod
    def _reference(ctx: Any) -> tuple[Any, list[Tensor]]:
        """Return the reference gradient, and what it is a function of: upstream gradient, x and t.

        A side that needs no gradient here is among them, since an outer transform may need it.
        """
        grad, x, t, label, class_weight, row_weight = ctx.saved_tensors
        spec, need_x, need_t = ctx.call.spec, ctx.call.need_x, ctx.call.need_t

        def gradient(grad: Tensor, *sides: Tensor) -> tuple[Tensor, ...]:
            def loss(*needed: Tensor) -> Tensor:
                rest = list(needed)
                xs = rest.pop(0) if need_x else sides[0]
                ts = None if t is None else rest.pop(0) if need_t else sides[1]
                return reference.loss(spec, xs, ts, label, class_weight, row_weight)

            needed = [v for v, need in zip(sides, (need_x, need_t), strict=False) if need]
            return torch.func.vjp(loss, *needed)[1](grad)

        return gradient, [grad, x] if t is None else [grad, x, t]

    @staticmethod
    def backward(ctx: Any, ddx: Tensor, ddt: Tensor) -> tuple[Tensor | None, ...]:
        gradient, inputs = RowLossBackward._reference(ctx)
        cotangents = tuple(
            d for d, need in ((ddx, ctx.call.need_x), (ddt, ctx.call.need_t)) if need
        )
        dgrad, dx, *dt = torch.func.vjp(gradient, *inputs)[1](cotangents)
        return None, dgrad, dx, dt[0] if dt else None, *[None] * 5

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Any, ...]:
        gradient, inputs = RowLossBackward._reference(ctx)
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
            out.pop(0) if ctx.call.need_x else empty,
            out.pop(0) if ctx.call.need_t else empty,
        )
