"""The words that arguments of the public functions accept: one ``Literal`` for each argument.

The checks at run time read the same lists by ``typing.get_args``.
"""

from __future__ import annotations

from typing import Literal

Reduction = Literal["none", "sum", "mean", "batchmean"]
DivergenceReduction = Literal[Reduction, "pointwise"]  # of a loss that is a sum over the classes
TargetType = Literal["logits", "log_probs", "probs"]
Smoothing = Literal["all", "others"]
TokenWeight = Literal["probability"]  # weights of rows that a loss computes itself
Accumulate = Literal["weight", "rows"]  # which gradient of a layer is summed over its tiles
Missing = Literal["ignore", "renormalize", "tail"]  # mass that a top-k teacher leaves out
KLMissing = Literal[Missing, "uniform"]
NanPolicy = Literal["propagate", "omit", "raise"]
Backend = Literal["auto", "native", "reference"]
Divergence = Literal[
    "kl_div",
    "reverse_kl_div",
    "js_div",
    "skew_kl_div",
    "alpha_div",
    "renyi_div",
    "tv_distance",
    "hellinger_distance",
]


def check_choice(value: object, choices: tuple[str, ...], name: str) -> None:
    """Raise ValueError for a word that is not among the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
