"""What a rank computes of its shard, with the kernels of whole rows, and sends to the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .._engine import arguments, ops
from ..reference import Rows, Spec
from .infinite_rows import TERMS, Odd, ShardForward, finite_part, odd_rows
from .record import unpacked_record


class Kernels(Protocol):
    """The kernels on the logits of a shard, which are in memory or computed tile by tile."""

    def forward(
        self,
        spec: Spec,
        label: Tensor | None,
        class_weight: Tensor | None,
        weight: Tensor | None,
        stats: bool,
        odd: Odd | None = None,
    ) -> ShardForward:
        """Compute every row, statistics if asked for, and sums of terms of odd rows."""

    def terms(self, spec: Spec, record: Tensor, weight: Tensor) -> Tensor:
        """Sum the terms of a divergence from a given record, ``[R, 5]``, in rows of weight 1."""


@dataclass
class Dense:
    """Logits and target in memory."""

    x: Tensor
    t: Tensor | None

    def forward(
        self,
        spec: Spec,
        label: Any,
        class_weight: Any,
        weight: Any,
        stats: bool,
        odd: Odd | None = None,
    ) -> ShardForward:
        """See ``Kernels``."""
        rows = Rows(self.x, self.t, None, label, class_weight, weight)
        if stats:
            value, record, _, of_rows, argmax = ops.forward_stats(
                *rows, *ops.options(spec, stats=True)
            )
            return ShardForward(value, record, of_rows, argmax)
        value, record, _ = ops.forward(*rows, *ops.options(spec))
        found = None if odd is None else odd(value, record, weight)
        terms = None if found is None else self.terms(spec, *found)
        return ShardForward(value, record, terms=terms)

    def terms(self, spec: Spec, record: Tensor, weight: Tensor) -> Tensor:
        """See ``Kernels``."""
        rows = Rows(self.x, self.t, row_weight=weight)
        return ops.terms(*rows, record, *ops.options(spec))


@dataclass
class LocalRows:
    """The rows of a shard without their logits."""

    spec: Spec
    label: Tensor | None  # relative to the shard's first class; 0 if another shard has it
    class_weight: Tensor | None
    weight: Tensor | None  # of the rows; rows of weight 0 are ignored
    first: int  # class of the shard
    need_t: bool = False  # whether the target gets a gradient
    mass: Tensor | None = None  # of a soft target, if there are to be statistics

    @property
    def smoothed(self) -> bool:
        """Return whether every class has a part in the cross entropy."""
        return bool(self.spec.smoothing_per_class) or self.spec.target_type == "probs"

    @property
    def needs_mass_of_empty(self) -> bool:
        """Return whether a shard without logits must still say how much mass its target has."""
        return self.spec.loss == "kl_div" and self.spec.target_type != "logits"

    @property
    def needs_finite_share(self) -> bool:
        """Return whether gradients of rows with an infinite value need more than that value."""
        if self.spec.loss == "kl_div":
            return self.spec.target_type == "logits" and self.need_t
        return self.spec.loss == "reverse_kl_div"

    @property
    def of_shard(self) -> Spec:
        """Return the loss that a shard computes by itself.

        Whole rows add the z-loss, and the part of a smoothed label.  js_div first needs the same
        numbers as kl_div.
        """
        spec = self.spec
        confidence = spec.confidence
        if self.label is not None:
            confidence = 0.0 if self.smoothed else 1.0
        loss = "kl_div" if spec.loss == "js_div" else spec.loss
        return spec._replace(
            loss=loss,
            reduction="none",
            ignore_index=arguments.NO_LABEL_IGNORED,
            confidence=confidence,
            z_loss=0.0,
        )


def columns(rows: LocalRows, kernels: Kernels, stats: bool) -> dict[str, Tensor]:
    """Compute the fewest numbers per row from which whole rows can be merged."""
    spec, label = rows.of_shard, rows.label
    counts = None if rows.weight is None else (rows.weight != 0).to(rows.weight.dtype)
    local = kernels.forward(
        spec,
        label,
        rows.class_weight if rows.smoothed else None,
        None if stats else counts,  # statistics are of all rows
        stats or (rows.smoothed and label is not None),  # for the label's log-probability
        odd_rows(rows.needs_mass_of_empty, rows.needs_finite_share),
    )
    record = unpacked_record(local.record)
    out = {name: record[name] for name in ("x_max", "x_logz")}
    if spec.loss == "entropy":
        return {**out, "entropy": local.value}
    if spec.loss == "log_prob_and_entropy":
        return {**out, "label": local.value[0], "entropy": local.value[1]}
    if spec.loss in ("kl_div", "reverse_kl_div"):
        return {**out, **_divergence_columns(rows, local, record)}
    if rows.smoothed:
        out |= {"value": local.value, "mass": record["q_factor"]}
    if label is not None:
        out["label"] = -local.value if local.stats is None else local.stats[2]
        if rows.class_weight is not None:
            out["weight"] = rows.class_weight[label]
    if stats:
        assert local.stats is not None and local.argmax is not None
        # float64 holds every class index exactly.
        out |= {"entropy": local.stats[1], "argmax": local.argmax.double() + rows.first}
        if rows.mass is not None:
            out |= {"log_prob": local.stats[2], "p": rows.mass}
    return out


def _divergence_columns(
    rows: LocalRows, local: ShardForward, record: dict[str, Tensor]
) -> dict[str, Tensor]:
    spec, out = rows.of_shard, {"value": local.value}
    if spec.target_type == "logits":
        out |= {name: record[name] for name in ("t_max", "t_logz", "log_z_ratio")}
    elif spec.loss == "kl_div":
        out["mass"] = 1 - record["sum_u"]
        if local.terms is not None:
            empty = record["x_logz"] == -torch.inf
            out["mass"] = torch.where(empty, local.terms[:, TERMS.index("p")], out["mass"])
    else:
        out["mass"] = 1 + record["sum_v"]
    if rows.needs_finite_share:
        out |= finite_part(spec, local, record)
    return out
