"""The dtypes of a layer's tensors under autocast, and of its logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Which devices have autocast.  The call is made here: the compiler of torch 2.11 cannot trace it.
_HAS_AUTOCAST = {
    device: torch.amp.is_autocast_available(device)
    for device in ("cpu", "cuda", "hpu", "maia", "meta", "mps", "mtia", "xla", "xpu")
}


def _has_autocast(device: str) -> bool:
    known = _HAS_AUTOCAST.get(device)
    return torch.amp.is_autocast_available(device) if known is None else known


def as_autocast(v: Tensor) -> Tensor:
    """Cast a tensor as autocast does on its device."""
    device = v.device.type
    if v.dtype == torch.float64 or not _has_autocast(device):
        return v
    return v.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else v


def check_logits_dtype(logits_dtype: torch.dtype | None) -> None:
    """Raise ValueError unless this is None or float32."""
    if logits_dtype is not None and logits_dtype is not torch.float32:
        raise ValueError(f"logits_dtype must be None or torch.float32, got {logits_dtype!r}")


def widens(x: Tensor, logits_dtype: torch.dtype | None) -> bool:
    """Return whether logits of these hidden states are wider than the hidden states."""
    return logits_dtype is not None and x.dtype.itemsize < logits_dtype.itemsize


def bytes_of_logit(x: Tensor, logits_dtype: torch.dtype | None) -> int:
    """Return how many bytes each of the logits takes where they are held whole."""
    return torch.float32.itemsize if widens(x, logits_dtype) else x.dtype.itemsize


def whole_logits(
    x: Tensor, weight: Tensor, bias: Tensor | None, logits_dtype: torch.dtype | None
) -> Tensor:
    """Compute ``F.linear``, also under autocast, in ``logits_dtype`` if that is wider."""
    if logits_dtype is None:
        return F.linear(x, weight, bias)
    x, weight = as_autocast(x), as_autocast(weight)
    bias = None if bias is None else as_autocast(bias)
    if not widens(x, logits_dtype):
        return F.linear(x, weight, bias)
    x, weight = x.to(logits_dtype), weight.to(logits_dtype)
    bias = None if bias is None else bias.to(logits_dtype)
    device = x.device.type
    if _has_autocast(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return F.linear(x, weight, bias)
    return F.linear(x, weight, bias)
