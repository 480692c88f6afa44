"""Second derivatives of losses of whole rows: those of ``reference.loss``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..reference import Rows, Spec
from . import ops
from .temperature import scale_gradient


@dataclass(frozen=True)
class BackwardCall:
    """A backward with all of its arguments that are not tensors."""

    spec: Spec
    need_x: bool
    need_t: bool
    need_scale: bool = False

    @property
    def needed(self) -> tuple[bool, bool, bool]:
        """Return which of the first three tensors of ``Rows`` get a gradient."""
        return self.need_x, self.need_t, self.need_scale


class RowLossBackward(torch.autograd.Function):
    """The backward kernel, differentiable in turn through the reference formulas."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: BackwardCall, grad: Tensor, *saved: Tensor | None) -> tuple[Tensor, ...]:
        options, grad = ops.options(call.spec), grad.contiguous()
        dx, dt = ops.backward(grad, *saved, *options, call.need_x, call.need_t)
        d_scale = scale_gradient(call.spec, grad, *saved) if call.need_scale else grad.new_empty(0)
        return dx, dt, d_scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, grad, *saved = inputs
        ctx.save_for_backward(grad, *saved[: len(Rows._fields)])
        ctx.save_for_forward(grad, *saved[: len(Rows._fields)])

    @staticmethod
    def _reference(ctx: Any) -> tuple[Any, list[int], list[Tensor]]:
        """Return the reference gradient, what it is a function of, and the places in ``Rows``.

        It is a function of the upstream gradient and of those of the first three tensors that are
        given.  One that needs no gradient here is among them: an outer transform may need it.
        """
        grad, *rows = ctx.saved_tensors
        spec, needed = ctx.call.spec, ctx.call.needed
        places = [i for i in range(3) if rows[i] is not None]

        def gradient(grad: Tensor, *sides: Tensor) -> tuple[Tensor, ...]:
            given = dict(zip(places, sides, strict=True))
            wanted = [i for i in places if needed[i]]

            def loss(*values: Tensor) -> Tensor:
                at = {**given, **dict(zip(wanted, values, strict=True))}
                return reference.loss(spec, *(at.get(i, v) for i, v in enumerate(rows)))

            return torch.func.vjp(loss, *(given[i] for i in wanted))[1](grad)

        return gradient, places, [grad, *(rows[i] for i in places)]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        gradient, places, inputs = RowLossBackward._reference(ctx)
        given = tuple(d for d, need in zip(cotangents, ctx.call.needed, strict=True) if need)
        dgrad, *sides = torch.func.vjp(gradient, *inputs)[1](given)
        of_side = dict(zip(places, sides, strict=True))
        unused = len(Rows._fields) - 3 + 2  # and of record and divisor
        return None, dgrad, *(of_side.get(i) for i in range(3)), *[None] * unused

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Any, ...]:
        gradient, places, inputs = RowLossBackward._reference(ctx)
        # What is expanded (from a sum, say) must be cloned for forward over reverse.
        inputs = [v.clone() for v in inputs]
        given = [tangents[0], *(tangents[1 + i] for i in places)]
        filled = [
            torch.zeros_like(v) if d is None else d.clone()
            for v, d in zip(inputs, given, strict=True)
        ]
        out = list(torch.func.jvp(gradient, tuple(inputs), tuple(filled))[1])
        empty = inputs[1].new_empty(0)
        return tuple(out.pop(0) if need else empty for need in ctx.call.needed)
