"""Rows that are hard on shards, as the ranks of the distributed tests see them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import fastdiv
import fastdiv.distributed as sharded
from fastdiv.distributed import infinite_rows
from helpers.cases import make_inputs
from helpers.shards import SIZES, classes_of, digest, size_of
from helpers.values import same, uneven, value_and_gradients

TOLERANCE = 4e-5  # some values are above 100
INF, LOWEST = math.inf, torch.finfo(torch.float32).min
DIVERGENCES = ("kl_div", "reverse_kl_div", "js_div")


def hard_rows(sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Student and teacher logits; every row says what is wrong with it."""
    x, t = make_inputs((16, sum(sizes)), torch.float32)
    first, last = (classes_of(rank, sizes) for rank in (0, len(sizes) - 1))
    somewhere = sum(sizes) // 2
    x[0, first] = -INF  # a shard without student: KL(p || q) is infinite
    x[1, first] = t[1, first] = -INF  # without mass
    t[2, last] = -INF  # without teacher: KL(q || p) is infinite
    x[3, somewhere] = math.nan
    x[4, somewhere] = INF
    t[5, somewhere] = math.nan
    x[6] = -INF
    x[7, somewhere] = -INF  # one class without student, in a shard that has one
    t[8, somewhere] = -INF
    x[9, first] = t[9, first] = LOWEST
    t[10] = x[10]
    t[11] = x[11] + 50
    x[12, last] = -INF
    x[13, :] = -INF
    x[13, 0] = t[13, 0] = 0.0  # all of the student on one class
    x[14, first] = -120.0  # mass that float32 cannot hold
    t[14, last] = -130.0
    x[15, first] = -120.0  # and of that, an infinite term
    t[15, 0] = -INF
    return x, t


def divergences(group: Any, rank: int) -> list[str]:
    sizes, found, wrong = SIZES[size_of(group)], [], []
    mine = classes_of(rank, sizes)
    x, t = hard_rows(sizes)
    p = t.double().softmax(-1)
    targets = {"logits": t, "log_probs": p.log().float(), "probs": (1.1 * p).float()}
    for name in DIVERGENCES:
        for target_type, target in targets.items():
            options: dict[str, Any] = {"target_type": target_type, "reduction": "none"}
            whole = value_and_gradients(bound(fastdiv, name, options), x, target, upstream=uneven)
            ours = value_and_gradients(
                bound(sharded, name, {**options, "group": group}),
                *(x[:, mine], target[:, mine]),
                upstream=uneven,
            )
            wrong += different(f"{name} of {target_type}", ours, whole, mine)
            found.append(digest(ours[0]))
    assert not wrong, "\n".join(wrong)
    return found


def divergences_like_gpu(group: Any, rank: int) -> list[str]:
    asked = infinite_rows.none_found
    infinite_rows.none_found = lambda found: False
    try:
        return divergences(group, rank)
    finally:
        infinite_rows.none_found = asked


def rows_of_logits(group: Any, rank: int) -> list[str]:
    sizes, found, wrong = SIZES[size_of(group)], [], []
    mine = classes_of(rank, sizes)
    x, t = hard_rows(sizes)
    p = 1.1 * t.softmax(-1).nan_to_num()
    y = torch.full((16,), sum(sizes) // 2)
    y[:3] = 0
    ignored = y.clone()
    ignored[3:7] = -100
    losses: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "entropy": ("entropy", None, {}),
        "log_prob": ("log_prob", y, {}),
        "both": ("log_prob_and_entropy", y, {}),
        "labels": ("cross_entropy", y, {}),
        "ignored": ("cross_entropy", ignored, {"reduction": "mean"}),
        "smoothed": ("cross_entropy", ignored, {"label_smoothing": 0.1}),
        "z-loss": ("cross_entropy", ignored, {"z_loss": 0.1, "softcap": 9.0}),
        "soft": ("cross_entropy", p, {}),
        "soft and smoothed": ("cross_entropy", p, {"label_smoothing": 0.1}),
        "none counts": ("cross_entropy", torch.full((16,), -100), {"reduction": "mean"}),
    }
    for what, (name, target, options) in losses.items():
        if name == "cross_entropy":
            options = {"reduction": "none", **options}
        whole = value_and_gradients(bound(fastdiv, name, options), x, target, upstream=uneven)
        soft = target is not None and target.is_floating_point()
        ours = value_and_gradients(
            bound(sharded, name, {**options, "group": group}),
            *(x[:, mine], target[:, mine] if soft else target),
            upstream=uneven,
        )
        wrong += different(what, ours, whole, mine)
        found.append(digest(ours[0]))
    assert not wrong, "\n".join(wrong)
    return found


def bound(module: Any, name: str, options: dict[str, Any]) -> Any:
    def loss(x: Tensor, t: Tensor | None) -> Tensor:
        function = getattr(module, name)
        value = function(x, **options) if t is None else function(x, t, **options)
        return torch.stack(value) if isinstance(value, tuple) else value

    return loss


def different(
    what: str, ours: tuple[Tensor, ...], whole: tuple[Tensor, ...], mine: slice
) -> list[str]:
    """What differs.  (To raise here would leave the other ranks waiting for this one.)"""
    found = []
    for kind, a, b in zip(("value", "dx", "dt"), ours, whole, strict=False):
        b = b if kind == "value" else b[:, mine]
        try:
            same(a, b, TOLERANCE)
        except AssertionError as error:
            rows = [] if a.dim() < 1 else [r for r in range(len(a)) if not close(a[r], b[r])]
            found.append(f"{what}, {kind}, rows {rows}: {error}\n{a[rows]}\n{b[rows]}")
    return found


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)


def next_to_zero(group: Any, rank: int) -> list[str]:
    """Of rows whose KL is 1e-3 down to 1e-11, all digits, of gradients too."""
    sizes, found, wrong = (600, 1, 2400, 1096)[: size_of(group)], [], []
    mine = classes_of(rank, sizes)
    noise, direction = make_inputs((4, sum(sizes)), torch.float32, scale=1.0)
    for sigma in (1.0, 10.0):
        for epsilon in (1e-1, 1e-3, 1e-5):
            x = noise * sigma + 50
            # Not far from the float32 number that this is, the same for all.
            t = (x.double() + epsilon * direction.double()).float()
            for name in DIVERGENCES:
                options: dict[str, Any] = {"target_type": "logits", "reduction": "none"}
                with fastdiv.backend("reference"):
                    truth = value_and_gradients(
                        bound(fastdiv, name, options), x.double(), t.double()
                    )
                ours = value_and_gradients(
                    bound(sharded, name, {**options, "group": group}),
                    *(x[:, mine], t[:, mine]),
                )
                if not (ours[0] >= 0).all():
                    wrong.append(f"{name} is negative: {ours[0]}")
                for kind, a, b in zip(("value", "dx", "dt"), ours, truth, strict=True):
                    # Of whole rows: a shard of one class may have next to none of the gradient.
                    size = b.abs() if kind == "value" else b.norm(dim=-1)
                    error = a.double() - (b if kind == "value" else b[:, mine])
                    error = error.abs() if kind == "value" else error.norm(dim=-1)
                    if not (error <= 1e-5 * size + 1e-14).all():
                        wrong.append(f"{name}, {sigma}, {epsilon}, {kind}: {error / size}")
                found.append(digest(ours[0]))
    x = noise * 3
    for name in DIVERGENCES:  # of equal rows, nothing at all
        value, dx, dt = value_and_gradients(
            bound(sharded, name, {"target_type": "logits", "group": group}),
            *(x[:, mine], x[:, mine].clone()),
        )
        if value != 0 or dx.any() or dt.any():
            wrong.append(f"{name} of equal rows: {value}, {dx}, {dt}")
    assert not wrong, "\n".join(wrong)
    return found
