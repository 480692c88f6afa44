"""Ranks that do not fit each other."""

from __future__ import annotations

import functools
import os
import time
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

    def layers(h: Any, g: Any) -> Any:
        return lambda: sharded.linear_kl_div(h, w, g, target_linear_weight=w, group=group)

    h = x[:, :3].contiguous()
    turned = h.flip(0) if odd else h  # the same rows in another order
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
        "order of labels": cross_entropy(y=y[[1, 0, 2, 3, 4, 4]] if odd else y.clamp(max=4)),
        "token weights": cross_entropy(y=y.clamp(max=4), token_weight=1.0 + y * odd),
        "hidden states": linear(turned, w),
        "one hidden state": linear(torch.where(h == h[-1, -1], h + odd * 1e-7, h), w),
        "teacher": layers(h, turned),
        "number": cross_entropy(num_classes=0 if odd else 10),
        "numbers": cross_entropy(num_classes=10 + odd),
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


def gathered(group: Any, rank: int) -> dict[str, tuple[str, str]]:
    """Every function with the number of classes, of logits that every rank has whole."""
    x, w, y = torch.randn(ROWS, CLASSES), torch.randn(CLASSES, 3), torch.arange(ROWS) % CLASSES
    arguments: dict[str, Any] = {
        "cross_entropy": (x, y),
        "entropy": (x,),
        "log_prob": (x, y),
        "log_prob_and_entropy": (x, y),
        **{name: (x, x) for name in ("kl_div", "reverse_kl_div", "js_div")},
        "linear_cross_entropy": (x[:, :3], w, y),
        "linear_kl_div": (x[:, :3], w, x),
    }
    assert {*arguments, "token_mean"} == {*sharded.__all__}
    found = {}
    for name, tensors in arguments.items():
        options: dict[str, Any] = {"target_type": "logits"} if name.endswith("_div") else {}
        function = functools.partial(getattr(sharded, name), *tensors, group=group, **options)
        found[name] = outcome(functools.partial(function, num_classes=CLASSES))
        function(num_classes=CLASSES * torch.distributed.get_world_size(group))
    return found


def waits_for_no_one(group: Any, rank: int) -> None:
    """Hangs on one rank, when the other has failed."""
    if rank == 1:
        time.sleep(600)
    raise ValueError("this rank has failed")
