"""The part of a tensor on this rank, with its gradient, and the way back to a DTensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate


class _ToLocal(torch.autograd.Function):
    """``DTensor.to_local``, whose gradient has the shape and strides of the whole.

    torch derives the strides from this rank's part.  They are wrong where the parts differ in size.
    torch 2.11 then replicates the gradient of a sharded leaf.
    """

    @staticmethod
    def forward(ctx: Any, v: DTensor, of_gradient: tuple[Any, ...]) -> Tensor:
        ctx.mesh, ctx.of_gradient = v.device_mesh, of_gradient
        ctx.whole = v.shape, v.stride()
        local = v.to_local()
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[DTensor, None]:
        shape, stride = ctx.whole
        placed = ctx.mesh, ctx.of_gradient
        return DTensor.from_local(grad, *placed, run_check=False, shape=shape, stride=stride), None


def local_part(v: Tensor, mesh: DeviceMesh, placements: Any, of_gradient: Any, name: str) -> Tensor:
    """Return this rank's part of a tensor placed like ``placements``.

    Its gradient comes placed like ``of_gradient``, and is redistributed to the placements of the
    tensor; parts of a sum are added.  A plain tensor is the same on all ranks, and is cut.
    """
    if not isinstance(v, DTensor):
        v = DTensor.from_local(v, mesh, [Replicate()] * mesh.ndim, run_check=False)
    if v.device_mesh != mesh:
        raise ValueError(f"{name} must be on the mesh of the input, {mesh}, got {v.device_mesh}")
    if any(p.is_partial() for p in v.placements):
        raise ValueError(f"{name} must not be Partial, got {v.placements}")
    if tuple(v.placements) != tuple(placements) or tuple(of_gradient) != tuple(placements):
        v = v.redistribute(placements=placements)
    return _ToLocal.apply(v, tuple(of_gradient))


def placed_as(v: Tensor, mesh: DeviceMesh, placements: Any, shape: tuple[int, ...]) -> DTensor:
    """Return the DTensor of this shape whose part on this rank is ``v``."""
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        v, mesh, placements, run_check=False, shape=torch.Size(shape), stride=strides
    )
