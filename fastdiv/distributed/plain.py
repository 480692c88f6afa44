"""Plain tensors beside DTensors must be the same on all ranks, and are compared.

They are where two readings meet.  A weight may be sharded because ranks share out the classes of
the same rows, or (FSDP2) because they share out memory, and each has rows of its own.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .._engine import arguments
from .alike import checksum, ranks_that_differ
from .world import every_call, gather, gather_numbers, nothing_is_real, world_of

DIFFERS = """{name} must be the same on every rank, as it is a plain tensor beside DTensors, but it
differs between {ranks}.
  If the ranks share out the classes of the same rows (tensor parallelism), give all of them the
  same tensor; a dropout before must draw the same numbers on all ranks.
  If each rank has rows of its own (data parallelism, FSDP2), call the module that holds the weight,
  or say so: input=DTensor.from_local(input, mesh, [Shard(0)]), and likewise for all tensors of
  rows; the loss is then that of all rows, and the weight is gathered."""


def check_alike(mesh: DeviceMesh, given: dict[str, Any]) -> Tensor | None:
    """Raises RuntimeError on all ranks for a plain tensor that differs between them.

    Where looking would wait for a device: what to multiply the loss by, 1, or NaN if one differs.
    """
    plain = {
        name: v for name, v in given.items() if isinstance(v, Tensor) and not isinstance(v, DTensor)
    }
    if torch.compiler.is_compiling() or not plain or mesh.size() == 1 or nothing_is_real():
        return None
    readable = all(arguments.values_may_be_read(v) for v in plain.values())
    guard, differing, ranks = None, 0, "other ranks of the mesh"
    for axis in range(mesh.ndim):
        world = world_of(mesh.get_group(axis))
        if world.size == 1:
            continue
        if readable or every_call(world.name):
            # Who knows of a difference passes it on along the next dimension: all are to raise.
            own = [differing, *(_in_short(v, readable) for v in plain.values())]
            known, *of_all = zip(*gather_numbers(world, own), strict=True)
            differing = max(known)
            for i, values in enumerate(of_all, 1):
                if words := ranks_that_differ(values):
                    differing, ranks = i, f"{words} of dimension {axis} of the mesh"
                    break
        if not readable:
            numbers = gather(world, torch.stack([checksum(v) for v in plain.values()]))
            alike = torch.where((numbers == numbers[0]).all(), 1.0, torch.nan)
            guard = alike if guard is None else guard * alike
    if differing:
        raise RuntimeError(DIFFERS.format(name=[*plain][differing - 1], ranks=ranks))
    return guard


def _in_short(v: Tensor, readable: bool) -> int:
    """What tells a tensor from another rank's, as far as may be looked at."""
    meta = repr((tuple(v.shape), v.dtype)).encode()
    digest = hashlib.blake2b(meta, digest_size=8).digest()
    of_values = int(checksum(v)) if readable else 0
    return int.from_bytes(digest, "little", signed=True) ^ of_values
