r"""Entropy and divergences of probability vectors, along ``axis=0`` by default: values of SciPy.

The functions of :mod:`fastdiv` take logits and compare rows; these take probabilities, or counts,
and divide them by their sum along ``axis``, as :func:`scipy.stats.entropy` and
:func:`scipy.spatial.distance.jensenshannon` do.  Their arguments ``axis``, ``nan_policy`` and
``keepdims`` mean what they mean in SciPy.  Arrays and lists give NumPy; tensors give tensors, on
their device and differentiable.  :func:`entropy` lists arguments and errors of them all.

A class without mass adds nothing (:math:`0 \log 0 = 0`), mass where the other vector has none is
infinite.  Where a probability is 0, the infinite part of its derivative is left out, so that
gradients are finite.

Four things differ from SciPy on purpose:

- A negative probability, a scalar, a masked array and a base of 1 are errors.  Where SciPy gives a
  number for them, it is that of no distribution.
- Sums of counts do not overflow: two counts of 1e308 have the entropy of two equal counts.
- Divergences of nearly equal vectors keep their digits and are never negative.
- :func:`jensenshannon` broadcasts its vectors before it divides them by their sums, as
  :func:`scipy.stats.entropy` does.  SciPy's divides first, so that the sums need not stay 1.
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
