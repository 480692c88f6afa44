"""What the tests of patch_torch share: who called fastdiv, and torch's own function."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiv
from fastdiv.integrations.torch import cross_entropy

TORCHS = F.cross_entropy


def torch_has_its_own() -> Iterator[None]:
    """Before a test and after it."""
    torch._dynamo.reset()
    assert F.cross_entropy is TORCHS and not cross_entropy.on
    yield
    assert F.cross_entropy is TORCHS and not cross_entropy.on


def calls_of_ours(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls that reach fastdiv, as they come."""
    calls = []

    def spy(*args: Any, **options: Any) -> Tensor:
        calls.append((args, options))
        return fastdiv.cross_entropy(*args, **options)

    monkeypatch.setattr(cross_entropy, "fastdiv_cross_entropy", spy)
    return calls


def patched(*args: Any, **options: Any) -> Tensor:
    with fastdiv.patch_torch():
        return F.cross_entropy(*args, **options)
