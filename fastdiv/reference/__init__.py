"""What every loss is, in plain torch operations: specification, fallback, oracle of the tests.

This room imports torch only.
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
