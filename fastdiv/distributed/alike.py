"""Checksums that ranks compare for tensors that must be the same on all of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .._engine import arguments

# The tensors that must be the same on every rank of a group, in the order of their checksums.
ALIKE = (
    "the labels",
    "token_weight",
    "input, the hidden states of a tensor-parallel layer,",
    "target, the hidden states of a tensor-parallel teacher,",
)
HINTS = {
    2: "a dropout before the layer must draw the same numbers on all ranks; data-parallel ranks, "
    "each with its own rows, need the whole weight: pass it to fastdiv's function of this name",
}
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
LENGTH = 1 << 16  # entries that are summed at a time, so that no tensor is copied whole
ODD = 0x9E3779B97F4A7C15 - (1 << 64)


@functools.lru_cache(maxsize=8)
def _factors(device: torch.device) -> Tensor:
    """Return an odd factor for each position, so that the order of the entries matters."""
    place = torch.arange(LENGTH, device=device) * ODD
    return (place ^ (place >> 31)) | 1


def checksum(v: Tensor) -> Tensor:
    """Return an int64 number that depends on the bits of all entries and on their order."""
    bits = v.detach().contiguous().view(-1).view(INTEGERS[v.element_size()])
    factors = _factors(v.device)
    total = torch.zeros((), dtype=torch.int64, device=v.device)
    for part in bits.split(LENGTH):
        total = total * ODD + (part.long() * factors[: len(part)]).sum()
    return total


def checksums(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    """Return one checksum per tensor; 0 for None and for values that may not be read."""
    return tuple(
        int(checksum(v)) if v is not None and arguments.values_may_be_read(v) else 0
        for v in tensors
    )


def ranks_that_differ(values: Sequence[int]) -> str:
    """Return in words which ranks have the same checksum, or "" if all have."""
    ranks: dict[int, list[str]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(str(rank))
    if len(ranks) == 1:
        return ""
    groups = (f"rank{'s' * (len(r) > 1)} {', '.join(r)}" for r in ranks.values())
    return " / ".join(groups)


def check_alike(of_ranks: Sequence[Sequence[int]]) -> None:
    """Raise RuntimeError for the first tensor that is not the same on all ranks."""
    for i, (name, values) in enumerate(zip(ALIKE, zip(*of_ranks, strict=True), strict=True)):
        if differing := ranks_that_differ(values):
            hint = f" ({HINTS[i]})" if i in HINTS else ""
            raise RuntimeError(
                f"{name} must be the same on every rank of the group, bit by bit, but differ "
                f"between {differing}{hint}"
            )
