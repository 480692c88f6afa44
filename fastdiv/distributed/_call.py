"""From the arguments of a public function to its loss: checked, agreed upon, computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import _check
from .._backend import use_kernel
from ..cross_entropy import smoothing_rates
from ..reference import Spec, Stats
from ._autograd import Call, is_transformed, shard_loss
from ._mean import token_mean
from ._world import Group, Plan, Shards, agree, checked, labels_in_short, world_of


@dataclass
class Arguments:
    """Those of a loss of rows, checked as far as one rank can."""

    spec: Spec
    input: Tensor
    dim: int
    x: Tensor
    t: Tensor | None = None
    label: Tensor | None = None  # global
    class_weight: Tensor | None = None
    row_weight: Tensor | None = None
    smoothing: tuple[float, str] | None = None  # whose rates depend on how many classes there are
    label_name: str = "target"
    stats: bool = False

    @property
    def classes(self) -> int:
        """Of this rank."""
        return self.x.shape[1]


def loss_of(
    prepare: Callable[[], Arguments], group: Group, mean_group: Group = None
) -> tuple[Tensor, Stats | None]:
    """The loss of what ``prepare`` makes of the arguments, in their shape, and statistics."""
    world = world_of(group)
    a = checked(world, prepare)
    shards = agree(world, plan_of(a.spec, a.classes, a.x, a.label, a.row_weight, (a.t,), a.stats))
    spec, over = with_rates(a.spec, a.smoothing, shards), mean_group is not None
    over = over and spec.reduction == "mean"
    check_range(a.label, shards, a.label_name, spec.ignore_index)
    call = Call(replace(spec, reduction="sum") if over else spec, shards, a.stats)
    value, total, stats = shard_loss(call, a.x, a.t, a.label, a.class_weight, a.row_weight)
    if over:
        value = token_mean(value, total, mean_group)
    if stats is not None:
        stats = Stats(*(_check.as_input(s, a.input, a.dim) for s in stats))
    if spec.reduction == "none":
        value = value.reshape((*value.shape[:-1], *_check.row_shape(a.input, a.dim)))
    return value, stats


def plan_of(
    spec: Spec,
    classes: int,
    x: Tensor,
    label: Tensor | None,
    row_weight: Tensor | None,
    tensors: tuple[Tensor | None, ...],
    *more: Any,
) -> Plan:
    """What all ranks must do alike; of traced tensors, what does not depend on the batch."""
    compiling = torch.compiler.is_compiling()
    call = (
        *(spec.loss, spec.target_type, spec.reduction, spec.ignore_index, spec.scale),
        *(spec.softcap, spec.shape, spec.z_loss, spec.inplace, *more),
        *(() if compiling else (f"{x.shape[0]} rows",)),
        str(x.dtype),
        x.device.type,
        "kernel" if use_kernel(x) and not is_transformed() else "reference",
        *(v is not None for v in (label, row_weight, *tensors)),
    )
    ignored = row_weight
    if label is not None and not compiling:
        ignored = torch.where(label == spec.ignore_index, 0, 1)
    return Plan(call, classes, labels_in_short(label, ignored))


def with_rates(spec: Spec, smoothing: tuple[float, str] | None, shards: Shards) -> Spec:
    """The spec with what label smoothing gives each of all classes."""
    if smoothing is None:
        return spec
    label, spread = smoothing_rates(*smoothing, shards.classes)
    return replace(spec, label=label, spread=spread)


def check_range(label: Tensor | None, shards: Shards, name: str, ignore_index: int) -> None:
    """Labels are classes of the whole vocabulary: on all ranks or on none, for they are equal."""
    if label is not None and _check.values_may_be_read(label):
        ignored = None if ignore_index == _check.NO_LABEL_IGNORED else ignore_index
        _check.check_labels(label, shards.classes, name, ignored)


def global_labels(x: Tensor, dim: int, y: Tensor, name: str) -> Tensor:
    """Class indices as an int64 vector; their range is known once all ranks have been heard."""
    _check.check_label_type(y, name)
    return _check.row_vector(x, dim, y, name).to(torch.int64)
