"""Losses of a vocabulary that is sharded over ranks, and means over data-parallel ranks.

The functions are those of :mod:`fastdiv` of the same names, for shards: in rank order, each rank of
``group`` has the next :math:`C_r` classes.  Class indices are global and the same on every rank.
Probabilities, teachers and class weights are sharded like the input.  Every rank returns the loss
of whole rows, and the gradient of a shard is its part of theirs.  If one rank raises, or the ranks
do not fit together, all of them raise.

Labels, token weights and the hidden states of layers must be the same on all ranks.  They are
compared by checksums, on a GPU only with ``FASTDIV_CHECK=1``.

:func:`token_mean` averages any loss over the tokens of data-parallel ranks.
"""

from .._engine.public import set_home as _set_home
from .divergences import js_div, kl_div, reverse_kl_div
from .linear import linear_cross_entropy, linear_kl_div
from .log_probs import entropy, log_prob, log_prob_and_entropy
from .losses import cross_entropy
from .mean import token_mean

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

_set_home(__name__, __all__, globals())
