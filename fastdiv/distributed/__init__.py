"""Losses of a vocabulary that is sharded over ranks, and means over data-parallel ranks.

The functions are those of :mod:`fastdiv` of the same names, of shards: rank r of ``group`` has the
next :math:`C_r` classes in rank order.  Class indices are global and the same on every rank;
probabilities, teachers and class weights are sharded as the input is.  Every rank returns the loss
of whole rows, and the gradient of a shard is its part of theirs.  A rank whose arguments are
refused, or that does not fit the others, gives an error on all of them.

What must be the same on all ranks is compared by checksums: labels, token weights, and the hidden
states of layers; on a GPU only with ``FASTDIV_CHECK=1``.  ``num_classes`` says how many classes the
shards must have in all.

:func:`token_mean` averages over the tokens of data-parallel ranks, of any loss.
"""

from .._engine.public import set_home as _set_home
from .linear import linear_cross_entropy, linear_kl_div
from .log_probs import entropy, log_prob, log_prob_and_entropy
from .losses import cross_entropy, js_div, kl_div, reverse_kl_div
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
