r"""Entropy and divergences of probability vectors, with the values of SciPy.

The functions of :mod:`fastdiv` take logits and compare rows.  These take probabilities or counts,
and divide them by their sum along ``axis`` (0 by default), as :func:`scipy.stats.entropy` and
:func:`scipy.spatial.distance.jensenshannon` do.  ``axis``, ``nan_policy`` and ``keepdims`` mean
what they mean in SciPy.  Arrays and lists give NumPy arrays.  Tensors give tensors, on their device
and differentiable.

A class without mass adds nothing (:math:`0 \log 0 = 0`).  Mass where the other vector has none
gives infinity.  Where a probability is 0, the infinite part of its derivative is left out, so
gradients are finite.

Four things differ from SciPy on purpose:

- A negative probability, a scalar, a masked array and a base of 1 are errors.  SciPy gives numbers
  for some of these, which belong to no distribution.
- Sums of counts do not overflow: two counts of 1e308 have the entropy of two equal counts.
- Divergences of nearly equal vectors keep their digits and are never negative.
- :func:`jensenshannon` broadcasts its vectors before it divides them by their sums, as
  :func:`scipy.stats.entropy` does.  SciPy's divides first, so the sums may differ from 1.
"""

from .._engine.public import set_home as _set_home
from .functions import (
    cross_entropy,
    entropy,
    information_content,
    jensenshannon,
    js_div,
    kl_div,
)

__all__ = [
    "cross_entropy",
    "entropy",
    "information_content",
    "jensenshannon",
    "js_div",
    "kl_div",
]

_set_home(__name__, __all__, globals())
