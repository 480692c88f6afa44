"""From the arguments of a public function to its loss: check, let ranks agree, compute."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._engine import arguments
from .._engine.backend import use_kernel
from .._engine.torch_private import is_transformed
from .._losses.cross_entropy import smoothing_rates
from ..reference import Spec, Stats
from .alike import checksums
from .autograd import ShardCall, shard_loss
from .mean import token_mean
from .world import Group, Plan, Shards, World, agree, checked, nothing_is_real, world_of


@dataclass
class Arguments:
    """The arguments of a loss, checked as far as one rank can check them."""

    spec: Spec
    label: Tensor | None = None  # global
    class_weight: Tensor | None = None
    row_weight: Tensor | None = None
    # Label smoothing and its kind.  The rates depend on the number of classes of all shards.
    smoothing: tuple[float, str] | None = None
    label_name: str = "target"
    stats: bool = False
    num_classes: int | None = None  # of all shards, if the caller says so


@dataclass(kw_only=True)
class RowArguments(Arguments):
    """The arguments of a loss of logits."""

    input: Tensor
    dim: int
    x: Tensor  # input, and target, as rows
    t: Tensor | None = None


def loss_of(
    prepare: Callable[[], RowArguments],
    group: Group,
    mean_group: Group = None,
    num_classes: int | None = None,
) -> tuple[Tensor, Stats | None]:
    """Compute the loss of the arguments that ``prepare`` checks, and statistics, in their shape."""
    world = world_of(group)
    a = arguments_of(world, prepare, num_classes)
    shards = shards_of(world, a, a.x, a.x.shape[1], {"mean over": size_of(mean_group)})
    call = call_of(a, shards, mean_group)
    value, divisor, stats = shard_loss(call, a.x, a.t, a.label, a.class_weight, a.row_weight)
    if stats is not None:
        stats = Stats(*(arguments.as_input(s, a.input, a.dim) for s in stats))
    value = mean_of(a, value, divisor, mean_group)
    if a.spec.reduction == "none":
        value = value.reshape((*value.shape[:-1], *arguments.row_shape(a.input, a.dim)))
    return value, stats


A = TypeVar("A", bound=Arguments)


def arguments_of(world: World, prepare: Callable[[], A], num_classes: int | None) -> A:
    """Check the arguments of a rank.  If one rank refuses its own, all ranks raise."""

    def prepared() -> A:
        if num_classes is not None and not (isinstance(num_classes, int) and num_classes > 0):
            raise ValueError(f"num_classes must be a positive integer, got {num_classes!r}")
        return replace(prepare(), num_classes=num_classes)

    return checked(world, prepared)


def shards_of(
    world: World,
    a: Arguments,
    x: Tensor,
    classes: int,
    more: dict[str, Any],
    hidden: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Shards:
    """Return the shards of all ranks, after checking that the ranks call the same loss."""
    plan = plan_of(a, x, classes, more)
    if world.size > 1:
        alike = checksums((a.label, a.row_weight, *hidden))
        plan = replace(plan, labels=_labels_in_short(a), alike=alike)
    shards = agree(world, plan)
    if a.num_classes is not None and not nothing_is_real() and shards.classes != a.num_classes:
        raise ValueError(
            f"the shards of the ranks must have num_classes={a.num_classes} classes in all, got "
            f"{' + '.join(map(str, shards.sizes))} = {shards.classes}: every rank must give its "
            "own shard; logits that were gathered are for the functions of fastdiv"
        )
    return shards


def _labels_in_short(a: Arguments) -> tuple[int, int, int]:
    """Return the minimum, the maximum and the sum of the labels that are not ignored."""
    if a.label is None or not arguments.values_may_be_read(a.label):
        return 0, 0, 0
    counting = a.label[a.label != a.spec.ignore_index]
    if not counting.numel():
        return 0, 0, 0
    return int(counting.min()), int(counting.max()), int(counting.sum())


def call_of(a: Arguments, shards: Shards, mean_group: Group) -> ShardCall:
    """Return the call of the op, with the options that depend on the number of all classes."""
    if a.label is not None and arguments.values_may_be_read(a.label):
        # All ranks have the same labels, so either all of them raise or none.
        ignored = None if a.label_name == "index" else a.spec.ignore_index
        arguments.check_labels(a.label, shards.classes, a.label_name, ignored)
    spec = a.spec
    if a.smoothing is not None:
        confidence, smoothing_per_class = smoothing_rates(*a.smoothing, shards.classes)
        spec = spec._replace(confidence=confidence, smoothing_per_class=smoothing_per_class)
    if mean_group is not None and spec.reduction == "mean":
        spec = spec._replace(reduction="sum")
    return ShardCall(spec, shards, a.stats)


def mean_of(a: Arguments, value: Tensor, divisor: Tensor, mean_group: Group) -> Tensor:
    """Return the value, or its share in the mean over a group."""
    if mean_group is None or a.spec.reduction != "mean":
        return value
    return token_mean(value, divisor, mean_group)


def size_of(group: Group) -> int | None:
    """Return the number of ranks of a group, None without a group."""
    return None if group is None else world_of(group).size


def plan_of(a: Arguments, x: Tensor, classes: int, more: dict[str, Any]) -> Plan:
    """Return what must be equal on all ranks, in compiled code without numbers it may trace."""
    spec, compiling = a.spec, torch.compiler.is_compiling()
    what = {
        "loss": spec.loss,
        "target type": spec.target_type,
        "reduction": spec.reduction,
        "in place": spec.inplace,
        "statistics": a.stats,
        "class weights": a.class_weight is not None,
        "token weights": a.row_weight is not None,
        "dtype": x.dtype,
        "device": x.device.type,
        "kernels": use_kernel(x) and not is_transformed(),
        "num_classes": a.num_classes,
        "values are compared": arguments.values_may_be_read(x),
        **more,
    }
    if not compiling:
        what |= {
            "rows": x.shape[0],
            "ignore_index": spec.ignore_index,
            "1 / temperature": spec.scale,
            "softcap": spec.softcap,
            "beta": spec.param,
            "label smoothing": a.smoothing,
            "z_loss": spec.z_loss,
        }
    return Plan(
        tuple(f"{name}: {value}" for name, value in what.items()),
        operator.index(classes),  # a constant for the compiler, also with dynamic shapes
    )


def global_labels(x: Tensor, dim: int, y: Tensor, name: str) -> Tensor:
    """Return class indices as an int64 vector; their range is checked when all ranks agree."""
    arguments.check_label_type(y, name)
    return arguments.row_vector(x, dim, y, name).to(torch.int64)
