"""The decorator by which public functions pass DTensors to ``fastdiv.distributed.dtensor``."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import Tensor

from .arguments import PLAIN
from .recording import recorded
from .torch_private import is_jit_traced

F = TypeVar("F", bound=Callable[..., Any])


def dispatch_dtensor(function: F) -> F:
    """Let a function compute DTensors from their local parts, and be traced.

    Unless torch's DTensor is imported, this costs no more than a look-up in a dictionary.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch.distributed.tensor" in sys.modules:
            for values in (args, kwargs.values()):
                for v in values:
                    if type(v) not in PLAIN and isinstance(v, Tensor):
                        from ..distributed import dtensor

                        return dtensor.call(function, args, kwargs)
        if is_jit_traced():
            return recorded(function, args, kwargs)
        return function(*args, **kwargs)

    return cast(F, call)
