"""The calls that a public function makes to the private ops, as the dispatcher sees them."""

from __future__ import annotations

from typing import Any

from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

Call = tuple[OpOverload, tuple[Any, ...]]


class Recorder(TorchDispatchMode):
    """Collects every ``torch.ops.fastdiv`` call made inside the ``with`` block."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "fastdiv":
            self.calls.append((op, args))
        return op(*args, **(kwargs or {}))
