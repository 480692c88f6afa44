r"""Whole rows from their shards, by the chain rule over groups of classes.

A shard :math:`s` computes its rows as if they were whole: log-sum-exps, and a value that is
accurate near zero.  :math:`P_s` and :math:`Q_s` are its shares of :math:`p` and :math:`q`,
:math:`r_s` is its sum of the targets :math:`r_c`.  The values of its rows are
:math:`\mathrm{CE}_s`, :math:`H_s` and :math:`\mathrm{KL}_s`.  For whole rows,

.. math::
    -\sum_c r_c \log q_c &= \sum_s \bigl(\mathrm{CE}_s - r_s \log Q_s\bigr) \\
    H(q) &= H(Q) + \sum_s Q_s H_s \\
    \mathrm{KL}(p \| q) &= \mathrm{KL}(P \| Q) + \sum_s P_s\, \mathrm{KL}_s

where no term is negative, so that nothing cancels.  All is in float64, in the order of the ranks:
every rank finds the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..reference import Spec
from ..reference.divergences import masked_product
from .infinite_rows import NOTHING_INFINITE

WELL_SEPARATED = 0.25


@dataclass
class Parts:
    """Numbers of the shards by their names (``record.SLOTS`` and others): ``[W, R]`` each."""

    column: dict[str, Tensor]
    dtype: torch.dtype  # in which the shards compute

    def __getitem__(self, name: str) -> Tensor:
        return self.column[name]

    def __contains__(self, name: str) -> bool:
        return name in self.column

    def side(self, spec: Spec, name: str) -> Side:
        """Return the shards of the input, "x", or of a target of logits, "t"."""
        return Side(self[f"{name}_max"], self[f"{name}_logz"], spec.scale, self.dtype)


@dataclass
class Whole:
    """Whole rows: their value, and the record for the backward."""

    value: Tensor  # [R]; [2, R] for log_prob_and_entropy
    record: dict[str, Tensor]
    omega: Tensor | None = None  # class weight of the label
    stats: list[Tensor] = field(default_factory=list)  # lse, entropy, log_prob, argmax


class Side:
    """The student's or the teacher's distribution, from the log-sum-exps of its shards."""

    def __init__(self, largest: Tensor, logz: Tensor, scale: float, dtype: torch.dtype) -> None:
        self.max = largest.amax(0)
        self.empty = logz == -torch.inf
        # Log-sum-exps of the shards, relative to the maximum of all.
        self.log_sums = (largest - self.max) * scale + logz
        self.logz = torch.logsumexp(self.log_sums, 0)
        self.log_share = self.log_sums - self.logz
        # A share below the range of normal numbers counts as 0, as in the kernels.
        share = self.log_share.exp()
        self.share = torch.where(share < torch.finfo(dtype).tiny, 0.0, share)


def average(share: Tensor, value: Tensor) -> Tensor:
    """Average over the shards; those without mass add nothing."""
    return masked_product(share, value).sum(0)


def of_owner(v: Tensor, owner: Tensor) -> Tensor:
    """Return the entry of the shard that has the label of a row."""
    return v.gather(0, owner.unsqueeze(0)).squeeze(0)


# --- losses of one row of logits --------------------------------------------------------------


def entropy_of(x: Side, of_shards: Tensor) -> Tensor:
    """Compute H(Q) + sum Q H."""
    return average(x.share, of_shards - x.log_share)


def log_prob_of(x: Side, of_shards: Tensor, owner: Tensor) -> Tensor:
    """Compute log q of the label: its log q within its shard, plus log Q."""
    return of_owner(torch.where(x.empty, 0.0, of_shards) + x.log_share, owner)


def cross_entropy(spec: Spec, parts: Parts, owner: Tensor | None) -> Whole:
    """Compute the cross entropy of whole rows, for hard, smoothed and soft targets.

    ``q_factor`` is sum r + 2 z omega lse, the factor of q in the gradient.
    """
    x = parts.side(spec, "x")
    zero = torch.zeros_like(x.logz)
    value, mass, taken, omega = zero, zero, zero, None
    if "mass" in parts:
        inside = torch.where(x.empty, 0.0, parts["value"])
        value = (inside - masked_product(parts["mass"], x.log_share)).sum(0)
        mass = parts["mass"].sum(0)
    if owner is not None:
        weight = parts.column.get("weight")
        omega = zero + 1 if weight is None else of_owner(weight, owner)
        taken = spec.confidence * omega
        value = value - masked_product(taken, log_prob_of(x, parts["label"], owner))
    lse = x.logz + x.max * spec.scale
    z = zero + spec.z_loss * (1 if omega is None else omega)
    value = value + masked_product(z, lse * lse)
    q_factor = mass + taken + 2 * masked_product(z, lse)
    record = {"x_max": x.max, "x_logz": x.logz, "q_factor": q_factor, "label_mass": taken}
    record["own_weight"] = torch.ones_like(x.max)
    whole = Whole(value, record, omega)
    if "entropy" in parts:
        whole.stats = [lse, entropy_of(x, parts["entropy"]), *_log_prob_and_argmax(x, parts, owner)]
    return whole


def _log_prob_and_argmax(x: Side, parts: Parts, owner: Tensor | None) -> list[Tensor]:
    """Compute sum p log q of the target, and the class of the first maximum, or of a NaN."""
    if owner is None:
        inside = torch.where(x.empty, 0.0, parts["log_prob"])
        log_prob = (inside + masked_product(parts["p"], x.log_share)).sum(0)
    else:
        log_prob = log_prob_of(x, parts["label"], owner)
    first = ((parts["x_max"] == x.max) | parts["x_logz"].isnan()).int().argmax(0)
    return [log_prob, of_owner(parts["argmax"], first)]


def entropy(spec: Spec, parts: Parts) -> Whole:
    """Compute the entropy of whole rows."""
    x = parts.side(spec, "x")
    value = entropy_of(x, parts["entropy"])
    return Whole(value, {"x_max": x.max, "x_logz": x.logz, "entropy": value})


def log_prob_and_entropy(spec: Spec, parts: Parts, owner: Tensor) -> Whole:
    """Compute the log-probability of the label, and the entropy."""
    whole = entropy(spec, parts)
    x = parts.side(spec, "x")
    whole.value = torch.stack([log_prob_of(x, parts["label"], owner), whole.value])
    return whole


# --- divergences ------------------------------------------------------------------------------


def between(share: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``log(sum share e^log_ratio)``, accurately near the mean of the ratios.

    Returns the mean, what the logarithm exceeds it by (without cancellation, however small), and
    where the ratios are close enough for that.
    """
    mean = average(share, log_ratio)
    deviation = torch.where(share == 0, 0.0, log_ratio - mean)
    close = (deviation.abs() < 0.5).all(0)
    deviation = torch.where(close, deviation, 0.0)
    return mean, average(share, torch.expm1(deviation) - deviation).clamp(min=0).log1p(), close


class Sides:
    """Student and teacher of a divergence of logits, and the ratios of their shards."""

    def __init__(self, spec: Spec, parts: Parts) -> None:
        self.x = x = parts.side(spec, "x")
        self.t = t = parts.side(spec, "t")
        maxima = (parts["x_max"] - x.max) - (parts["t_max"] - t.max)
        # log(sum e^x / sum e^t) of a shard.  The kernels' log_z_ratio is accurate near 0.
        self.log_ratio = maxima * spec.scale + parts["log_z_ratio"]
        # The ratio keeps the digits of the difference of x and t, where both have mass.
        both = ~x.empty & ~t.empty
        log_sums = torch.where(both, t.log_share + self.log_ratio, x.log_sums - t.logz)
        self.log_z_ratio = torch.logsumexp(log_sums, 0)

    def forward(self) -> Tensor:
        """Compute KL(P || Q), and the log_z_ratio that belongs to it."""
        mean, excess, close = between(self.t.share, self.log_ratio)
        close &= ((self.x.share == 0) == (self.t.share == 0)).all(0)
        self.log_z_ratio = torch.where(close, mean + excess, self.log_z_ratio)
        return torch.where(close, excess, self.log_z_ratio - mean)

    def reverse(self) -> Tensor:
        """Compute KL(Q || P), and the log_z_ratio that belongs to it."""
        mean, excess, close = between(self.x.share, -self.log_ratio)
        close &= ((self.x.share == 0) == (self.t.share == 0)).all(0)
        self.log_z_ratio = torch.where(close, -(mean + excess), self.log_z_ratio)
        return torch.where(close, excess, -(mean + self.log_z_ratio))

    def record(self) -> dict[str, Tensor]:
        """Return the part of the record that all divergences have."""
        x, t = self.x, self.t
        record = {"x_max": x.max, "x_logz": x.logz, "t_max": t.max, "t_logz": t.logz}
        return {**record, "log_z_ratio": self.log_z_ratio}


def kl_div(spec: Spec, parts: Parts) -> Whole:
    """Compute KL(p || q), for which sum u = 1 - sum p, and sum v is the value."""
    if spec.target_type == "logits":
        sides = Sides(spec, parts)
        between_shards = sides.forward()
        inside, slope = _infinite(
            parts, sides.t.share, sides.x.empty, sides.log_z_ratio - sides.log_ratio
        )
        value = between_shards + inside
        record, mass = sides.record(), torch.ones_like(value)
    else:
        x = parts.side(spec, "x")
        inside = torch.where(x.empty, 0.0, parts["value"])
        value = slope = (inside - masked_product(parts["mass"], x.log_share)).sum(0)
        record, mass = {"x_max": x.max, "x_logz": x.logz}, parts["mass"].sum(0)
    sum_u = torch.where(value.isnan(), value, 1 - mass)
    sum_v = torch.where(value.isinf(), slope, value)
    return _divergence(value, record, sum_u, sum_v)


def reverse_kl_div(spec: Spec, parts: Parts) -> Whole:
    """Compute KL(q || p), for which sum u is the value, and sum v = sum p - 1."""
    if spec.target_type == "logits":
        sides = Sides(spec, parts)
        between_shards = sides.reverse()
        inside, slope = _infinite(
            parts, sides.x.share, sides.t.empty, sides.log_ratio - sides.log_z_ratio
        )
        value = between_shards + inside
        record, mass = sides.record(), torch.ones_like(value)
    else:
        x = parts.side(spec, "x")
        inside, slope = _infinite(parts, x.share, torch.zeros_like(x.empty), x.log_share)
        value = average(x.share, x.log_share) + inside
        record, mass = {"x_max": x.max, "x_logz": x.logz}, parts["mass"].sum(0)
    return _divergence(value, record, torch.where(value.isinf(), slope, value), mass - 1)


def _divergence(value: Tensor, record: dict[str, Tensor], sum_u: Tensor, sum_v: Tensor) -> Whole:
    use_direct = well_separated(value)
    return Whole(value, {**record, "sum_u": sum_u, "sum_v": sum_v, "use_direct": use_direct})


def _infinite(
    parts: Parts, share: Tensor, absent: Tensor, log_ratio: Tensor
) -> tuple[Tensor, Tensor]:
    """Average the values of the shards, and their slopes (sum u or sum v) where one is infinite.

    In a slope, an infinite term counts -1 times its mass.  A finite term counts its mass times a
    log ratio, which is that within the shard plus ``log_ratio`` between shards.  Where the other
    row has no mass in a shard (``absent``), all terms of the shard are infinite.
    """
    inside = torch.where(absent, 0.0, parts["value"])
    if "share" not in parts:
        return average(share, inside), torch.zeros_like(inside[0])
    infinite = parts["share"] != NOTHING_INFINITE
    finite = torch.where(absent, 0.0, torch.where(infinite, parts["share"], 1.0))
    slope = torch.where(absent, -1.0, inside) + masked_product(finite, log_ratio)
    return average(share, torch.where(infinite, torch.inf, inside)), average(share, slope)


def of_terms(spec: Spec, record: dict[str, Tensor], sums: dict[str, Tensor]) -> Whole:
    """Return the sum of terms, with sum u and sum v over the sums of the probabilities."""
    logits = spec.target_type == "logits"
    sum_u, sum_v = sums["u"] / sums["q"], sums["v"] / sums["p"] if logits else sums["v"]
    return Whole(sums["f"], {**record, "sum_u": sum_u, "sum_v": sum_v})


def well_separated(value: Tensor) -> Tensor:
    """Return 1 where the direct terms are accurate, as ``well_separated`` in divergence_value.h."""
    return ((value > WELL_SEPARATED) & ~value.isinf()).to(value.dtype)
