"""Plain tensors beside DTensors must be the same on all ranks, and are compared.

A sharded weight has two readings.  In tensor parallelism the ranks have the same rows, and each has
some classes.  In FSDP2 the weight is sharded to save memory, and each rank has its own rows.  The
parameters of ``fully_shard`` are known and gathered before; what is computed from them is not.
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
  If the ranks have the same rows and shard the classes (tensor parallelism), pass the same tensor
  on all of them; a dropout before must draw the same numbers on all ranks.
  If each rank has its own rows (data parallelism, FSDP2), pass the parameter of fully_shard itself,
  not a tensor that is computed from it, or call the module that holds it.  Or pass
  input=DTensor.from_local(input, mesh, [Shard(0)]), and likewise all other tensors of rows; the
  loss is then that of all rows, and the weight is gathered."""


def check_alike(mesh: DeviceMesh, given: dict[str, Any]) -> Tensor | None:
    """Raise RuntimeError on all ranks for a plain tensor that differs between them.

    Where that would wait for a device, return a factor for the loss: 1, or NaN if one differs.
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
            # A difference is passed on along the next dimension, so that all ranks raise.
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
    """Return a digest of shape and dtype, and of the values where they may be read."""
    meta = repr((tuple(v.shape), v.dtype)).encode()
    digest = hashlib.blake2b(meta, digest_size=8).digest()
    of_values = int(checksum(v)) if readable else 0
    return int.from_bytes(digest, "little", signed=True) ^ of_values
