"""What a rank makes of its shard, by the kernels of whole rows, and what it tells the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .._engine import arguments, ops
from ..reference import Spec

RECORD = ("x_max", "x_logz", "t_max", "t_logz", "log_z_ratio", "a", "b", "c")  # Row in row_state.h
TERMS = ("f", "u", "v", "q", "p")  # TermSums in divergence.h
NOTHING_INFINITE = 2.0  # for a share


class Forward(NamedTuple):
    """What a forward makes of a shard as if its rows were whole."""

    value: Tensor
    record: Tensor
    stats: Tensor | None = None  # lse, entropy, log_prob
    argmax: Tensor | None = None
    terms: Tensor | None = None  # sums of them, of odd rows


# From values, records and weights of some rows: the records to sum the terms of odd ones from, and
# which these are; nothing if none is.
Odd = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor] | None]


class Kernels(Protocol):
    """What computes on the logits of a shard, however these are held."""

    def forward(
        self,
        spec: Spec,
        label: Tensor | None,
        class_weight: Tensor | None,
        weight: Tensor | None,
        stats: bool,
        odd: Odd | None = None,
    ) -> Forward:
        """Every row, with or without statistics, and with sums of the terms of odd ones."""

    def terms(self, spec: Spec, record: Tensor, weight: Tensor) -> Tensor:
        """Sums of a divergence's terms from a given record, ``[R, 5]``; of rows of weight 1."""


@dataclass
class Dense:
    """Logits, and a target, in memory."""

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
    ) -> Forward:
        """See ``Kernels``."""
        rows = (self.x, self.t, label, class_weight, weight)
        if stats:
            value, record, _, of_rows, argmax = ops.forward_stats(
                *rows, *ops.options(spec, stats=True)
            )
            return Forward(value, record, of_rows, argmax)
        value, record, _ = ops.forward(*rows, *ops.options(spec))
        found = None if odd is None else odd(value, record, weight)
        terms = None if found is None else self.terms(spec, *found)
        return Forward(value, record, terms=terms)

    def terms(self, spec: Spec, record: Tensor, weight: Tensor) -> Tensor:
        """See ``Kernels``."""
        return ops.terms(self.x, self.t, None, None, weight, record, *ops.options(spec))


@dataclass
class LocalRows:
    """A shard's rows, but for the logits."""

    spec: Spec
    label: Tensor | None  # counted from the shard's first class; 0 where it is another shard's
    class_weight: Tensor | None
    weight: Tensor | None  # of the rows; 0: does not count
    first: int  # class of the shard
    need_t: bool = False  # whether the target gets a gradient
    mass: Tensor | None = None  # of a soft target, if there are to be statistics

    @property
    def smoothed(self) -> bool:
        """Whether a cross entropy is of every class."""
        return bool(self.spec.smoothing_per_class) or self.spec.target_type == "probs"

    @property
    def of_shard(self) -> Spec:
        """What a shard computes for itself.

        The squared log-sum-exp is that of whole rows, and what a smoothed label takes off is known
        where all weights of labels are; before its mixture, js_div wants what kl_div does.
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
    """The fewest numbers a row that whole rows can be merged from."""
    spec, label = rows.of_shard, rows.label
    counts = None if rows.weight is None else (rows.weight != 0).to(rows.weight.dtype)
    local = kernels.forward(
        spec,
        label,
        rows.class_weight if rows.smoothed else None,
        None if stats else counts,  # which are of all rows
        stats or (rows.smoothed and label is not None),  # for the label's log-probability
        odd_rows(rows),
    )
    record = dict(zip(RECORD, local.record.unbind(1), strict=True))
    out = {name: record[name] for name in ("x_max", "x_logz")}
    if spec.loss == "entropy":
        return {**out, "entropy": local.value}
    if spec.loss == "log_prob_and_entropy":
        return {**out, "label": local.value[0], "entropy": local.value[1]}
    if spec.loss in ("kl_div", "reverse_kl_div"):
        return {**out, **_of_divergence(rows, local, record)}
    if rows.smoothed:
        out |= {"value": local.value, "mass": record["a"]}
    if label is not None:
        out["label"] = -local.value if local.stats is None else local.stats[2]
        if rows.class_weight is not None:
            out["weight"] = rows.class_weight[label]
    if stats:
        assert local.stats is not None and local.argmax is not None
        # In float64, which can count all classes.
        out |= {"entropy": local.stats[1], "argmax": local.argmax.double() + rows.first}
        if rows.mass is not None:
            out |= {"log_prob": local.stats[2], "p": rows.mass}
    return out


def _of_empty(rows: LocalRows) -> bool:
    """Tells whether shards where only the target has mass must say how much that is."""
    return rows.spec.loss == "kl_div" and rows.spec.target_type != "logits"


def _of_infinite(rows: LocalRows) -> bool:
    """Tells whether gradients of infinite rows need more than their values."""
    if rows.spec.loss == "kl_div":
        return rows.spec.target_type == "logits" and rows.need_t
    return rows.spec.loss == "reverse_kl_div"


def odd_rows(rows: LocalRows) -> Odd | None:
    """What finds the few rows whose terms are summed once more, if there may be any.

    By what sums change as the shard's log q all grow by 1, the finite terms are told.
    """
    of_empty, of_infinite = _of_empty(rows), _of_infinite(rows)
    if not (of_empty or of_infinite):
        return None

    def odd(value: Tensor, record: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor] | None:
        x_logz = record[:, RECORD.index("x_logz")]
        empty = x_logz == -torch.inf
        found = (empty & of_empty) | (value.isinf() & of_infinite)
        if weight is not None:
            found &= weight != 0
        if _are_none(found):
            return None
        shifted = record.clone()
        shifted[:, RECORD.index("x_logz")] = torch.where(empty, 0.0, x_logz - 1)
        shifted[:, RECORD.index("log_z_ratio")] -= 1
        return shifted, found.to(value.dtype)

    return odd


def _are_none(found: Tensor) -> bool:
    """Tells whether there is no such row; a GPU is not asked, where such rows cost little."""
    return found.is_cpu and not found.any()


def _of_divergence(rows: LocalRows, local: Forward, record: dict[str, Tensor]) -> dict[str, Tensor]:
    spec = rows.of_shard
    forward = spec.loss == "kl_div"
    out = {"value": local.value}
    if spec.target_type == "logits":
        out |= {name: record[name] for name in ("t_max", "t_logz", "log_z_ratio")}
    else:
        out["mass"] = 1 - record["a"] if forward else 1 + record["b"]
    if _of_infinite(rows):
        out["share"] = torch.full_like(local.value, NOTHING_INFINITE)
    if local.terms is None:
        return out
    _, u, v, q, p = local.terms.unbind(1)
    if _of_infinite(rows):
        slope, moved = (record["b"], v / p) if forward else (record["a"], u / q)
        infinite = local.value.isinf()
        out["value"] = torch.where(infinite, slope, local.value)
        out["share"] = torch.where(infinite, (moved - slope).abs(), out["share"])
    if _of_empty(rows):
        out["mass"] = torch.where(record["x_logz"] == -torch.inf, p, out["mass"])
    return out
