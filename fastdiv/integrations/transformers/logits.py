"""Tensor classes for the logits of a model's output layer, whose cross entropy is fastdiv's.

A model scales, caps, shifts or flattens its logits before it calls the cross entropy.  Both classes
here follow it until that call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..._engine.torch_private import parse_to, tree_map_only
from ..._linear.dtypes import as_autocast, widens
from ..torch import cross_entropy
from .formula import Formula, one_product


class HeldLogits(Tensor):
    """An ordinary tensor whose cross entropy is computed by fastdiv."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.__name__ == "cross_entropy":
            bare = tree_map_only(HeldLogits, lambda v: v.as_subclass(Tensor), args)
            loss = cross_entropy.fused(*bare, **(kwargs or {}))
            if loss is not None:
                return loss
        return super().__torch_function__(func, types, args, kwargs)


@dataclass
class Step:
    """A record of what happens to the logits while a model's forward runs."""

    running: bool = True
    called: bool = False  # whether the output layer ran
    trouble: str = ""  # why the logits had to be computed


class DeferredLogits(Tensor):
    """Logits that are computed when they are first used; until then they take no memory.

    The cross entropy does not use them, nor do scaling, capping, indexing and reshaping before it.
    Any other function or kernel gets the computed logits, with their gradient.
    """

    formula: Formula
    tensors: tuple[Tensor, ...]
    step: Step
    _versions: list[int]
    _held: Tensor | None

    @staticmethod
    def of_layer(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        step: Step,
        logits_dtype: torch.dtype | None = None,
    ) -> DeferredLogits:
        """Return the deferred result of ``F.linear``, also under autocast."""
        given = (hidden, weight) if bias is None else (hidden, weight, bias)
        tensors = tuple(as_autocast(v) for v in given)
        dtype = tensors[0].dtype
        if logits_dtype is not None and widens(tensors[0], logits_dtype):
            dtype = logits_dtype
        return _defer(Formula(dtype, logits_dtype=logits_dtype), tensors, step)

    def held(self, user: str) -> Tensor:
        """Compute the logits, with a graph whether or not one is being recorded."""
        if self._held is None:
            if self.step.running and not self.step.trouble:
                self.step.trouble = f"it takes {user}() of its logits, which are then held"
            with torch.enable_grad():
                self._held = self._computed()
        return self._held

    def as_one_product(self) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Return hidden states, weight and bias of the logits, if only a scale came after them."""
        if self._held is not None or self.formula.gain is not None:
            return None
        return one_product(_unscaled(self))

    def _computed(self) -> Tensor:
        if [v._version for v in self.tensors] != self._versions:
            raise RuntimeError(
                "these logits were not computed in the forward, since their loss does not need "
                "them, and the weights have changed since (an optimizer's step?); use them "
                "before that, or run the model again"
            )
        with torch.autocast(self.device.type, enabled=False):
            return self.formula.logits(*self.tensors)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if name == "__get__":
            name = getattr(func.__self__, "__name__", name)
        if name in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        x = args[0] if args else None
        operation = WITH_OPTIONS.get(name) or (None if kwargs else OPERATIONS.get(name))
        if operation and isinstance(x, DeferredLogits) and x._held is None:
            result = operation(x, *args[1:], **kwargs)
            if result is not NotImplemented:
                return result
        args, kwargs = tree_map_only(DeferredLogits, lambda v: v.held(name), (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute the logits for an operation called from C++, below autograd."""

        def values(v: DeferredLogits) -> Tensor:
            return v._computed() if v._held is None else v._held.detach()

        args, kwargs = tree_map_only(DeferredLogits, values, (args, kwargs or {}))
        return func(*args, **kwargs)


class _Defer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, formula: Formula, *tensors: Tensor) -> Tensor:
        ctx.formula = formula
        ctx.save_for_backward(*tensors)
        shape = (*tensors[0].shape[:-1], len(tensors[1]))
        return Tensor._make_wrapper_subclass(
            DeferredLogits, shape, dtype=formula.dtype, device=tensors[0].device
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        leaves = [v.detach().requires_grad_() for v in ctx.saved_tensors]
        with torch.enable_grad():
            logits = ctx.formula.logits(*leaves)
        return None, *torch.autograd.grad(logits, leaves, grad)


def _defer(formula: Formula, tensors: Iterable[Tensor], step: Step) -> DeferredLogits:
    tensors = tuple(tensors)
    x = _Defer.apply(formula, *tensors)
    x.formula, x.tensors, x.step = formula, tensors, step
    x._versions, x._held = [v._version for v in tensors], None
    return x


def _derived(
    x: DeferredLogits, of_hidden: Callable[[Tensor], Tensor] | None = None, **changes: Any
) -> DeferredLogits:
    """Return the logits of a changed formula, or of a function of all hidden states."""
    tensors = list(x.tensors)
    if of_hidden is not None:
        for i in range(0, len(tensors) - 1, 2):
            tensors[i] = of_hidden(tensors[i])
    return _defer(replace(x.formula, **changes), tensors, x.step)


def _scaled(x: DeferredLogits, factor: Any) -> Any:
    if not (isinstance(factor, (int, float)) and 0 < factor < math.inf):
        return NotImplemented
    if x.formula.gain is None:
        return _derived(x, scale=x.formula.scale * factor)
    return _derived(x, gain=x.formula.gain * factor)


def _divided(x: DeferredLogits, divisor: Any) -> Any:
    if not (isinstance(divisor, (int, float)) and 0 < divisor < math.inf):
        return NotImplemented
    return _scaled(x, 1 / divisor)


def _tanh(x: DeferredLogits) -> Any:
    return NotImplemented if x.formula.gain is not None else _derived(x, gain=1.0)


def _added(x: DeferredLogits, other: Any) -> Any:
    """Add a bias, or another layer's logits, as LoRA does."""
    if not isinstance(other, Tensor) or x.formula.gain is not None:
        return NotImplemented
    if isinstance(other, DeferredLogits):
        if other._held is not None or other.formula.gain is not None or other.shape != x.shape:
            return NotImplemented
        added = _unscaled(other)
    elif other.dim() and other.numel() == other.shape[-1] == x.shape[-1]:
        added = (other.flatten(),)
    else:
        return NotImplemented
    both = (_unscaled(x), added)
    biases = [v[-1] for v in both if len(v) % 2]
    layers = [v for w in both for v in w[: len(w) - len(w) % 2]]
    tensors = [*layers, sum(biases[1:], biases[0])] if biases else layers
    dtype = torch.promote_types(x.dtype, other.dtype)
    return _defer(replace(x.formula, dtype=dtype, scale=1.0), tensors, x.step)


def _unscaled(x: DeferredLogits) -> tuple[Tensor, ...]:
    """Return tensors that give the same logits with scale 1."""
    if x.formula.scale == 1:
        return x.tensors
    weights = range(1, len(x.tensors), 2)
    return tuple(v if i in weights else v * x.formula.scale for i, v in enumerate(x.tensors))


def _to(x: DeferredLogits, *args: Any, **options: Any) -> Any:
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    parsed = parse_to(*args, **options)
    if parsed is None:
        return NotImplemented
    device, dtype = parsed
    if device is not None and torch.empty(0, device=device).device != x.device:
        return NotImplemented
    dtype = dtype or x.dtype
    # The deferred loss has the digits of the layer's dtype, and no more.
    more_digits = dtype is torch.float64 and x.tensors[0].dtype is not torch.float64
    return NotImplemented if more_digits else _derived(x, dtype=dtype)


def _indexed(x: DeferredLogits, index: Any) -> Any:
    """Select rows; an index into the classes needs the computed logits."""
    items = index if isinstance(index, tuple) else (index,)
    dimensions, dots = 0, False
    for item in items:
        if item is Ellipsis:
            dots = True
        elif isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8):
            dimensions += item.dim()
        elif isinstance(item, (int, slice, Tensor)) and not isinstance(item, bool):
            dimensions += 1
        else:
            return NotImplemented
    last = items[-1] if items else Ellipsis
    of_classes = dimensions >= x.dim() or (dots and last is not Ellipsis)
    if of_classes and not (isinstance(last, slice) and last == slice(None)):
        return NotImplemented
    return _derived(x, lambda hidden: hidden[index])


def _reshaped(x: DeferredLogits, *shape: Any) -> Any:
    if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
        shape = tuple(shape[0])
    if not shape or shape[-1] != x.shape[-1]:  # a dtype, or other classes
        return NotImplemented
    return _derived(x, lambda hidden: hidden.reshape(*shape[:-1], hidden.shape[-1]))


def _cross_entropy(
    x: DeferredLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    if x.dim() > 2 or size_average is not None or reduce is not None:  # else classes are the last
        return NotImplemented
    loss = x.formula.cross_entropy(
        x.tensors,
        target,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    return loss.to(cross_entropy.result_dtype(x, target))


# By the names of torch's functions.  NotImplemented: the logits are computed for this call.
OPERATIONS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("mul", "__mul__", "__rmul__", "multiply"), _scaled),
    **dict.fromkeys(("div", "__truediv__", "divide", "true_divide"), _divided),
    **dict.fromkeys(("add", "__add__", "__radd__"), _added),
    **dict.fromkeys(("view", "reshape"), _reshaped),
    **dict.fromkeys(("clone", "contiguous"), _derived),
    "tanh": _tanh,
    "__getitem__": _indexed,
    "float": lambda x: _to(x, torch.float32),
    "bfloat16": lambda x: _to(x, torch.bfloat16),
    "half": lambda x: _to(x, torch.float16),
}
WITH_OPTIONS: dict[str, Callable[..., Any]] = {"to": _to, "cross_entropy": _cross_entropy}

# Functions and attributes that need no values.
METADATA = frozenset(
    "shape dtype device requires_grad grad_fn grad is_leaf ndim layout is_cpu is_cuda is_sparse "
    "is_meta is_nested is_quantized itemsize nbytes size dim ndimension numel nelement stride "
    "storage_offset element_size get_device is_floating_point is_complex is_contiguous "
    "register_hook retain_grad __len__".split()
)
