"""The replacement that :func:`fastdiv.patch_torch` puts in the place of torch's cross entropy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..._engine.arguments import FLOATS, are_plain, is_number, row_shape
from ..._engine.backend import use_kernel
from ..._engine.symbolic import same_shape
from ..._engine.torch_private import (
    function_mode_watches,
    is_exporting,
    is_jit_traced,
    is_transformed,
)
from ..._losses.cross_entropy import cross_entropy as fastdiv_cross_entropy
from ...reference.choices import Reduction

on = False  # whether a patch stands
original: Callable[..., Tensor] = F.cross_entropy  # as the patch found it


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute fastdiv's cross entropy where it means the same, else torch's."""
    options: dict[str, Any] = {
        "weight": weight,
        "size_average": size_average,
        "ignore_index": ignore_index,
        "reduce": reduce,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
    }
    if on and not _watched():
        loss = fused(input, target, **options)
        if loss is not None:
            return loss
    if has_torch_function_variadic(input, target, weight):
        # Torch's function does the same, but would name the replacement as the function called.
        overridable = (input, target, weight)
        return handle_torch_function(original, overridable, input, target, **options)
    return original(input, target, **options)


def fused(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """Compute fastdiv's loss in torch's dtype, or return None where it means something else."""
    if (
        size_average is None
        and reduce is None
        and isinstance(reduction, str)
        and reduction in ("mean", "sum", "none")
        and is_number(label_smoothing)
        and 0 <= label_smoothing <= 1
        and is_number(ignore_index)
        and isinstance(ignore_index, int)
        and -(2**63) <= ignore_index < 2**63
        and _fit(input, target, weight, ignore_index)
    ):
        try:
            value = fastdiv_cross_entropy(
                input,
                target,
                weight,
                ignore_index=ignore_index,
                reduction=reduction,
                label_smoothing=label_smoothing,
            )
        except IndexError:  # a label out of range, for which torch has its own error
            if not input.is_cpu:  # torch's own error would be a device-side assertion
                raise
        else:
            return value.to(result_dtype(input, target))
    return None


def _watched() -> bool:
    """Tell whether a trace, an export or a mode records torch's function or its operations."""
    return is_jit_traced() or is_exporting() or function_mode_watches()


def _fit(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> bool:
    """Tell whether torch and fastdiv agree on these tensors, and there is a kernel for them."""
    if target is None or not are_plain(input, target, weight):
        return False
    if input.dtype not in FLOATS or input.dim() == 0:
        return False
    dim = 1 if input.dim() > 1 else 0
    classes = input.shape[dim]
    if target.dtype in FLOATS:
        fit = ignore_index < 0 and same_shape(target.shape, input.shape)
    else:
        fit = target.dtype is torch.int64 and same_shape(target.shape, row_shape(input, dim))
    if weight is not None:
        fit = (
            fit
            and weight.shape == (classes,)
            and _without_autocast(weight) is result_dtype(input, target)
            and not _differentiated(weight)
        )
    return fit and classes > 0 and use_kernel(input)


def _differentiated(weight: Tensor) -> bool:
    """Tell whether these class weights may be differentiated, or batched by ``vmap``."""
    return weight.requires_grad or is_transformed()


def result_dtype(input: Tensor, target: Tensor) -> torch.dtype:
    """Return the dtype of torch's result."""
    dtype = _without_autocast(input)
    if target.is_floating_point():
        dtype = torch.promote_types(dtype, _without_autocast(target))
    return dtype


def _without_autocast(v: Tensor) -> torch.dtype:
    """Return the dtype in which torch computes the loss: autocast makes half precision float32."""
    half = v.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if half and torch.is_autocast_enabled(v.device.type) else v.dtype
