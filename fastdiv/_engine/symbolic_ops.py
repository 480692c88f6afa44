"""The row ops with their float options in a tensor, as ``torch.compile`` needs them.

They are for options that change from step to step; see ``symbolic``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import reference
from ..reference import Spec
from . import ops
from .loss_call import Forward, Tensors
from .temperature import scale_gradient


@dataclass
class SymbolicCall:
    """A loss of whole rows whose float options are in a tensor."""

    n_inputs: ClassVar[int] = 3
    spec: Spec
    stats: bool

    def forward(self, tensors: Tensors, needed: Sequence[bool], symbolic: Tensor | None) -> Forward:
        """See ``LossCall``."""
        ints, _, floats = ops.packed(self.spec, symbolic)
        out = forward(*tensors, ints, floats, self.stats)
        return Forward(out, out[1:3])

    def backward(
        self,
        grad: Tensor,
        tensors: Tensors,
        kept: Sequence[Tensor],
        needed: Sequence[bool],
        symbolic: Tensor | None,
    ) -> Sequence[Tensor | None]:
        """See ``LossCall``."""
        ints, _, floats = ops.packed(self.spec, symbolic)
        grad, (need_x, need_t, need_scale) = grad.contiguous(), needed
        dx, dt = backward(grad, *tensors, *kept, ints, floats, need_x, need_t)
        if not need_scale:
            return dx, dt, None
        return dx, dt, scale_gradient(self.spec, grad, *tensors, *kept, symbolic=symbolic)

    def differentiable_value(self, tensors: Tensors) -> Tensor:
        """See ``LossCall``."""
        return reference.loss(self.spec, *tensors)


@torch.library.custom_op("fastdiv::_symbolic_row_forward", mutates_args=())
def forward(
    x: Tensor,
    t: Tensor | None,
    scale: Tensor | None,
    label: Tensor | None,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    mask: Tensor | None,
    ints: Sequence[int],
    floats: Tensor,
    stats: bool,
) -> list[Tensor]:
    """Compute value, record, divisor and, if asked for, statistics with their argmax."""
    rows = (x, t, scale, label, class_weight, row_weight, mask)
    spec = ops.unpacked(ints, (), floats)
    if stats:
        return list(ops.forward_stats(*rows, *ops.options(spec, stats)))
    return list(ops.forward(*rows, *ops.options(spec)))


@forward.register_fake
def _(x, t, scale, label, class_weight, row_weight, mask, ints, floats, stats):  # type: ignore[no-untyped-def]
    return list(ops.fake_forward(x, label, ints, stats))


@torch.library.custom_op("fastdiv::_symbolic_row_backward", mutates_args=())
def backward(
    grad: Tensor,
    x: Tensor,
    t: Tensor | None,
    scale: Tensor | None,
    label: Tensor | None,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    mask: Tensor | None,
    record: Tensor,
    divisor: Tensor,
    ints: Sequence[int],
    floats: Tensor,
    need_x: bool,
    need_t: bool,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of input and target."""
    rows = (x, t, scale, label, class_weight, row_weight, mask)
    options = ops.options(ops.unpacked(ints, (), floats))
    return ops.backward(grad, *rows, record, divisor, *options, need_x, need_t)


@backward.register_fake
def _(grad, x, t, scale, label, cw, rw, mask, record, divisor, ints, floats, need_x, need_t):  # type: ignore[no-untyped-def]
    return ops.fake_gradient(x, x, need_x), ops.fake_gradient(t, x, need_t)
