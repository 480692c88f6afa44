"""The forward of a model, run so that the cross entropy of its logits is fastdiv's."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import local
from typing import Any

import torch
from torch import Tensor, nn

from ..._linear.dtypes import whole_logits
from ..handle import replaced_forward
from .logits import DeferredLogits, HeldLogits, Step

# Classes whose loss is a cross entropy of their output layer's logits.
LANGUAGE_MODEL = re.compile("ForCausalLM|ForMaskedLM|LMHead|ForConditionalGeneration")

_here = local()
_reported: set[type] = set()


def is_running() -> bool:
    """Tell whether a model that calls this one has its logits deferred, or held, already."""
    return getattr(_here, "running", False)


def run(
    model: Any,
    forward: Callable[..., Any],
    linear: bool,
    logits_dtype: torch.dtype | None,
    keep: bool,
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run a model's forward; its logits are deferred in training if ``linear``, and else held.

    Held logits are returned as ordinary tensors, unless ``keep`` is true.
    """
    training = model.training and torch.is_grad_enabled()
    try:
        layers = output_layers(model)
    except _Unknown as error:
        if training and LANGUAGE_MODEL.search(type(model).__name__):
            _report(error)
        return forward(*args, **kwargs)
    deferring = linear and training and not getattr(model, "_is_replica", False)
    step = Step()
    _here.running = True
    try:
        logits = partial(_deferred if deferring else _held, step, logits_dtype)
        with replaced_forward(layers, logits):
            output = forward(*args, **kwargs)
    finally:
        _here.running = step.running = False
    trouble = step.trouble if step.called else "it does not call its output layer"
    if training and trouble:
        _report(_Unknown(model, trouble))
    return output if keep else with_plain_logits(output)


class _Unknown(ValueError):
    """A model that computes its logits, or its loss, in a way that fastdiv does not know."""

    def __init__(self, model: Any, why: str) -> None:
        self.model = type(model)
        super().__init__(f"fastdiv does not know how {self.model.__qualname__} works: {why}")


def _report(trouble: _Unknown) -> None:
    """Warn, once for each class."""
    if trouble.model not in _reported:
        _reported.add(trouble.model)
        warnings.warn(f"{trouble}; it is trained as without fastdiv", stacklevel=4)


def output_layers(model: Any) -> list[nn.Linear]:
    """Return the linear layers whose sum is this model's logits; with LoRA there are several."""
    head = model.get_output_embeddings()
    if head is None:
        raise _Unknown(model, "get_output_embeddings() is None")
    # A layer of another class may hold its weight only while its own forward runs (FSDP).
    if type(head) is not nn.Linear and not type(head).__module__.startswith("peft."):
        kind = f"{type(head).__module__}.{type(head).__qualname__}"
        raise _Unknown(model, f"its output layer is a {kind}, not a torch.nn.Linear")
    layers = _layers_of(head)
    for layer in layers:
        if "forward" in vars(layer):
            raise _Unknown(model, "something replaced its output layer's forward")
    return layers


def _layers_of(head: nn.Module) -> list[nn.Linear]:
    """Return the linear layers inside a head whose sum is its logits."""
    linear = [layer for layer in head.modules() if type(layer) is nn.Linear]
    classes = max((layer.out_features for layer in linear), default=0)
    return [layer for layer in linear if layer.out_features == classes]


@contextmanager
def deferred_logits(head: nn.Module, logits_dtype: torch.dtype | None) -> Iterator[None]:
    """Let a head return deferred logits, where nothing replaced its layers' forward."""
    layers = [layer for layer in _layers_of(head) if "forward" not in vars(layer)]
    step = Step()
    try:
        with replaced_forward(layers, partial(_deferred, step, logits_dtype)):
            yield
    finally:
        step.running = False


def _held(step: Step, logits_dtype: torch.dtype | None, layer: nn.Linear, input: Tensor) -> Tensor:
    step.called = True
    logits = whole_logits(input, layer.weight, layer.bias, logits_dtype)
    return logits.as_subclass(HeldLogits) if type(logits) is Tensor else logits


def _deferred(
    step: Step, logits_dtype: torch.dtype | None, layer: nn.Linear, input: Tensor
) -> Tensor:
    step.called = True
    if type(input) is not Tensor:
        step.trouble = f"its output layer is given a {type(input).__qualname__}"
    elif type(layer.weight) not in (Tensor, nn.Parameter) or hasattr(layer.weight, "ds_id"):
        step.trouble = "its output layer's weight is sharded"
    else:
        return DeferredLogits.of_layer(input, layer.weight, layer.bias, step, logits_dtype)
    return nn.Linear.forward(layer, input)


def with_plain_logits(output: Any) -> Any:
    """Return a model's output with ordinary tensors in place of ``HeldLogits``."""
    if isinstance(output, HeldLogits):
        return output.as_subclass(Tensor)
    if type(output) is tuple:
        return tuple(map(with_plain_logits, output))
    if isinstance(output, dict):
        for name, v in output.items():
            if isinstance(v, HeldLogits):
                output[name] = v.as_subclass(Tensor)
    return output
