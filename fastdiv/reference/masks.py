"""Masks of classes that are packed into bits."""

from __future__ import annotations

import torch
from torch import Tensor


def unpacked(mask: Tensor, classes: int) -> Tensor:
    """Return a mask as bool; class c is bit ``c % 8`` of byte ``c // 8`` if it is packed."""
    if mask.dtype is torch.bool:
        return mask
    bits = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (mask.unsqueeze(-1) >> bits & 1).flatten(-2)[..., :classes].to(torch.bool)
