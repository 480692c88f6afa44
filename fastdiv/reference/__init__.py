"""Every loss in plain torch operations: specification, fallback, and oracle of the tests.

It imports torch only.
"""

from .divergences import DIVERGENCES
from .losses import OF_CLASSES, expected, loss, mean_weights, row_weights, stats
from .spec import Rows, Spec, Stats, value_dtype
from .topk import NAMED

__all__ = [
    "DIVERGENCES",
    "NAMED",
    "OF_CLASSES",
    "Rows",
    "Spec",
    "Stats",
    "expected",
    "loss",
    "mean_weights",
    "row_weights",
    "stats",
    "value_dtype",
]
