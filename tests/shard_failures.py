"""Ranks that do not fit each other."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

import fastdiv.distributed as sharded

ROWS, CLASSES = 6, 5


def outcome(call: Callable[[], Any]) -> tuple[str, str]:
    """The kind of error, and what it says."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "none", ""


def failures(group: Any, rank: int) -> dict[str, tuple[str, str]]:
    """What every case comes to on this rank; the last rank is the one that is different."""
    odd = rank == torch.distributed.get_world_size(group) - 1
    x = torch.randn(ROWS, CLASSES)
    y = torch.arange(ROWS)
    w = torch.randn(CLASSES, 3)

    def cross_entropy(x: Any = x, y: Any = y, **options: Any) -> Any:
        return lambda: sharded.cross_entropy(x, y, group=group, **options)

    def kl_div(x: Any, t: Any, **options: Any) -> Any:
        return lambda: sharded.kl_div(x, t, group=group, **{"target_type": "logits", **options})

    def linear(h: Any, w: Any, **options: Any) -> Any:
        return lambda: sharded.linear_cross_entropy(h, w, y[: len(h)], group=group, **options)

    short = x[: ROWS - 1] if odd else x
    cases = {
        "option": cross_entropy(reduction="all" if odd else "mean"),
        "type": cross_entropy([] if odd else x),
        "shape": kl_div(x, x[:, 1:] if odd else x),
        "pointwise": kl_div(x, x, reduction="pointwise"),
        "layer": linear(x[:, :3], w[:, :2] if odd else w),
        "chunk": linear(x[:, :3], w, chunk_size=0 if odd else None),
        "rows": cross_entropy(short, y[: len(short)]),
        "dtype": kl_div(x.bfloat16() if odd else x, x.bfloat16() if odd else x),
        "temperature": kl_div(x, x, temperature=2.0 if odd else 1.0),
        "smoothing": cross_entropy(label_smoothing=0.1 if odd else 0.2),
        "loss": kl_div(x, x) if odd else cross_entropy(),
        "hidden gradient": linear(x[:, :3].clone().requires_grad_(odd), w),
        "labels": cross_entropy(y=y.flip(0).clamp(max=4) if odd else y),
        "range": cross_entropy(y=y + 1000),
        "index": lambda: sharded.log_prob(x, y - 1, group=group),
        "nothing": cross_entropy(),
    }
    return {name: outcome(call) for name, call in cases.items()}


def dies(group: Any, rank: int) -> tuple[str, str]:
    if rank == 1:
        os._exit(1)
    found = outcome(lambda: sharded.entropy(torch.randn(4, 3), group=group))
    assert found[0] == "RuntimeError", found
    return found
