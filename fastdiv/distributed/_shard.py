"""The forward of a sharded loss: a shard's own rows, one exchange, whole rows.

The op is opaque to autograd and the compiler, as those of the linear losses are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import _check, _ops
from ..reference import Spec, value_dtype
from . import _merge
from ._merge import Parts, Whole
from ._world import Shards, World, gather

RECORD = ("x_max", "x_logz", "t_max", "t_logz", "gap", "a", "b", "c")  # Row in row_state.h


@dataclass
class Local:
    """What the kernels make of a shard as if its rows were whole."""

    value: Tensor
    record: Tensor
    stats: Tensor | None = None  # lse, entropy, log_prob
    argmax: Tensor | None = None


# Of a loss of a shard's classes: labels (counted from its first class, and 0 where the label is
# another shard's), class weights, weights of the rows (0 or 1), and whether there are statistics.
Run = Callable[[Spec, Tensor | None, Tensor | None, Tensor | None, bool], Local]


@dataclass
class Rows:
    """What a sharded forward needs to know beside the logits."""

    spec: Spec
    shards: Shards
    label: Tensor | None  # counted from the shard's first class
    class_weight: Tensor | None
    weight: Tensor | None  # of the rows; 0: does not count
    mass: Tensor | None = None  # of a soft target, where there are to be statistics
    stats: bool = False

    @property
    def own(self) -> int:
        """How many classes this rank has."""
        return self.shards.sizes[self.shards.world.rank]

    def owner(self) -> Tensor | None:
        """The rank that has the label of each row."""
        if self.label is None:
            return None
        ends = torch.tensor(self.shards.sizes, device=self.label.device).cumsum(0)
        owner = torch.bucketize(self.label + self.shards.first, ends, right=True)
        return owner.clamp(max=len(self.shards.sizes) - 1)


def whole_rows(rows: Rows, run: Run) -> tuple[Whole, Tensor | None]:
    """Value and record of the whole rows, in float64, and where a label is a class."""
    spec, label = rows.spec, rows.label
    valid = None
    if label is not None:
        everywhere = label + rows.shards.first
        valid = (everywhere >= 0) & (everywhere < rows.shards.classes)
        label = torch.where((label < 0) | (label >= rows.own), 0, label)
    counts = None if rows.weight is None else (rows.weight != 0).to(rows.weight.dtype)
    # Whole rows have the squared log-sum-exp, and the owner of a label what that takes off.
    smoothed = bool(spec.spread) or spec.target_type == "probs"
    with_stats = rows.stats or (smoothed and label is not None)
    of_shard = replace(
        spec,
        loss="kl_div" if spec.loss == "js_div" else spec.loss,
        reduction="none",
        ignore_index=_check.NO_LABEL_IGNORED,
        label=0.0 if label is not None and smoothed else spec.label if smoothed else 1.0,
        z_loss=0.0,
    )
    local = run(
        of_shard,
        label,
        rows.class_weight if smoothed else None,
        None if rows.stats else counts,  # which are of all rows
        with_stats,
    )
    parts = _exchange(rows, _columns(rows, local, label))
    return _merged(spec, parts, rows.owner()), valid


def _columns(rows: Rows, local: Local, label: Tensor | None) -> dict[str, Tensor]:
    """What a shard tells the others: the fewest numbers that its rows can be merged from."""
    spec = rows.spec
    record = dict(zip(RECORD, local.record.unbind(1), strict=True))
    out = {"x_max": record["x_max"], "x_logz": record["x_logz"]}
    if spec.loss == "entropy":
        return {**out, "entropy": local.value}
    if spec.loss == "log_prob_and_entropy":
        return {**out, "label": local.value[0], "entropy": local.value[1]}
    if spec.loss in ("kl_div", "reverse_kl_div", "js_div"):
        out["value"] = local.value
        if spec.target_type == "logits":
            return {**out, **{name: record[name] for name in ("t_max", "t_logz", "gap")}}
        forward = spec.loss != "reverse_kl_div"
        return {**out, "mass": 1 - record["a"] if forward else 1 + record["b"]}
    if spec.loss != "cross_entropy":
        out |= {"value": local.value, "mass": record["a"]}
    if label is not None:
        out["label"] = -local.value if local.stats is None else local.stats[2]
        if rows.class_weight is not None:
            out["weight"] = rows.class_weight[label]
    if rows.stats:
        assert local.stats is not None and local.argmax is not None
        # In float64, which can count all classes.
        out |= {"entropy": local.stats[1], "argmax": local.argmax.double() + rows.shards.first}
        if rows.mass is not None:
            out |= {"log_prob": local.stats[2], "p": rows.mass}
    return out


def _exchange(rows: Rows, columns: dict[str, Tensor]) -> Parts:
    """The columns of all ranks, in one collective."""
    dtype = functools.reduce(torch.promote_types, (c.dtype for c in columns.values()))
    packed = torch.stack([c.to(dtype) for c in columns.values()])
    of_all = gather(rows.shards.world.name, packed).double().unbind(1)
    named = dict(zip(columns, of_all, strict=True))
    return Parts(named.pop("x_max"), named.pop("x_logz"), named, columns["x_max"].dtype)


def _merged(spec: Spec, parts: Parts, owner: Tensor | None) -> Whole:
    if spec.loss == "entropy":
        return _merge.entropy(spec, parts)
    if spec.loss == "log_prob_and_entropy":
        assert owner is not None
        return _merge.log_prob_and_entropy(spec, parts, owner)
    if spec.loss == "kl_div":
        return _merge.kl_div(spec, parts)
    if spec.loss == "reverse_kl_div":
        return _merge.reverse_kl_div(spec, parts)
    return _merge.cross_entropy(spec, parts, owner)


# --- the op -----------------------------------------------------------------------------------


def results(rows: Rows, whole: Whole, valid: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """Value, record, sum of the weights, and statistics, as the ops of whole rows return them."""
    value, record = whole.value, whole.record
    if valid is not None:  # a label that is no class makes its row NaN
        value = torch.where(valid, value, torch.nan)
        of_label = {"x_logz", "a", "b"} & record.keys()
        record |= {k: torch.where(valid, record[k], torch.nan) for k in of_label}
    nothing = torch.zeros_like(record["a"])
    packed = torch.stack([record.get(name, nothing) for name in RECORD], 1)
    weight = nothing + 1
    if rows.weight is not None:
        counts, weight = rows.weight != 0, rows.weight.double()
        value = torch.where(counts, value * weight, 0.0)
        packed = torch.where(counts.unsqueeze(1), packed, 0.0)
    total = weight
    if whole.omega is not None:
        total = torch.where(weight == 0, 0.0, weight * whole.omega)
    value, total = value.to(dtype), total.sum()
    if rows.spec.reduction != "none":
        divisor = {"mean": total, "batchmean": rows.spec.batch}.get(rows.spec.reduction, 1)
        value = (value.sum(dtype=torch.float64) / divisor).to(dtype)
    stats = whole.stats or [nothing[:0]] * 4
    lse, entropy, log_prob, argmax = stats
    if rows.stats and rows.weight is not None and valid is not None:
        log_prob = torch.where(rows.weight == 0, 0.0, torch.where(valid, log_prob, torch.nan))
    of_rows = torch.stack([lse, entropy, log_prob]).to(dtype)
    return [value, packed.to(dtype), total.to(dtype), of_rows, argmax.to(torch.int64)]


def dense(x: Tensor, t: Tensor | None) -> Run:
    """The kernels, of a matrix of logits."""

    def run(spec: Spec, label: Any, class_weight: Any, weight: Any, stats: bool) -> Local:
        rows = (x, t, label, class_weight, weight)
        if stats:
            value, record, _, found, argmax = _ops.forward_stats(*rows, *_ops.options(spec, True))
            return Local(value, record, found, argmax)
        return Local(*_ops.forward(*rows, *_ops.options(spec))[:2])

    return run


@torch.library.custom_op("fastdiv::_shard_forward", mutates_args=())
def forward(
    x: Tensor,
    t: Tensor | None,
    label: Tensor | None,
    class_weight: Tensor | None,
    weight: Tensor | None,
    ints: Sequence[int],
    floats: Sequence[float],
    sizes: Sequence[int],
    rank: int,
    group: str,
    stats: bool,
) -> list[Tensor]:
    """Of whole rows: value, record, sum of the weights, statistics and argmax."""
    shards = Shards(World(group, rank, len(sizes)), tuple(sizes))
    dtype = value_dtype(x.dtype)
    mass = t.sum(-1, dtype=dtype) if stats and t is not None else None
    rows = Rows(_ops.spec_of([*ints, *floats]), shards, label, class_weight, weight, mass, stats)
    return results(rows, *whole_rows(rows, dense(x, t)), dtype)


@forward.register_fake
def _(x, t, label, class_weight, weight, ints, floats, sizes, rank, group, stats):  # type: ignore[no-untyped-def]
    return fake_results(x, ints, value_dtype(x.dtype), stats)


def fake_results(x: Tensor, ints: Sequence[int], dtype: torch.dtype, stats: bool) -> list[Tensor]:
    """Tensors like those of ``results``."""
    with_rows = x.shape[0] if stats else 0
    return [
        x.new_empty(_ops.value_shape(ints, x.shape[0]), dtype=dtype),
        x.new_empty((x.shape[0], _ops.RECORD_SIZE), dtype=dtype),
        x.new_empty((), dtype=dtype),
        x.new_empty((3, with_rows), dtype=dtype),
        x.new_empty((with_rows,), dtype=torch.int64),
    ]
