"""Every loss in plain torch operations: specification, fallback, and oracle of the tests.

It imports torch only.
"""

from .divergences import DIVERGENCES
from .losses import expected, loss, mean_weights, row_weights, stats
from .spec import Spec, Stats, value_dtype
from .topk import TOPK

__all__ = [
    "DIVERGENCES",
    "TOPK",
    "Spec",
    "Stats",
    "expected",
    "loss",
    "mean_weights",
    "row_weights",
    "stats",
    "value_dtype",
]
