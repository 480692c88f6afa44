"""Public functions and classes name the module that users import them from, not their file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any, get_type_hints


def set_home(module: str, names: Iterable[str], namespace: Mapping[str, Any]) -> None:
    """Make ``module`` the ``__module__`` of these functions and classes.

    A pickle names it, so it can be read after a file has moved.
    """
    for name in names:
        value = namespace[name]
        if isinstance(value, ModuleType) or value.__module__ == module:
            continue
        if isinstance(value, type):  # its annotations are names in its file
            hints = get_type_hints(value)
            own = value.__dict__.get("__annotations__", {})
            own.update({field: hints[field] for field in own})
        value.__module__ = module
