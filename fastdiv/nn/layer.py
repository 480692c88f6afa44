"""How the modules of the linear losses call their layer.

A layer is more than its weight: hooks, pruning, weight normalisation, LoRA and FSDP all act when
it is *called*.  So the modules call it, and the linear loss replaces the matrix product inside.
Where that could change what a hook sees, the loss uses the layer's real logits.  The value is the
same, but the logits are held in memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from .._engine.torch_private import hooks_of
from ..integrations.handle import replaced_forward

T = TypeVar("T")
OfLayer = Callable[[Tensor, Tensor, "Tensor | None"], T]  # from hidden states, weight and bias
OfLogits = Callable[[Tensor], T]

# Packages whose hooks are known.
FSDP = "torch.distributed.fsdp"
TENSOR_PARALLEL = "torch.distributed.tensor"


def loss_through(
    layer: nn.Module, input: Tensor, of_layer: OfLayer[T], of_logits: OfLogits[T]
) -> T:
    """Compute the loss of ``layer(input)``, without holding the logits where that is safe.

    Args:
        layer: The layer that computes logits, usually a ``torch.nn.Linear``.
        input: The hidden states.
        of_layer: Computes the loss from hidden states, weight and bias.
        of_logits: Computes the same loss from logits.
    """
    hooks = hooks_of(layer)
    if hooks is not None and not hooks[2] and _is_linear(layer):
        before, after = _owners(hooks[0]), _owners(hooks[1])
        if before | after <= {TENSOR_PARALLEL}:
            weight, bias = layer.weight, layer.bias
            if _is_known(weight) and _is_known(bias):
                return of_layer(input, weight, bias)
        elif TENSOR_PARALLEL in before | after:
            raise RuntimeError(
                "the layer of this loss has hooks of parallelize_module and of "
                f"{', '.join(sorted((before | after) - {TENSOR_PARALLEL}))}: apply fully_shard to "
                "the module that holds the loss instead of to its layer, and remove other hooks"
            )
        elif after <= {FSDP} and not torch.compiler.is_compiling():
            # The weight may exist only while the layer runs, so the loss is computed inside.
            with replaced_forward([layer], partial(_inside, of_layer, of_logits)):
                return layer(input)
    if type(layer).__module__.startswith("peft.") and not torch.compiler.is_compiling():
        return _of_adapted(layer, input, of_layer, of_logits)
    return of_logits(layer(input))


def _inside(of_layer: OfLayer[T], of_logits: OfLogits[T], layer: nn.Linear, input: Tensor) -> T:
    weight, bias = layer.weight, layer.bias
    if _is_known(weight) and _is_known(bias):
        return of_layer(input, weight, bias)
    return of_logits(nn.Linear.forward(layer, input))


def _is_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether calling the layer computes ``F.linear`` of its weight and bias."""
    forward = getattr(type(layer), "forward", None)
    return forward is nn.Linear.forward and "forward" not in vars(layer)


def _is_known(v: Tensor | None) -> bool:
    """Return whether the linear losses take this kind of weight or bias."""
    if v is None or type(v) in (Tensor, Parameter):
        return not hasattr(v, "ds_id")  # of DeepSpeed, and possibly empty for now
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(v, module.DTensor)


def _owners(hooks: list[Any]) -> set[str]:
    """Return the packages that these hooks come from."""
    owners = set()
    for hook in hooks:
        home = getattr(hook, "__module__", None) or type(hook).__module__
        known = (owner for owner in (FSDP, TENSOR_PARALLEL) if home.startswith(owner))
        owners.add(next(known, home))
    return owners


def _of_adapted(layer: nn.Module, input: Tensor, of_layer: OfLayer[T], of_logits: OfLogits[T]) -> T:
    """Compute the loss of a PEFT layer, as one product of longer hidden states."""
    from ..integrations.transformers import forward as model_forward
    from ..integrations.transformers.logits import DeferredLogits

    with model_forward.deferred_logits(layer):
        logits = layer(input)
    if type(logits) is DeferredLogits:
        product = logits.as_one_product()
        return of_logits(logits.held("")) if product is None else of_layer(*product)
    return of_logits(logits)
