"""Losses of DTensors: this package's of their shards, and DTensors of what comes out.

What is returned is placed as torch's own ``loss_parallel`` places it: replicated over the ranks
that share the classes; over others as the rows are, or where they are summed, a part of the sum.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from ..reference import Stats

Placements = list[Any]


def call(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """A function of :mod:`fastdiv` with arguments of which some may be DTensors."""
    from .. import distributed

    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    name = function.__name__
    if not any(isinstance(v, DTensor) for v in given.values()):
        return function(*args, **kwargs)
    sharded = getattr(distributed, name, None)
    if sharded is None:
        raise TypeError(f"{name} does not take DTensors: give it the whole rows, as plain tensors")
    return (_of_layer if "linear_weight" in given else _of_logits)(sharded, given)


def _of_logits(function: Callable[..., Any], given: dict[str, Any]) -> Any:
    x = given["input"]
    if not isinstance(x, DTensor):
        raise TypeError("input must be a DTensor where another argument is one")
    dim = given["dim"]
    dim = (1 if x.dim() > 1 else 0) if dim is None else dim % x.dim()
    axis = _axis_of_classes(x, dim, "input")
    of_rows = [_without(p, dim) if i != axis else Replicate() for i, p in enumerate(x.placements)]
    placements = {"input": x.placements, "token_weight": of_rows, "index": of_rows}
    soft = "target" in given and given["target"].is_floating_point()
    placements["target"] = x.placements if soft else of_rows
    placements["weight"] = _only(axis, x.device_mesh)
    return _call(function, given, x.device_mesh, axis, placements, of_rows)


def _of_layer(function: Callable[..., Any], given: dict[str, Any]) -> Any:
    w = given["linear_weight"]
    if not isinstance(w, DTensor):
        raise TypeError("linear_weight must be a DTensor where another argument is one")
    axis = _axis_of_classes(w, 0, "linear_weight")
    classes, mesh = _only(axis, w.device_mesh), w.device_mesh
    rows: Placements = [Replicate()] * mesh.ndim
    last = given["input"].dim() - 1
    dense: Placements = [Shard(last) if i == axis else Replicate() for i in range(mesh.ndim)]
    soft = given["target"].is_floating_point() and given.get("target_linear_weight") is None
    placements = {
        "input": rows,
        "token_weight": rows,
        "target": dense if soft else rows,
        "linear_weight": classes,
        "linear_bias": classes,
        "weight": classes,
        "target_linear_weight": classes,
        "target_linear_bias": classes,
    }
    if given.pop("options", None) is not None:
        raise ValueError("options of torch.nn are not taken with DTensors: use chunk_size")
    return _call(function, given, mesh, axis, placements, rows)


def _call(
    function: Callable[..., Any],
    given: dict[str, Any],
    mesh: DeviceMesh,
    axis: int,
    placements: dict[str, Any],
    of_rows: Placements,
) -> Any:
    reduction = given.get("reduction", "none")
    scattered = any(p.is_shard() for p in of_rows)
    if scattered and reduction in ("mean", "batchmean"):
        raise ValueError(
            f"reduction={reduction!r} of rows that are sharded over another dimension of the mesh: "
            "use 'sum' or 'none', and divide by the number of rows that count, on all ranks"
        )
    local = {
        name: _local(v, mesh, placements[name], name) if isinstance(v, Tensor) else v
        for name, v in given.items()
    }
    out = function(**local, group=mesh.get_group(axis))
    whole = of_rows if reduction == "none" else [_summed(p) for p in of_rows]

    def as_dtensor(v: Tensor, placed: Placements) -> DTensor:
        return DTensor.from_local(v, mesh, placed, run_check=False)

    if not isinstance(out, tuple):
        return as_dtensor(out, whole)
    if isinstance(out[1], Stats):
        return as_dtensor(out[0], whole), Stats(*(as_dtensor(s, of_rows) for s in out[1]))
    return tuple(as_dtensor(v, of_rows) for v in out)


def _local(v: Tensor, mesh: DeviceMesh, placements: Any, name: str) -> Tensor:
    """This rank's part; a plain tensor is the same on all ranks."""
    if not isinstance(v, DTensor):
        v = DTensor.from_local(v, mesh, [Replicate()] * mesh.ndim, run_check=False)
        v = v.redistribute(placements=placements)  # cuts, and sends nothing
    if v.device_mesh != mesh or tuple(v.placements) != tuple(placements):
        raise ValueError(f"{name} must be placed as {tuple(placements)}, got {v.placements}")
    return v.to_local() if torch.compiler.is_compiling() else _ToLocal.apply(v)


class _ToLocal(torch.autograd.Function):
    """``DTensor.to_local`` whose gradient has the shape and the strides of the DTensor.

    Torch 2.11 makes them up from one shard, wrongly where shards differ in size.  A leaf then
    accumulates its gradient in a layout of its own, replicated over the mesh.
    """

    @staticmethod
    def forward(ctx: Any, v: DTensor) -> Tensor:
        ctx.placed = {
            "device_mesh": v.device_mesh,
            "placements": v.placements,
            "shape": v.shape,
            "stride": v.stride(),
        }
        local = v.to_local()
        return local.view_as(local)  # not the tensor inside of the DTensor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> DTensor:
        return DTensor.from_local(grad, run_check=False, **ctx.placed)


def _axis_of_classes(v: DTensor, dim: int, name: str) -> int:
    """The one dimension of the mesh that shares out the classes."""
    axes = [i for i, p in enumerate(v.placements) if p.is_shard(dim)]
    partial = any(p.is_partial() for p in v.placements)
    if len(axes) != 1 or partial or v.shape[dim] < v.device_mesh.size(axes[0]):
        raise ValueError(
            f"a DTensor {name} must be sharded along its classes, dimension {dim}, over one "
            "dimension of the mesh, with a class for every rank, and a part of a sum over none: "
            f"got {v.placements} of shape {tuple(v.shape)}"
        )
    return axes[0]


def _without(placement: Any, dim: int) -> Any:
    """As rows are placed, which have no dimension of classes."""
    return Shard(placement.dim - (placement.dim > dim)) if placement.is_shard() else placement


def _only(axis: int, mesh: DeviceMesh) -> Placements:
    return [Shard(0) if i == axis else Replicate() for i in range(mesh.ndim)]


def _summed(placement: Any) -> Any:
    return Partial() if placement.is_shard() else placement
