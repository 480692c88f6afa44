"""A model of a GPU: how many blocks share a multiprocessor, and what limits a loop.

An H100 copies 3.0 TB/s, and we take its clock under load as 1.755 GHz.  The figures of a B200 are
those of its data sheet.
"""

from __future__ import annotations

from typing import NamedTuple

LANES = 32
# A loop of independent instructions fills three quarters of the issue slots.
ISSUE_REACHED = 0.75
# A kernel that waits for memory only reaches this share of a copy.
MEMORY_REACHED = 0.92


class Gpu(NamedTuple):
    """Limits of a multiprocessor and of the GPU."""

    registers: int = 65536
    shared: int = 228 << 10  # bytes per multiprocessor
    shared_per_block: int = 227 << 10
    threads: int = 2048
    blocks: int = 32
    schedulers: int = 4  # each issues one instruction of a warp a clock
    special_lanes: int = 16  # of the units of special functions, per clock
    multiprocessors: int = 132
    clock: float = 1.755e9
    copy: float = 3.0e12  # bytes per second, read and written

    def blocks_per_sm(self, registers: int, threads: int, shared: int) -> int:
        """How many blocks share a multiprocessor; `shared` includes what CUDA reserves."""
        warps = -(-threads // LANES)
        per_warp = -(-registers * LANES // 256) * 256
        resident = self.registers // self.schedulers // per_warp * self.schedulers
        of_shared = self.shared // (-(-shared // 128) * 128) if shared else self.blocks
        return min(resident // warps, of_shared, self.threads // (warps * LANES), self.blocks)

    def share_of_copy(self, instructions: float, special: float, moved: int) -> float:
        """Return the predicted share of the bandwidth of a copy.

        The arguments are per element or pair: instructions, those of them that take the unit of
        special functions, and the bytes moved.
        """
        clocks = self.copy / self.multiprocessors / self.clock / moved  # elements a clock
        issued = self.schedulers * LANES / instructions / clocks
        evaluated = self.special_lanes / special / clocks if special else 1.0
        return min(MEMORY_REACHED, ISSUE_REACHED * issued, evaluated)


# By architecture: an H100 and a B200.
GPUS = {90: Gpu(), 100: Gpu(multiprocessors=148, clock=1.85e9, copy=8e12)}
