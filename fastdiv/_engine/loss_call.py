"""The autograd.Functions of losses whose op is written in Python, traced and eager.

These are linear and sharded losses, and losses of rows with symbols among their options.
A ``LossCall`` says how such an op is called.  For a second derivative, the loss is computed again
by torch operations that autograd differentiates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor

from ..reference import Spec
from . import ops
from .arguments import values_may_be_read
from .torch_private import is_batched

Tensors = Sequence[Tensor | None]


class Forward(NamedTuple):
    """The tensors that the forward of a ``LossCall`` returns."""

    outputs: Sequence[Tensor]  # the value; others that have no gradient
    kept: Sequence[Tensor]  # what the backward needs besides the arguments
    gradients: Sequence[Tensor] = ()  # of the value, where they are computed with it
    divisor: Tensor | None = None  # of these gradients, if they are sums that are not divided yet


class LossCall(Protocol):
    """A loss with all of its options that are not tensors, and how its op is called."""

    n_inputs: ClassVar[int]  # how many tensors may need a gradient; these come first
    spec: Spec

    def forward(self, tensors: Tensors, needed: Sequence[bool], symbolic: Tensor | None) -> Forward:
        """Compute the value; ``symbolic`` holds the float options, see ``ops.packed``."""

    def backward(
        self,
        grad: Tensor,
        tensors: Tensors,
        kept: Sequence[Tensor],
        needed: Sequence[bool],
        symbolic: Tensor | None,
    ) -> Sequence[Tensor | None]:
        """Compute the gradients that are needed, one for each of the first tensors."""

    def differentiable_value(self, tensors: Tensors) -> Tensor:
        """Compute the value in a way that can be differentiated twice."""


def is_differentiated(grad: Tensor) -> bool:
    """Return whether autograd or a transform may differentiate this gradient, or batches it."""
    return torch.is_grad_enabled() or is_batched(grad)


def refuse_second_derivative() -> NoReturn:
    """Raise, because the gradient in place has no second derivative."""
    raise RuntimeError(
        "inplace_backward=True overwrites the logits, which a second derivative "
        "(create_graph=True, torch.func) still needs; use inplace_backward=False"
    )


def overwritten(x: Tensor) -> Tensor:
    """Return the gradient that was written over ``x``, and mark ``x`` as changed.

    Anything else that saved the logits for its own backward then gets torch's error.
    """
    torch.autograd.graph.increment_version(x)
    return x.detach()


def run(call: LossCall, tensors: Tensors) -> Sequence[Tensor]:
    """Run the op of a loss.  Its value gets a gradient if one of the tensors requires one."""
    inputs = tensors[: call.n_inputs]
    recording = torch.is_grad_enabled()
    needed = tuple(recording and v is not None and v.requires_grad for v in inputs)
    symbolic = ops.symbolic_floats(call.spec)
    if not any(needed):
        return call.forward(tensors, needed, symbolic).outputs
    function = TracedLoss if torch.compiler.is_compiling() else _EagerLoss
    return function.apply(call, needed, symbolic, *tensors)


class TracedLoss(torch.autograd.Function):
    """The form that ``torch.compile`` can trace."""

    @staticmethod
    def forward(
        ctx: Any,
        call: LossCall,
        needed: tuple[bool, ...],
        symbolic: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        outputs, kept, gradients, divisor = call.forward(tensors, needed, symbolic)
        ctx.call, ctx.needed, ctx.n_tensors, ctx.n_kept = call, needed, len(tensors), len(kept)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.save_for_backward(*tensors, symbolic, divisor, *kept, *gradients)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        n, saved = ctx.n_tensors, ctx.saved_tensors
        tensors, (symbolic, divisor, *rest) = saved[:n], saved[n:]
        kept, gradients = rest[: ctx.n_kept], rest[ctx.n_kept :]
        if not gradients:
            return _for_apply(ctx, ctx.call.backward(grad, tensors, kept, ctx.needed, symbolic))
        scale = _scale(grad, divisor)
        pairs = zip(gradients, tensors, strict=False)
        return _for_apply(
            ctx, [g * scale if v is None else (g * scale).to(v.dtype) for g, v in pairs]
        )


class _EagerLoss(TracedLoss):
    """The eager form: it has second derivatives, and hands its gradients out uncopied."""

    @staticmethod
    def forward(
        ctx: Any,
        call: LossCall,
        needed: tuple[bool, ...],
        symbolic: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        outputs, kept, ctx.gradients, ctx.divisor = call.forward(tensors, needed, None)
        ctx.at_once = bool(ctx.gradients)
        ctx.call, ctx.needed, ctx.n_tensors = call, needed, len(tensors)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.save_for_backward(*tensors, *kept)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        call, needed = ctx.call, ctx.needed
        if grad is None:
            return (None,) * (3 + ctx.n_tensors)
        tensors, kept = ctx.saved_tensors[: ctx.n_tensors], ctx.saved_tensors[ctx.n_tensors :]
        if is_differentiated(grad):
            if call.spec.inplace and needed[0]:
                refuse_second_derivative()
            return _for_apply(ctx, _differentiable(call, grad, tensors, needed))
        if not ctx.at_once:
            return _for_apply(ctx, call.backward(grad, tensors, kept, needed, None))
        # The first backward hands the gradients out.  Another one, through a retained graph,
        # computes them again.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            gradients = call.forward(tensors, needed, None).gradients
        scale = _scale(grad, ctx.divisor)
        # A CPU can read the upstream gradient for free, and a 1 saves a pass over the gradients.
        one = scale.is_cpu and values_may_be_read(scale) and scale == 1
        pairs = zip(gradients, tensors, strict=False)
        return _for_apply(ctx, [_scaled(g, None if one else scale, v) for g, v in pairs])


def _scale(grad: Tensor, divisor: Tensor | None) -> Tensor:
    """Return what gradients that were computed with the value are multiplied by."""
    return grad if divisor is None else (grad / divisor).to(grad.dtype)


def _scaled(gradient: Tensor, scale: Tensor | None, like: Tensor | None) -> Tensor:
    """Scale a gradient in place, or round it to the dtype of its tensor, in one pass on a GPU."""
    dtype = gradient.dtype if like is None else like.dtype
    if scale is None:
        return gradient.to(dtype)
    if gradient.dtype == dtype or gradient.is_cpu:  # a CPU would round from a copy
        return gradient.mul_(scale).to(dtype)
    return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))


def _differentiable(
    call: LossCall, grad: Tensor, tensors: Tensors, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Compute gradients that may be differentiated or batched."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # If one tensor is given twice, each place must get its own gradient, so we use aliases.
        own = [None if v is None else v.view_as(v) for v in tensors]
        value = call.differentiable_value(own)
    wanted = [v for v, need in zip(own, needed, strict=False) if need and v is not None]
    found = iter(torch.autograd.grad(value, wanted, grad, create_graph=create_graph))
    return [next(found) if need else None for need in needed]


def _for_apply(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Return one gradient for each argument of ``apply``."""
    found = [g if need else None for g, need in zip(gradients, ctx.needed, strict=True)]
    return None, None, None, *found, *[None] * (ctx.n_tensors - len(found))
