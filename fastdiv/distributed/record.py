"""The record of a row by names: eight numbers, as ``csrc/losses/record.h`` lays them out."""

from __future__ import annotations

import torch
from torch import Tensor

from .._engine.ops import RECORD_SIZE

SLOTS = {
    "x_max": 0,
    "x_logz": 1,
    "t_max": 2,
    "t_logz": 3,
    "log_z_ratio": 4,
    "own_weight": 4,
    # The others depend on the loss: a cross entropy, an entropy, a divergence.
    "q_factor": 5,
    "label_mass": 6,
    "entropy": 5,
    "sum_u": 5,
    "sum_v": 6,
    "use_direct": 7,
}


def packed_record(record: dict[str, Tensor]) -> Tensor:
    """Return a record as the kernels read it, with zeros for what is missing: ``[R, 8]``."""
    slots = [torch.zeros_like(record["x_max"])] * RECORD_SIZE
    for name, number in record.items():
        slots[SLOTS[name]] = number
    return torch.stack(slots, 1)


def unpacked_record(record: Tensor) -> dict[str, Tensor]:
    """Return the numbers of a record by their names; only those of its loss mean something."""
    numbers = record.unbind(1)
    return {name: numbers[slot] for name, slot in SLOTS.items()}
