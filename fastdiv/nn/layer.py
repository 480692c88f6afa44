"""How the modules of the linear losses call their layer.

A layer is more than its weight: hooks, pruning, weight normalisation, LoRA, FSDP and ZeRO-3 act
when it is *called*.  So the modules call it, and the linear loss replaces the matrix product
inside.  Where that could change what a hook sees, the loss uses the layer's real logits.  The value
is the same, but the logits are held in memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from .._engine.torch_private import func_is_active, hooks_of, viewed
from .._linear.dtypes import check_logits_dtype, whole_logits, widens
from ..integrations.handle import replaced_forward

T = TypeVar("T")
OfLayer = Callable[[Tensor, Tensor, "Tensor | None"], T]  # from hidden states, weight and bias
OfLogits = Callable[[Tensor], T]

# Packages whose hooks are known.
FSDP = "torch.distributed.fsdp"
DEEPSPEED = "deepspeed"  # ZeRO-3
TENSOR_PARALLEL = "torch.distributed.tensor"


def loss_through(
    layer: nn.Module,
    input: Tensor,
    of_layer: OfLayer[T],
    of_logits: OfLogits[T],
    logits_dtype: torch.dtype | None = None,
) -> T:
    """Compute the loss of ``layer(input)``, without holding the logits where that is safe.

    Args:
        layer: The layer that computes logits, usually a ``torch.nn.Linear``.
        input: The hidden states.
        of_layer: Computes the loss from hidden states, weight and bias.
        of_logits: Computes the same loss from logits.
        logits_dtype: The dtype that logits of a half-precision layer must have, if not its own.
    """
    check_logits_dtype(logits_dtype)
    hooks = hooks_of(layer)
    if hooks is not None and not hooks[2] and _is_linear(layer):
        before, after = _owners(hooks[0]), _owners(hooks[1])
        if before | after <= {TENSOR_PARALLEL}:
            weight, bias = layer.weight, layer.bias
            if _is_known(weight) and _is_known(bias):
                return _without_views(of_layer(input, weight, bias))
        elif TENSOR_PARALLEL in before | after:
            raise RuntimeError(
                "the layer of this loss has hooks of parallelize_module and of "
                f"{', '.join(sorted((before | after) - {TENSOR_PARALLEL}))}: apply fully_shard to "
                "the module that holds the loss instead of to its layer, and remove other hooks"
            )
        elif after <= {FSDP, DEEPSPEED} and not torch.compiler.is_compiling():
            # The weight may exist only while the layer runs, so the loss is computed inside.
            found: list[T] = []
            inside = partial(_inside, of_layer, of_logits, logits_dtype, found)
            with replaced_forward([layer], inside):
                value = layer(input)
            # FSDP casts to its ``output_dtype`` after it has put its hooks on the loss itself.
            cast = after == {FSDP} and _dtype_of(value) != _dtype_of(found[0])
            return found[0] if cast and not func_is_active() else value
    if type(layer).__module__.startswith("peft.") and not torch.compiler.is_compiling():
        return _of_adapted(layer, input, of_layer, of_logits, logits_dtype)
    return of_logits(_logits_of(layer, input, logits_dtype))


def _inside(
    of_layer: OfLayer[T],
    of_logits: OfLogits[T],
    logits_dtype: torch.dtype | None,
    found: list[T],
    layer: nn.Linear,
    input: Tensor,
) -> T:
    weight, bias = layer.weight, layer.bias
    if _is_known(weight) and _is_known(bias):
        value = of_layer(input, weight, bias)
    else:
        value = of_logits(whole_logits(input, weight, bias, logits_dtype))
    found.append(_without_views(value))
    return found[0]


def _without_views(value: Any) -> Any:
    """Return copies of differentiable views, whose hooks FSDP would lose to an in-place change."""
    if torch.compiler.is_compiling():
        return value
    if isinstance(value, tuple):
        # Statistics get no gradient, and stay as they are.
        return value if hasattr(value[1], "_fields") else tuple(map(_without_views, value))
    return value.clone() if value.requires_grad and viewed(value) is not None else value


def _dtype_of(value: Any) -> torch.dtype:
    return (value[0] if isinstance(value, tuple) else value).dtype


def _logits_of(layer: nn.Module, input: Tensor, logits_dtype: torch.dtype | None) -> Tensor:
    """Call the layer, hooks included, for logits of this dtype if it has half precision."""
    if logits_dtype is None:
        return layer(input)
    if _is_linear(layer) and not torch.compiler.is_compiling():

        def forward(layer: nn.Linear, input: Tensor) -> Tensor:
            return whole_logits(input, layer.weight, layer.bias, logits_dtype)

        with replaced_forward([layer], forward):
            return layer(input)
    return _checked(layer(input), layer, logits_dtype)


def _checked(logits: Tensor, layer: nn.Module, logits_dtype: torch.dtype | None) -> Tensor:
    """Raise RuntimeError if a layer that computes its logits itself has rounded them."""
    if widens(logits, logits_dtype):
        raise RuntimeError(
            f"logits_dtype={logits_dtype} is not possible here: a {type(layer).__name__} that is "
            "compiled with hooks, or not a torch.nn.Linear, computes its logits itself, in "
            f"{logits.dtype}; use logits_dtype=None"
        )
    return logits


def _is_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether calling the layer computes ``F.linear`` of its weight and bias."""
    forward = getattr(type(layer), "forward", None)
    return forward is nn.Linear.forward and "forward" not in vars(layer)


def _is_known(v: Tensor | None) -> bool:
    """Return whether the linear losses take this kind of weight or bias."""
    if v is None or type(v) in (Tensor, Parameter):
        return True
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(v, module.DTensor)


def _owners(hooks: list[Any]) -> set[str]:
    """Return the packages that these hooks come from."""
    owners = set()
    for hook in hooks:
        home = getattr(hook, "__module__", None) or type(hook).__module__
        known = (owner for owner in (FSDP, DEEPSPEED, TENSOR_PARALLEL) if home.startswith(owner))
        owners.add(next(known, home))
    return owners


def _of_adapted(
    layer: nn.Module,
    input: Tensor,
    of_layer: OfLayer[T],
    of_logits: OfLogits[T],
    logits_dtype: torch.dtype | None,
) -> T:
    """Compute the loss of a PEFT layer, as one product of longer hidden states."""
    from ..integrations.transformers import forward as model_forward
    from ..integrations.transformers.logits import DeferredLogits

    with model_forward.deferred_logits(layer, logits_dtype):
        logits = layer(input)
    if type(logits) is DeferredLogits:
        product = logits.as_one_product()
        return of_logits(logits.held("")) if product is None else of_layer(*product)
    return of_logits(_checked(logits, layer, logits_dtype))
