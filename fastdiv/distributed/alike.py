"""Checksums, by which ranks compare tensors that must be the same on all of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .._engine import arguments

# What every rank of a group must have alike, in the order of the checksums.
ALIKE = (
    "the labels",
    "token_weight",
    "input, the hidden states of a tensor-parallel layer,",
    "target, the hidden states of a tensor-parallel teacher,",
)
HINTS = {
    2: "a dropout before the layer must draw the same numbers on all ranks; data-parallel ranks, "
    "each with rows of its own, need the whole weight: give it to fastdiv's function of this name",
}
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
LENGTH = 1 << 16  # entries that are added up at a time, so that no copy of a tensor is made
ODD = 0x9E3779B97F4A7C15 - (1 << 64)


@functools.lru_cache(maxsize=8)
def _factors(device: torch.device) -> Tensor:
    """An odd factor for each place, by which the order of the entries counts."""
    place = torch.arange(LENGTH, device=device) * ODD
    return (place ^ (place >> 31)) | 1


def checksum(v: Tensor) -> Tensor:
    """A number, int64, that depends on the bits of all entries and on their order."""
    bits = v.detach().contiguous().view(-1).view(INTEGERS[v.element_size()])
    factors = _factors(v.device)
    total = torch.zeros((), dtype=torch.int64, device=v.device)
    for part in bits.split(LENGTH):
        total = total * ODD + (part.long() * factors[: len(part)]).sum()
    return total


def checksums(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    """One for each tensor; 0 where there is none, or where its values may not be read."""
    return tuple(
        int(checksum(v)) if v is not None and arguments.values_may_be_read(v) else 0
        for v in tensors
    )


def ranks_that_differ(values: Sequence[int]) -> str:
    """Which ranks have the same checksum, in words; nothing if all have."""
    ranks: dict[int, list[str]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(str(rank))
    if len(ranks) == 1:
        return ""
    groups = (f"rank{'s' * (len(r) > 1)} {', '.join(r)}" for r in ranks.values())
    return " / ".join(groups)


def check_alike(of_ranks: Sequence[Sequence[int]]) -> None:
    """Raises RuntimeError for the first tensor that is not the same on all ranks."""
    for i, (name, values) in enumerate(zip(ALIKE, zip(*of_ranks, strict=True), strict=True)):
        if differing := ranks_that_differ(values):
            hint = f" ({HINTS[i]})" if i in HINTS else ""
            raise RuntimeError(
                f"{name} must be the same on every rank of the group, to the bit, but differ "
                f"between {differing}{hint}"
            )
