"""Divergence and cross-entropy losses straight from logits, fused into one pass over them.

*div* stands for divergence.  Every function takes logits.  It runs a kernel where one fits, and
reference torch operations elsewhere (see :func:`backend`).
"""

from importlib.metadata import version as _version

from . import nn, stats
from ._engine.backend import backend
from ._engine.info import build_info
from ._engine.public import set_home as _set_home
from ._engine.warm import warm_gradients
from ._linear.cross_entropy import linear_cross_entropy
from ._linear.divergence import linear_js_div, linear_kl_div, linear_reverse_kl_div
from ._linear.log_prob import linear_log_prob, linear_log_prob_and_entropy
from ._linear.topk import linear_topk_kl_div, linear_topk_reverse_kl_div
from ._losses.alpha import alpha_div, renyi_div
from ._losses.cross_entropy import cross_entropy
from ._losses.distance import hellinger_distance, tv_distance
from ._losses.divergence import js_div, kl_div, reverse_kl_div, skew_kl_div
from ._losses.entropy import entropy, log_prob, log_prob_and_entropy
from ._losses.topk import topk_js_div, topk_kl_div, topk_reverse_kl_div
from .integrations.torch.patch import patch_torch
from .reference import Stats

__version__ = _version("fastdiv")

__all__ = [
    "Stats",
    "alpha_div",
    "backend",
    "build_info",
    "cross_entropy",
    "entropy",
    "hellinger_distance",
    "js_div",
    "kl_div",
    "linear_cross_entropy",
    "linear_js_div",
    "linear_kl_div",
    "linear_log_prob",
    "linear_log_prob_and_entropy",
    "linear_reverse_kl_div",
    "linear_topk_kl_div",
    "linear_topk_reverse_kl_div",
    "log_prob",
    "log_prob_and_entropy",
    "nn",
    "patch_torch",
    "renyi_div",
    "reverse_kl_div",
    "skew_kl_div",
    "stats",
    "topk_js_div",
    "topk_kl_div",
    "topk_reverse_kl_div",
    "tv_distance",
    "warm_gradients",
]

_set_home(__name__, __all__, globals())
