"""DTensors whose classes are sharded: the public functions hand them to ``fastdiv.distributed``."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import Tensor
from torch.nn import Parameter

from ._recording import is_tracing, recorded

F = TypeVar("F", bound=Callable[..., Any])
PLAIN = {Tensor, Parameter}


def takes_dtensors(function: F) -> F:
    """The same function, which takes the shards of DTensors, and can be traced.

    Where nobody has imported torch's DTensor, a look at a dictionary is all that DTensors cost.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch.distributed.tensor" in sys.modules:
            for values in (args, kwargs.values()):
                for v in values:
                    if type(v) not in PLAIN and isinstance(v, Tensor):
                        from .distributed import _dtensor

                        return _dtensor.call(function, args, kwargs)
        if is_tracing():
            return recorded(function, args, kwargs)
        return function(*args, **kwargs)

    return cast(F, call)
