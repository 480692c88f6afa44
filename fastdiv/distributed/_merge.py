r"""What the shards of a row come to: the chain rule over groups of classes.

A shard :math:`s` knows its rows as if they were whole: log-sum-exps, and a value that is accurate
next to zero.  With :math:`P_s, Q_s` what the shard has of all of :math:`p` and :math:`q`,

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
from ..reference_divergences import masked_product

APART = 0.25  # rows are, from this divergence on: apart() in divergence_value.h


@dataclass
class Parts:
    """What the shards know of their rows, one column of ``[W, R]`` each; see ``Row`` in C++."""

    x_max: Tensor
    x_logz: Tensor
    column: dict[str, Tensor]  # what else the loss has sent
    dtype: torch.dtype = torch.float64  # that the shards compute in

    def __getitem__(self, name: str) -> Tensor:
        return self.column[name]

    def student(self, spec: Spec) -> Side:
        """q of the shards."""
        return Side(self.x_max, self.x_logz, spec.scale, self.dtype)

    def teacher(self, spec: Spec) -> Side:
        """P of the shards, from logits."""
        return Side(self["t_max"], self["t_logz"], spec.scale, self.dtype)


@dataclass
class Whole:
    """What is known of whole rows: the value, and the record for the backward."""

    value: Tensor  # [R]; [2, R] for log_prob_and_entropy
    record: dict[str, Tensor]
    omega: Tensor | None = None  # class weight of the label
    stats: list[Tensor] = field(default_factory=list)  # lse, entropy, log_prob, argmax


class Side:
    """One of the two distributions, from the log-sum-exps of its shards."""

    def __init__(self, largest: Tensor, logz: Tensor, scale: float, dtype: torch.dtype) -> None:
        self.max = largest.amax(0)
        self.empty = logz == -torch.inf
        # Of shards, as seen from the largest maximum.
        self.log_sums = (largest - self.max) * scale + logz
        self.logz = torch.logsumexp(self.log_sums, 0)
        self.log_share = self.log_sums - self.logz
        # What float32 cannot hold has no mass, as in the kernels.
        share = self.log_share.exp()
        self.share = torch.where(share < torch.finfo(dtype).tiny, 0.0, share)


def average(share: Tensor, value: Tensor) -> Tensor:
    """Over the shards, of which those without mass do not count."""
    return masked_product(share, value).sum(0)


def of_owner(v: Tensor, owner: Tensor) -> Tensor:
    """The entry of the shard that has the label of a row."""
    return v.gather(0, owner.unsqueeze(0)).squeeze(0)


# --- losses of one row of logits --------------------------------------------------------------


def entropy_of(x: Side, of_shards: Tensor) -> Tensor:
    """H(Q) + sum Q H."""
    return average(x.share, of_shards - x.log_share)


def log_prob_of(x: Side, of_shards: Tensor, owner: Tensor) -> Tensor:
    """Of the label: log q of its shard's, and log Q."""
    return of_owner(torch.where(x.empty, -torch.inf, of_shards + x.log_share), owner)


def cross_entropy(spec: Spec, parts: Parts, owner: Tensor | None) -> Whole:
    """Of a label, a soft target, or a label smoothed; a = sum r + 2 z omega lse, b: the label's."""
    x = parts.student(spec)
    zero = torch.zeros_like(x.logz)
    value, mass, taken, omega = zero, zero, zero, None
    if "mass" in parts.column:
        inside = torch.where(x.empty, 0.0, parts["value"])
        value = (inside - masked_product(parts["mass"], x.log_share)).sum(0)
        mass = parts["mass"].sum(0)
    if owner is not None:
        weight = parts.column.get("weight")
        omega = zero + 1 if weight is None else of_owner(weight, owner)
        taken = spec.label * omega
        value = value - masked_product(taken, log_prob_of(x, parts["label"], owner))
    lse = x.logz + x.max * spec.scale
    z = zero + spec.z_loss * (1 if omega is None else omega)
    value = value + masked_product(z, lse * lse)
    a = mass + taken + 2 * masked_product(z, lse)
    whole = Whole(value, {"x_max": x.max, "x_logz": x.logz, "a": a, "b": taken}, omega)
    if "entropy" in parts.column:
        whole.stats = [lse, entropy_of(x, parts["entropy"]), *_log_prob_and_argmax(x, parts, owner)]
    return whole


def _log_prob_and_argmax(x: Side, parts: Parts, owner: Tensor | None) -> list[Tensor]:
    """Of the target, sum p log q; and the shard that has the first largest logit, or a NaN."""
    if owner is None:
        inside = torch.where(x.empty, 0.0, parts["log_prob"])
        log_prob = (inside + masked_product(parts["p"], x.log_share)).sum(0)
    else:
        log_prob = log_prob_of(x, parts["label"], owner)
    first = ((parts.x_max == x.max) | parts.x_logz.isnan()).int().argmax(0)
    return [log_prob, of_owner(parts["argmax"], first)]


def entropy(spec: Spec, parts: Parts) -> Whole:
    """Row: a = H."""
    x = parts.student(spec)
    value = entropy_of(x, parts["entropy"])
    return Whole(value, {"x_max": x.max, "x_logz": x.logz, "a": value})


def log_prob_and_entropy(spec: Spec, parts: Parts, owner: Tensor) -> Whole:
    """Both; row: a = H."""
    whole = entropy(spec, parts)
    x = parts.student(spec)
    whole.value = torch.stack([log_prob_of(x, parts["label"], owner), whole.value])
    return whole


# --- divergences ------------------------------------------------------------------------------


def between(share: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``log(sum share e^log_ratio)`` where that is near the mean of the ratios.

    Returns the mean, what the logarithm exceeds it by (without cancellation, however small), and
    where the ratios are close enough for that.
    """
    mean = average(share, log_ratio)
    deviation = torch.where(share == 0, 0.0, log_ratio - mean)
    close = (deviation.abs() < 0.5).all(0)
    deviation = torch.where(close, deviation, 0.0)
    return mean, average(share, torch.expm1(deviation) - deviation).clamp(min=0).log1p(), close


class Pair:
    """Both rows of a divergence of logits, and what the shards of one are to those of the other."""

    def __init__(self, spec: Spec, parts: Parts) -> None:
        self.x = x = parts.student(spec)
        self.t = t = parts.teacher(spec)
        apart = (parts.x_max - x.max) - (parts["t_max"] - t.max)
        # log(sum e^x / sum e^t) of a shard; the kernel's gap has the digits of its small ones.
        self.log_ratio = apart * spec.scale + parts["gap"]
        # Through the ratio where there is one, that x be to t as exactly as the shards know it.
        both = ~x.empty & ~t.empty
        log_sums = torch.where(both, t.log_share + self.log_ratio, x.log_sums - t.logz)
        self.gap = torch.logsumexp(log_sums, 0)

    def forward(self) -> Tensor:
        """KL(P || Q), and the gap that goes with it."""
        mean, excess, close = between(self.t.share, self.log_ratio)
        close &= ((self.x.share == 0) == (self.t.share == 0)).all(0)
        self.gap = torch.where(close, mean + excess, self.gap)
        return torch.where(close, excess, self.gap - mean)

    def reverse(self) -> Tensor:
        """KL(Q || P), likewise."""
        mean, excess, close = between(self.x.share, -self.log_ratio)
        close &= ((self.x.share == 0) == (self.t.share == 0)).all(0)
        self.gap = torch.where(close, -(mean + excess), self.gap)
        return torch.where(close, excess, -(mean + self.gap))

    def record(self) -> dict[str, Tensor]:
        """What all divergences keep."""
        x, t = self.x, self.t
        record = {"x_max": x.max, "x_logz": x.logz, "t_max": t.max, "t_logz": t.logz}
        return {**record, "gap": self.gap}


def kl_div(spec: Spec, parts: Parts) -> Whole:
    """Row: a = 1 - sum p, b = the value, c: whether the rows are apart."""
    if spec.target_type == "logits":
        pair = Pair(spec, parts)
        inside = torch.where(pair.x.empty, 0.0, parts["value"])
        value = pair.forward() + average(pair.t.share, inside)
        record, mass = pair.record(), torch.ones_like(value)
    else:
        x = parts.student(spec)
        inside = torch.where(x.empty, 0.0, parts["value"])
        value = (inside - masked_product(parts["mass"], x.log_share)).sum(0)
        record, mass = {"x_max": x.max, "x_logz": x.logz}, parts["mass"].sum(0)
    a = torch.where(value.isnan(), value, 1 - mass)
    return Whole(value, {**record, "a": a, "b": value, "c": is_apart(value)})


def reverse_kl_div(spec: Spec, parts: Parts) -> Whole:
    """Row: a = the value, b = sum p - 1, c as above."""
    if spec.target_type == "logits":
        pair = Pair(spec, parts)
        inside = torch.where(pair.t.empty, 0.0, parts["value"])
        value = pair.reverse() + average(pair.x.share, inside)
        record, mass = pair.record(), torch.ones_like(value)
    else:
        x = parts.student(spec)
        value = average(x.share, parts["value"] + x.log_share)
        record, mass = {"x_max": x.max, "x_logz": x.logz}, parts["mass"].sum(0)
    return Whole(value, {**record, "a": value, "b": mass - 1, "c": is_apart(value)})


def is_apart(value: Tensor) -> Tensor:
    """1 where the textbook's terms will do."""
    return ((value > APART) & ~value.isinf()).to(value.dtype)
