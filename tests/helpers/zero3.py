"""A layer as ZeRO-3 of DeepSpeed leaves it: parameters that are empty until a hook fills them.

DeepSpeed 0.19 registers hooks of these kinds, in this order, and wraps tensors in these ways.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def _wrapped(v: Any, on_backward: Callable[[], None]) -> Any:
    """Tensors whose backward calls the function first; in tuples, too."""

    class Wrap(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, v: Tensor) -> Tensor:
            return v.detach()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            on_backward()
            return grad

    if isinstance(v, tuple):
        parts = [_wrapped(part, on_backward) for part in v]
        return type(v)(*parts) if hasattr(v, "_fields") else type(v)(parts)
    return Wrap.apply(v) if isinstance(v, Tensor) and v.requires_grad else v


def partition(layer: nn.Module) -> dict[nn.Parameter, Tensor]:
    """Empty the parameters of a layer outside of its calls; return what they hold during them."""
    held = {}
    for number, parameter in enumerate(layer.parameters()):
        held[parameter] = parameter.data
        parameter.ds_id, parameter.ds_shape = number, parameter.shape

    def gather() -> None:
        for parameter, data in held.items():
            parameter.data = data

    def release() -> None:
        for parameter in held:
            parameter.data = torch.empty(0)

    def before(*_: Any) -> None:
        gather()

    def after(*_: Any) -> None:
        release()

    def before_backward(_: nn.Module, inputs: Any, output: Any) -> Any:
        return _wrapped(output, gather)

    def after_backward(_: nn.Module, inputs: Any) -> Any:
        return _wrapped(inputs, release)

    for hook, home in (
        (before, "runtime.zero.parameter_offload"),
        (after, "utils.nvtx"),  # which wraps hooks for its profiler
        (before_backward, "runtime.zero.parameter_offload"),
        (after_backward, "runtime.zero.parameter_offload"),
    ):
        hook.__module__ = f"deepspeed.{home}"
    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after)
    layer.register_forward_hook(before_backward)
    layer.register_forward_pre_hook(after_backward)
    release()
    return held
