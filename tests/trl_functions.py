"""TRL's own functions, as they were before any patch, for the tests of the integration."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest

from fastdiv.integrations.trl import FUNCTIONS, GKD, JSD, OTHERS, UTILS

CLASSES = 9

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
