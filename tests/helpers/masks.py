"""Masks of classes in every form, and what they mean: a copy of the logits with -inf in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from helpers.cases import LOSSES, Case, TopKCase, rand
from helpers.values import value_and_gradients

# A capped logit is never -inf, so that the copy of a case with softcap does not exist.
MASKED = [c for c in LOSSES if not isinstance(c, TopKCase) and "softcap" not in c.options]


def make_mask(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Return a mask with a class left in every row; of the first row, no other."""
    mask = rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.3
    mask[..., shape[-1] // 2] = True
    if mask.dim() > 1:
        mask.flatten(0, -2)[0, : shape[-1] // 2] = False
    return mask


def bits_of(mask: Tensor) -> Tensor:
    """Return a mask packed into bits; those behind the last class are set, and must not count."""
    packed = np.packbits(mask.cpu().numpy(), axis=-1, bitorder="little")
    if rest := mask.shape[-1] % 8:
        packed[..., -1] |= 0xFF << rest & 0xFF
    return torch.from_numpy(packed).to(mask.device)


def masked_copy(case: Case, x: Tensor, t: Tensor | None, mask: Tensor) -> tuple[Any, Any]:
    """Return copies of logits and target in which the classes outside of a mask have no mass."""
    if t is not None and case.soft:
        t = t.masked_fill(~mask, 0.0 if case.target == "probs" else -torch.inf)
    return x.masked_fill(~mask, -torch.inf), t


def found(case: Case, x: Tensor, t: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
    """Return the values of a case and its gradients."""
    return value_and_gradients(lambda x, t: case.call(x, t, **options), x, t)


def found_of_copy(
    case: Case, x: Tensor, t: Tensor | None, mask: Tensor, **options: Any
) -> tuple[Tensor, ...]:
    """Return the same of masked copies, whose gradients are 0 where a copy differs."""
    return value_and_gradients(
        lambda x, t: case.call(*masked_copy(case, x, t, mask), **options), x, t
    )
