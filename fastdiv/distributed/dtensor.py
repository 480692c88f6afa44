"""Losses of DTensors: the loss of their local parts, returned as DTensors.

A dimension of the mesh may shard rows, classes, or nothing.  Where it shards classes, the ranks
compute the loss of :mod:`fastdiv.distributed`.  Otherwise each rank computes the rows it has.

Values per row are placed like the rows.  A sum or mean is that of the whole batch.  It is
replicated, or a part of a sum (``Partial()``) over the ranks that shard the rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from .. import reference
from .._engine import arguments
from .._engine.in_place import check_no_leaf
from ..reference import Stats, value_dtype
from . import plain
from .data_parallel import gather_weights
from .parts import local_part, placed_as
from .world import sum_over

Placements = list[Any]


@dataclass
class Layout:
    """The placements of a loss on its mesh, and the shape of all rows."""

    mesh: DeviceMesh
    dim: int  # of the input along a row: that of the classes, or of the hidden states
    axis: int | None  # the dimension of the mesh that shards the classes
    rows: Placements  # of a tensor with one value per row
    shape: tuple[int, ...]  # of all rows

    @property
    def of_sums(self) -> Placements:
        """The placements of a sum over the rows."""
        return [Partial() if p.is_shard() else p for p in self.rows]

    @property
    def of_classes(self) -> Placements:
        """The placements of a tensor with the classes first."""
        return [Shard(0) if i == self.axis else Replicate() for i in range(self.mesh.ndim)]

    @property
    def of_used_by_rows(self) -> Placements:
        """The placements of the gradient of such a tensor, from the rows of this rank."""
        return [
            Partial() if rows.is_shard() else p
            for rows, p in zip(self.rows, self.of_classes, strict=True)
        ]

    @property
    def row_axes(self) -> list[int]:
        """The dimensions of the mesh that shard rows."""
        return [i for i, p in enumerate(self.rows) if p.is_shard()]


def call(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a function of :mod:`fastdiv` with arguments of which some may be DTensors."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    gather_weights(given)
    first = next((v for v in given.values() if isinstance(v, DTensor)), None)
    if first is None:
        return function(**given)
    _check_supported(function.__name__, given)
    if "linear_weight" in given:
        return _of_layer(function, given, first.device_mesh)
    return _of_logits(function, given)


def _check_supported(name: str, given: dict[str, Any]) -> None:
    """Raise for arguments that only plain tensors may have beside them."""
    for argument in ("class_mask", "temperature"):
        if isinstance(given.get(argument), Tensor):
            other = "" if argument == "class_mask" else " or pass a number"
            raise TypeError(
                f"{name} does not support a Tensor as {argument} with DTensors: call it with "
                f"to_local() of whole rows{other}"
            )
    index, x = given.get("index"), given["input"]
    if "linear_weight" in given or not (isinstance(index, Tensor) and isinstance(x, Tensor)):
        return
    if index.dim() == x.dim():
        raise TypeError(
            f"{name} does not support several classes in each row with DTensors: call it with "
            "to_local() of whole rows"
        )


def _of_logits(function: Callable[..., Any], given: dict[str, Any]) -> Any:
    x = given["input"]
    if not isinstance(x, DTensor):
        raise TypeError("input must be a DTensor if another argument is one")
    if given.get("inplace_backward"):
        check_no_leaf(x)  # the local part is never a leaf
    dim = given["dim"]
    dim = (1 if x.dim() > 1 else 0) if dim is None else arguments.class_dim(x, dim)
    axis = _axis_of_classes(x.placements, x, dim, "input")
    rows = [_without(p, dim) if i != axis else Replicate() for i, p in enumerate(x.placements)]
    layout = Layout(x.device_mesh, dim, axis, rows, arguments.row_shape(x, dim))
    placements = {}
    for name, v in given.items():
        if isinstance(v, Tensor):
            placements[name] = list(x.placements) if v.dim() == x.dim() else rows
    if isinstance(given.get("weight"), Tensor):
        placements["weight"] = layout.of_classes
    return _call(function, given, layout, placements, {}, x.shape[dim])


def _of_layer(function: Callable[..., Any], given: dict[str, Any], mesh: DeviceMesh) -> Any:
    h, w = given["input"], given["linear_weight"]
    for name, v in (("input", h), ("linear_weight", w)):
        if not isinstance(v, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(v).__name__}")
    if w.dim() > 2:
        raise ValueError(
            "linear_weight of more than two dimensions is not supported with DTensors, got shape "
            f"{tuple(w.shape)}: pass the logits to cross_entropy"
        )
    everywhere: Placements = [Replicate()] * mesh.ndim
    of_h, of_w = (v.placements if isinstance(v, DTensor) else everywhere for v in (h, w))
    last = h.dim() - 1
    rows = [p if p.is_shard() else Replicate() for p in of_h]
    if any(p.is_partial() or p.is_shard(last) for p in of_h):
        raise ValueError(
            "a DTensor input of a layer must have its whole last dimension on every rank, and must "
            f"not be Partial: got {of_h} of shape {tuple(h.shape)}"
        )
    # Over ranks with different rows the weight is gathered, as FSDP does.
    of_alike = [p if not r.is_shard() else Replicate() for p, r in zip(of_w, rows, strict=True)]
    axis = _axis_of_classes(of_alike, w, 0, "linear_weight")
    layout = Layout(mesh, last, axis, rows, tuple(h.shape[:-1]))
    if axis is not None and given.pop("options", None) is not None:
        raise ValueError("options is not supported for sharded classes: use chunk_size")
    if axis is not None and given.pop("accumulate", None) == "weight":
        raise ValueError(
            "accumulate='weight' is not supported for sharded classes, whose gradients need an "
            "exchange after the logits: use accumulate=None"
        )
    dense = [Shard(last) if i == axis else p for i, p in enumerate(rows)]
    hidden = given.get("target_linear_weight") is not None
    placements, of_gradients = {}, {}
    for name, v in given.items():
        if isinstance(v, Tensor):
            placements[name] = rows
            if name == "target" and v.is_floating_point() and not hidden:
                placements[name] = dense
            if name.endswith(("linear_weight", "linear_bias")) or name == "weight":
                placements[name] = layout.of_classes
                of_gradients[name] = layout.of_used_by_rows
    return _call(function, given, layout, placements, of_gradients, w.shape[0])


def _call(
    function: Callable[..., Any],
    given: dict[str, Any],
    layout: Layout,
    placements: dict[str, Placements],
    of_gradients: dict[str, Placements],
    classes: int,
) -> Any:
    """Compute the loss of the local parts, and place it."""
    options: dict[str, Any] = {}
    if layout.axis is not None:
        function = _sharded(function)
        options["group"] = layout.mesh.get_group(layout.axis)
    guard = plain.check_alike(layout.mesh, given)
    local = dict(given)
    if layout.axis is not None:
        for name in local.keys() - inspect.signature(function).parameters.keys():
            if local.pop(name) is not None:
                raise TypeError(
                    f"{function.__name__} of sharded classes has no {name}: call it with "
                    "to_local() of whole rows"
                )
    for name, placed in placements.items():
        of_gradient = of_gradients.get(name, placed)
        local[name] = local_part(given[name], layout.mesh, placed, of_gradient, name)
    reduction = given.get("reduction", "none")
    divisor: Tensor | int | None = None
    if layout.row_axes and reduction in ("mean", "batchmean"):
        options["reduction"] = "sum"
        divisor = layout.shape[0] if layout.shape else 1
        if reduction == "mean":
            divisor = _count(given, local, layout, classes)
    out = function(**{**local, **options})

    def as_dtensor(v: Tensor, placed: Placements, shape: tuple[int, ...]) -> DTensor:
        return placed_as(v, layout.mesh, placed, shape)

    def of_value(v: Tensor) -> DTensor:
        v = v if divisor is None else v / divisor
        v = v if guard is None else v * guard.to(v.dtype)
        if reduction == "pointwise":
            return as_dtensor(v, placements["input"], tuple(given["input"].shape))
        if reduction == "none":
            return as_dtensor(v, layout.rows, layout.shape)
        return as_dtensor(v, layout.of_sums, ())

    if not isinstance(out, tuple):
        return of_value(out)
    if isinstance(out[1], Stats):
        stats = (as_dtensor(s, layout.rows, layout.shape) for s in out[1])
        return of_value(out[0]), Stats(*stats)
    return tuple(of_value(v) for v in out)


def _sharded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function of :mod:`fastdiv.distributed` of the same name."""
    from .. import distributed

    name = function.__name__
    found = getattr(distributed, name, None)
    if found is None:
        raise TypeError(
            f"{name} does not support a DTensor with sharded classes: redistribute it, so that "
            "every rank has whole rows"
        )
    return found


def _count(given: Any, local: dict[str, Any], layout: Layout, classes: int) -> Tensor:
    """Return the divisor of a mean over all rows: how many count, or the sum of their weights."""
    x, label, class_weight = local["input"], None, None
    dtype = value_dtype(x.dtype)
    if "ignore_index" in local and not local["target"].is_floating_point():
        label = local["target"].reshape(-1).long()
        if (class_weight := given["weight"]) is not None:
            everywhere = [Replicate()] * layout.mesh.ndim
            class_weight = local_part(class_weight, layout.mesh, everywhere, everywhere, "weight")
    rows = x.numel() // max(1, x.shape[layout.dim])
    weight = local.get("token_weight")
    weight = weight.reshape(-1).to(dtype) if isinstance(weight, Tensor) else None
    ignored = local.get("ignore_index")
    count = reference.mean_weights(
        -100 if ignored is None else ignored,
        x.detach().new_empty(()).expand(rows, classes),
        label,
        class_weight,
        weight,
    ).sum()
    for axis in layout.row_axes:
        count = sum_over(layout.mesh.get_group(axis).group_name, count)
    return count


def _axis_of_classes(placements: Any, v: Tensor, dim: int, name: str) -> int | None:
    """Return the dimension of the mesh that shards the classes; None if none does."""
    axes = [i for i, p in enumerate(placements) if p.is_shard(dim)]
    odd = any(
        p.is_partial() or (name != "input" and p.is_shard() and not p.is_shard(dim))
        for p in placements
    )
    few = isinstance(v, DTensor) and any(v.shape[dim] < v.device_mesh.size(i) for i in axes)
    if len(axes) > 1 or odd or few:
        raise ValueError(
            f"a DTensor {name} may be sharded along its classes, dimension {dim}, over one "
            "dimension of the mesh, with at least one class per rank, and must not be Partial: "
            f"got {tuple(placements)} of shape {tuple(v.shape)}"
        )
    return axes[0] if axes else None


def _without(placement: Any, dim: int) -> Any:
    """Return the placement of rows, which lack the dimension of classes."""
    return Shard(placement.dim - (placement.dim > dim)) if placement.is_shard() else placement
