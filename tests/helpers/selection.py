"""Which of many parameters a test takes every time, and which at night."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def nightly_but(kept: Collection[Any], every: Iterable[Any]) -> list[Any]:
    """Return all parameters; those that are not kept run with ``make test-all`` only.

    A tuple is the values of several parameters.
    """
    every = list(every)
    assert set(kept) <= set(every), set(kept) - set(every)
    return [v if v in kept else pytest.param(*_values(v), marks=pytest.mark.nightly) for v in every]


def _values(parameter: Any) -> tuple[Any, ...]:
    return parameter if isinstance(parameter, tuple) else (parameter,)
