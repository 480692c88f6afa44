"""Tensors made under ``torch.inference_mode()``, such as a teacher's, in a training step.

Autograd refuses to save such a tensor for a backward, since it has no version counter to detect a
change.  A normal tensor over the same memory has one, and needs no copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .torch_private import func_is_active, inside_transforms


def savable(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Return the same tensors, with those of inference mode as normal tensors.

    A write to such a tensor under inference mode between forward and backward changes what the
    backward reads, without an error.  Compiled code gets the tensors as they are, since tracing
    cannot detect them.
    """
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return tensors
    if func_is_active():
        return tuple(
            v.clone() if v is not None and inside_transforms(v).is_inference() else v
            for v in tensors
        )
    return tuple(_normal(v) if v is not None and v.is_inference() else v for v in tensors)


def _normal(v: Tensor) -> Tensor:
    if v.is_neg() or not (v.is_cpu or v.is_cuda):
        return v.clone()
    with torch.no_grad():
        alias = v.new_empty(0)
        return alias.set_(v.untyped_storage(), v.storage_offset(), v.size(), v.stride())
