"""TRL's own functions, as they were before any patch, and what its tests give them."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiv.integrations.trl.patch as integration
from fastdiv.integrations.trl import losses
from fastdiv.integrations.trl.patch import FUNCTIONS, GKD, JSD, OTHERS, UTILS

CLASSES = 9
RUNS_ON = {
    "generalized_jsd_loss": "js_div",
    "selective_log_softmax": "log_prob",
    "selective_log_softmax_and_entropy": "log_prob_and_entropy",
    "entropy_from_logits": "entropy",
}

with warnings.catch_warnings():  # torch's and transformers' deprecations, TRL's experiments
    warnings.simplefilter("ignore")
    trl = pytest.importorskip("trl")
    utils = importlib.import_module(UTILS)
    trainers: dict[str, type] = {}
    for _module, _name in (*GKD, *OTHERS):
        try:
            trainers[_name] = getattr(importlib.import_module(_module), _name)
        except (ImportError, RuntimeError):
            continue

THEIRS: dict[str, Callable[..., Any]] = {
    name: vars(utils)[name] for name in FUNCTIONS if name in vars(utils)
}
THEIRS |= {
    f"{name}.{JSD}": getattr(trainer, JSD)
    for name, trainer in trainers.items()
    if JSD in vars(trainer)
}
WITH_JSD = [name for name in THEIRS if name.endswith(JSD)]


def given_to(name: str) -> Callable[..., Any]:
    """The function that TRL has in this place now."""
    trainer, _, method = name.rpartition(".")
    return getattr(trainers[trainer] if trainer else utils, method)


def calls_of_ours(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The functions of fastdiv that are called, under the patch."""
    called: list[str] = []

    def spy(name: str) -> Callable[..., Any]:
        function = getattr(losses, name)
        return lambda *args, **given: called.append(name) or function(*args, **given)

    for name in RUNS_ON.values():
        monkeypatch.setattr(losses, name, spy(name))
    with integration.apply():
        called.clear()
        yield called


def rows(dtype: torch.dtype, *shape: int) -> Tensor:
    return (3 * torch.randn(*shape, CLASSES)).to(dtype)


def some_labels() -> tuple[Tensor | None, ...]:
    """Without; some ignored, a sequence wholly; all ignored."""
    labels = torch.randint(CLASSES, (3, 5))
    labels[0, 2:], labels[1] = -100, -100
    return None, labels, torch.full_like(labels, -100)
