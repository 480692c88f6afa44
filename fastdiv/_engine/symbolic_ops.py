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


@dataclass
class SymbolicCall:
    """A loss of whole rows whose float options are in a tensor."""

    n_inputs: ClassVar[int] = 2
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
        return backward(grad.contiguous(), *tensors, *kept, ints, floats, *needed)

    def differentiable_value(self, tensors: Tensors) -> Tensor:
        """See ``LossCall``."""
        x, *others = tensors
        assert x is not None
        return reference.loss(self.spec, x, *others)


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
    """Compute value, record, divisor and, if asked for, statistics with their argmax."""
    rows = (x, t, label, class_weight, row_weight)
    spec = ops.unpacked(ints, (), floats)
    if stats:
        return list(ops.forward_stats(*rows, *ops.options(spec, stats)))
    return list(ops.forward(*rows, *ops.options(spec)))


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
    divisor: Tensor,
    ints: Sequence[int],
    floats: Tensor,
    need_x: bool,
    need_t: bool,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of input and target."""
    tensors = (grad, x, t, label, class_weight, row_weight, record, divisor)
    return ops.backward(*tensors, *ints, *floats.tolist(), need_x, need_t)


@backward.register_fake
def _(grad, x, t, label, cw, rw, record, divisor, ints, floats, need_x, need_t):  # type: ignore[no-untyped-def]
    return ops.fake_gradient(x, x, need_x), ops.fake_gradient(t, x, need_t)
