"""Losses of a vocabulary that is sharded over ranks, and means over data-parallel ranks."""

from ._entropy import entropy, log_prob, log_prob_and_entropy
from ._linear import linear_cross_entropy, linear_kl_div
from ._losses import cross_entropy, js_div, kl_div, reverse_kl_div
from ._mean import token_mean

__all__ = [
    "cross_entropy",
    "entropy",
    "js_div",
    "kl_div",
    "linear_cross_entropy",
    "linear_kl_div",
    "log_prob",
    "log_prob_and_entropy",
    "reverse_kl_div",
    "token_mean",
]
