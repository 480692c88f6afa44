"""The forward of a sharded loss: rows of every shard, one exchange, whole rows.

The op is opaque to autograd and the compiler, as those of the linear losses are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._engine import ops
from ..reference import Spec, value_dtype
from . import merge
from .infinite_rows import TERMS
from .local import Dense, Kernels, LocalRows, columns
from .merge import Parts, Whole
from .record import packed_record
from .world import Shards, World, gather


@dataclass
class ShardedRows:
    """The tensors of a sharded loss without its logits, and which shard this is."""

    spec: Spec
    shards: Shards
    label: Tensor | None  # counted from the shard's first class
    class_weight: Tensor | None
    weight: Tensor | None  # of the rows; rows of weight 0 are ignored
    stats: bool
    need_t: bool
    mass: Tensor | None = None  # of a soft target, if there are to be statistics

    def whole(self, kernels: Kernels, dtype: torch.dtype) -> Whole:
        """Compute value and record of whole rows, in float64."""
        label, first = self.label, self.shards.first
        if label is not None:
            own = self.shards.sizes[self.shards.world.rank]
            label = torch.where((label < 0) | (label >= own), 0, label)
        rows = LocalRows(
            self.spec, label, self.class_weight, self.weight, first, self.need_t, self.mass
        )
        whole = self._merged(rows.of_shard, columns(rows, kernels, self.stats))
        return whole if self.spec.loss != "js_div" else self._mixed(kernels, whole, dtype)

    def _merged(self, of_shard: Spec, own: dict[str, Tensor]) -> Whole:
        """Merge the columns of all ranks, in one exchange."""
        dtype = functools.reduce(torch.promote_types, (c.dtype for c in own.values()))
        packed = torch.stack([c.to(dtype) for c in own.values()])
        of_all = gather(self.shards.world, packed).double().unbind(1)
        parts = Parts(dict(zip(own, of_all, strict=True)), own["x_max"].dtype)
        spec, loss = self.spec, of_shard.loss
        if loss == "entropy":
            return merge.entropy(spec, parts)
        if loss == "kl_div":
            return merge.kl_div(spec, parts)
        if loss == "reverse_kl_div":
            return merge.reverse_kl_div(spec, parts)
        if loss == "log_prob_and_entropy":
            return merge.log_prob_and_entropy(spec, parts, self.owner())
        return merge.cross_entropy(spec, parts, self.owner() if self.label is not None else None)

    def _mixed(self, kernels: Kernels, whole: Whole, dtype: torch.dtype) -> Whole:
        """Compute the loss of a mixture.  Its terms need the log-sum-exps of whole rows."""
        spec, record = self.spec, whole.record
        record["use_direct"] = merge.well_separated(min(spec.param, 1 - spec.param) * whole.value)
        weight = torch.ones_like(whole.value) if self.weight is None else self.weight != 0
        terms = kernels.terms(spec, packed_record(record).to(dtype), weight.to(dtype))
        sums = gather(self.shards.world, terms).double().sum(0)
        return merge.of_terms(spec, record, dict(zip(TERMS, sums.unbind(1), strict=True)))

    def owner(self) -> Tensor:
        """Return the rank that has the label of each row."""
        assert self.label is not None
        ends = torch.tensor(self.shards.sizes, device=self.label.device).cumsum(0)
        owner = torch.bucketize(self.label + self.shards.first, ends, right=True)
        return owner.clamp(max=len(self.shards.sizes) - 1)

    def valid(self) -> Tensor | None:
        """Return which labels are in range."""
        if self.label is None:
            return None
        everywhere = self.label + self.shards.first
        return (everywhere >= 0) & (everywhere < self.shards.classes)


def results(rows: ShardedRows, whole: Whole, dtype: torch.dtype) -> list[Tensor]:
    """Return value, record, divisor and statistics, as the ops of whole rows do."""
    value, record, valid = whole.value, whole.record, rows.valid()
    if valid is not None:  # a label out of range makes its row NaN
        value = torch.where(valid, value, torch.nan)
        for name in {"x_logz", "q_factor", "label_mass", "entropy"} & record.keys():
            record[name] = torch.where(valid, record[name], torch.nan)
    packed, weight = packed_record(record), torch.ones_like(record["x_max"])
    if rows.weight is not None:
        counts, weight = rows.weight != 0, rows.weight.double()
        value = torch.where(counts, value * weight, 0.0)
        packed = torch.where(counts.unsqueeze(1), packed, 0.0)
    of_mean = weight if whole.omega is None else weight * whole.omega
    divisor = torch.where(weight == 0, 0.0, of_mean).sum()
    value = value.to(dtype).contiguous()
    if rows.spec.reduction != "none":
        value = value.sum(dtype=torch.float64)
        if rows.spec.reduction != "sum":
            value = value / (divisor if rows.spec.reduction == "mean" else rows.spec.batch)
        value = value.to(dtype)
    lse, entropy, log_prob, argmax = whole.stats or [weight[:0]] * 4
    if rows.stats and valid is not None:
        log_prob = torch.where(valid, log_prob, torch.nan)
        log_prob = torch.where(weight == 0, 0.0, log_prob)
    of_rows = torch.stack([lse, entropy, log_prob]).to(dtype)
    return [value, packed.to(dtype), divisor.to(dtype), of_rows, argmax.to(torch.int64)]


@torch.library.custom_op("fastdiv::_shard_forward", mutates_args=())
def forward(
    x: Tensor,
    t: Tensor | None,
    label: Tensor | None,
    class_weight: Tensor | None,
    weight: Tensor | None,
    ints: Sequence[int],
    floats: Sequence[float],
    symbolic: Tensor | None,
    sizes: Sequence[int],
    rank: int,
    group: str,
    stats: bool,
    need_t: bool,
) -> list[Tensor]:
    """Compute value, record, divisor, statistics and argmax of whole rows."""
    shards = Shards(World(group, rank, len(sizes)), tuple(sizes))
    dtype, spec = value_dtype(x.dtype), ops.unpacked(ints, floats, symbolic)
    rows = ShardedRows(spec, shards, label, class_weight, weight, stats, need_t)
    if stats and t is not None:
        rows = replace(rows, mass=t.sum(-1, dtype=dtype))
    return results(rows, rows.whole(Dense(x, t), dtype), dtype)


@forward.register_fake
def _(x, t, label, cw, weight, ints, floats, symbolic, sizes, rank, group, stats, need_t):  # type: ignore[no-untyped-def]
    return fake_results(x, ints, value_dtype(x.dtype), stats)


def fake_results(x: Tensor, ints: Sequence[int], dtype: torch.dtype, stats: bool) -> list[Tensor]:
    """Make tensors like those of ``results``."""
    with_rows = x.shape[0] if stats else 0
    return [
        x.new_empty(ops.value_shape(ops.spec_of(ints), x.shape[0]), dtype=dtype),
        x.new_empty((x.shape[0], ops.RECORD_SIZE), dtype=dtype),
        x.new_empty((), dtype=dtype),
        x.new_empty((3, with_rows), dtype=dtype),
        x.new_empty((with_rows,), dtype=torch.int64),
    ]
