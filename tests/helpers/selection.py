"""Which of many parameters a test takes every time, and which at night."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def nightly_but(kept: Collection[str], names: Iterable[str]) -> list[Any]:
    """Return all names as parameters; those that are not kept run with ``make test-all`` only."""
    names = list(names)
    assert set(kept) <= set(names), set(kept) - set(names)
    return [n if n in kept else pytest.param(n, marks=pytest.mark.nightly) for n in names]
