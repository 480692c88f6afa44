"""Other fused losses for GPUs, where they are installed."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .losses import Loss


@cache
def peers(loss: str) -> dict[str, Loss]:
    """Implementations of a loss from elsewhere, called as their users call them, by name."""
    return {
        name: call
        for name, module, calls in (
            ("liger", "liger_kernel.transformers", _liger),
            ("quack", "quack.cross_entropy", _quack),
        )
        if (found := _import(module)) and (call := calls(found).get(loss))
    }


def _import(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        return None


def _liger(module: Any) -> dict[str, Loss]:
    kl = module.LigerKLDIVLoss(reduction="batchmean", log_target=True)
    js = module.LigerJSD(beta=0.5)
    return {
        "cross_entropy": module.LigerCrossEntropyLoss(),
        # Its divergences take log-probabilities.
        "kl_div": lambda x, t: kl(*_log_probs(x, t)),
        "js_div": lambda x, t: js(*_log_probs(x, t)),
    }


def _quack(module: Any) -> dict[str, Loss]:
    return {"cross_entropy": lambda x, y: module.cross_entropy(x, y).mean()}


def _log_probs(*logits: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.log_softmax(v, -1) for v in logits)
