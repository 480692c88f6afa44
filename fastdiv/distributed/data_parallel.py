"""Weights that ``fully_shard`` shards over data-parallel ranks, gathered for the call of a loss.

FSDP2 gathers a weight while its module runs.  At any other time the parameter is a DTensor, and the
hidden states beside it are this rank's own.  The loss then gathers the weight as FSDP2 would, and
its gradient is reduced and scattered, and averaged over the ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .._engine.torch_private import FullyShardedWeight, fully_sharded, may_be_fully_sharded
from .parts import local_part
from .world import gather, scatter_sum, sum_over, world_of

# Hidden states, and what a layer computes its logits of them with.
LAYERS = {
    "input": ("linear_weight", "linear_bias"),
    "target": ("target_linear_weight", "target_linear_bias"),
}


def gather_weights(given: dict[str, Any]) -> None:
    """Put gathered tensors in the place of those that ``fully_shard`` has sharded.

    Hidden states on the mesh of the weight have a placement, which says that the loss is that of
    all ranks' rows.  Their weight stays as it is.
    """
    for hidden, names in LAYERS.items():
        for name in names:
            v, h = given.get(name), given.get(hidden)
            if not isinstance(v, DTensor):
                continue
            if isinstance(h, DTensor) and h.device_mesh == v.device_mesh:
                continue
            if torch.compiler.is_compiling():
                _check_not_compiled(v, name)
                continue
            known = fully_sharded(v)
            if known is None:
                continue
            given[name] = _gathered(known, name)
            if known.cast_inputs and isinstance(h, Tensor) and h.is_floating_point():
                given[hidden] = h.to(known.param_dtype)


def _check_not_compiled(v: DTensor, name: str) -> None:
    mesh = v.device_mesh
    groups = tuple([mesh.get_group(i).group_name for i in range(mesh.ndim)])
    if may_be_fully_sharded(tuple(v.shape), groups):
        raise RuntimeError(
            f"{name} is a parameter of fully_shard, which cannot be gathered in compiled code: "
            "compute the loss in the forward of the module that holds it, or outside of "
            "torch.compile"
        )


def _gathered(known: FullyShardedWeight, name: str) -> Tensor:
    """Return the tensor as its module's forward would see it."""
    v = known.parameter
    mesh, whole = v.device_mesh, known.mesh
    ours, theirs = mesh.mesh_dim_names or (), whole.mesh_dim_names or ()
    rest = [i for i, axis in enumerate(ours) if axis not in theirs]
    if known.transformed or mesh.ndim - whole.ndim not in (0, len(rest)):
        why = (
            "has all-gather extensions" if known.transformed else f"is sharded over the mesh {mesh}"
        )
        raise ValueError(
            f"{name} is a parameter of fully_shard that {why}, and cannot be gathered for one "
            "call: call the module that holds it, or compute the loss in that module's forward"
        )
    of_rank = local_part(v, mesh, v.placements, v.placements, name)
    local = _Gather.apply(of_rank, known)
    if mesh.ndim == whole.ndim:
        return local
    # Tensor-parallel ranks still share the classes.
    tensor_parallel = mesh[tuple(ours[i] for i in rest)]
    placements = [v.placements[i] for i in rest]
    return DTensor.from_local(
        local, tensor_parallel, placements, run_check=False, shape=v.shape, stride=v.stride()
    )


class _Gather(torch.autograd.Function):
    """The tensor of all shards, from this rank's."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, known: FullyShardedWeight) -> Tensor:
        ctx.known, ctx.shard = known, shard.new_empty(()).expand(shard.shape)
        shard = shard.to(known.device, known.param_dtype or shard.dtype)
        return _whole(shard, known)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Scatter.apply(grad, ctx.known, ctx.shard), None


class _Scatter(torch.autograd.Function):
    """This rank's shard of the mean of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, known: FullyShardedWeight, like: Tensor) -> Tensor:
        ctx.known, ctx.grad = known, grad.new_empty(()).expand(grad.shape)
        dtype = known.reduce_dtype or grad.dtype
        # The sum of many ranks may be too large for float16.
        grad = grad.to(torch.float32 if dtype == torch.float16 else dtype)
        mean = _sum_of_shard(grad, known, like.shape[known.dim]) / known.divisor
        return mean.to(like.device, like.dtype)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None, None]:
        like = ctx.grad
        v = _whole(v.to(like.device), ctx.known) / ctx.known.divisor
        return v.to(like.dtype), None, None


def _whole(shard: Tensor, known: FullyShardedWeight) -> Tensor:
    """Return the shards of all ranks in one tensor; the last ones may be smaller, or empty."""
    if known.shards is None or (world := world_of(known.shards)).size == 1:
        return shard.view_as(shard)
    dim, size = known.dim, known.shape[known.dim]
    shards = gather(world, _padded(shard, dim, -(-size // world.size)))
    return shards.movedim(0, dim).flatten(dim, dim + 1).narrow(dim, 0, size)


def _sum_of_shard(v: Tensor, known: FullyShardedWeight, size: int) -> Tensor:
    """Return this rank's shard, of this size, of the sum over all ranks."""
    dim = known.dim
    if known.shards is not None and (world := world_of(known.shards)).size > 1:
        most = -(-known.shape[dim] // world.size)
        v = _padded(v, dim, most * world.size)
        shards = v.unflatten(dim, (world.size, most)).movedim(dim, 0)
        v = scatter_sum(world, shards).narrow(dim, 0, size)
    return v if known.replicas is None else sum_over(world_of(known.replicas).name, v)


def _padded(v: Tensor, dim: int, size: int) -> Tensor:
    """Return the tensor with zeros at the end of a dimension, up to this size."""
    if v.shape[dim] == size:
        return v
    shape = list(v.shape)
    shape[dim] = size - v.shape[dim]
    return torch.cat([v, v.new_zeros(shape)], dim)
