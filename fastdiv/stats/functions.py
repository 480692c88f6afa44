"""The functions of :mod:`fastdiv.stats`, each a few torch operations on checked vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._engine.recording import recordable
from ..reference.choices import NanPolicy
from ..reference.divergences import log_of, masked_product
from .arguments import Axis, Distributions, Vector, evaluate


@recordable
def information_content(
    pk: Vector,
    base: float | None = None,
    axis: Axis = 0,
    *,
    nan_policy: NanPolicy = "propagate",
) -> Any:
    r"""Compute the information content of every event.

    .. math:: I(p_c) = -\log p_c

    It is 0 for a certain event, infinite for an impossible one, and additive for independent
    events.

    Args:
        pk: Probabilities or counts of any shape, an array, list or tensor of real numbers (a tensor
            of float32, bfloat16, float16, float64 or integers).  They are divided by their sum.
        base: Base of the logarithm: None for nats, 2 for bits.
        axis: The axis of a vector, or a tuple of axes whose entries together are one.  None
            flattens each argument first.
        nan_policy: ``"propagate"`` makes the result NaN for a vector with NaN.  ``"omit"`` leaves
            out NaN and the same entry of the other vector.  ``"raise"`` raises ValueError; compiled
            or transformed code gives NaN instead.

    Returns:
        The information content, of the shape of ``pk``, and NaN where ``nan_policy="omit"`` leaves
        an entry out; for its type and dtype see :func:`entropy`.

    Raises:
        TypeError: The input does not hold real numbers, or ``axis`` is neither an int nor a tuple
            of ints.
        ValueError: The input is a scalar; an axis is given twice; ``base`` is not positive and
            finite, or is 1; ``nan_policy`` is unknown, or ``"raise"`` and there are NaN; a
            probability is negative (on a CPU; elsewhere, and in compiled or transformed code, the
            value is NaN).
        IndexError: The input does not have this axis.

    Example:
        >>> import fastdiv
        >>> fastdiv.stats.information_content([0.5, 0.25, 0.25], base=2)
        array([1., 2., 2.])

    Source: Shannon, *A Mathematical Theory of Communication* (1948).
    """
    return evaluate(_information_content, base, axis, nan_policy, pk=pk)


@recordable
def entropy(
    pk: Vector,
    qk: Vector | None = None,
    base: float | None = None,
    axis: Axis = 0,
    *,
    nan_policy: NanPolicy = "propagate",
    keepdims: bool = False,
) -> Any:
    r"""Compute the Shannon entropy of a probability vector, or its divergence from a second one.

    .. math:: H(p) = -\sum_c p_c \log p_c, \qquad
        \mathrm{KL}(p \,\|\, q) = \sum_c p_c \,(\log p_c - \log q_c)

    Args:
        pk: Probabilities or counts of any shape, an array, list or tensor of real numbers (a tensor
            of float32, bfloat16, float16, float64 or integers).  They are divided by their sum.
        qk: A second vector of the same kind, for the relative entropy :func:`kl_div`.  The two are
            broadcast against each other.
        base: Base of the logarithm: None for nats, 2 for bits.
        axis: The axis of a vector, or a tuple of axes whose entries together are one.  None
            flattens each argument first.
        nan_policy: ``"propagate"`` makes the result NaN for a vector with NaN.  ``"omit"`` leaves
            out NaN and the same entry of the other vector.  ``"raise"`` raises ValueError; compiled
            or transformed code gives NaN instead.
        keepdims: Whether the result keeps the axes of ``axis``, with size 1.

    Returns:
        The entropy, without ``axis``: of arrays and lists an array or NumPy scalar, of tensors a
        tensor.  It has the dtype of the input, but float32 for half precision, float64 for integers
        in NumPy and torch's default dtype for integer tensors.  A vector of zeros or with an
        infinity gives NaN.  A vector without entries, or with all of them omitted, gives 0.

    Raises:
        TypeError: The input does not hold real numbers, one of the vectors is a tensor and the
            other is not, or ``axis`` is neither an int nor a tuple of ints.
        ValueError: The shapes do not broadcast, or the input is a scalar; an axis is given twice;
            ``base`` is not positive and finite, or is 1; ``nan_policy`` is unknown, or ``"raise"``
            and there are NaN; a probability is negative (on a CPU; elsewhere, and in compiled or
            transformed code, the value is NaN).
        IndexError: The input does not have this axis.
        RuntimeError: The tensors are on different devices.

    Example:
        >>> import fastdiv, torch
        >>> fastdiv.stats.entropy([0.1, 0.2, 0.7], base=2)
        np.float64(1.1567796494)
        >>> counts = torch.tensor([[1, 1, 0, 0], [2, 2, 2, 2]])
        >>> fastdiv.stats.entropy(counts, base=2, axis=-1)
        tensor([1., 2.])
        >>> fastdiv.stats.entropy(counts, base=2, axis=(0, 1), keepdims=True)
        tensor([[2.5219]])

    Source: :func:`scipy.stats.entropy`.
    """
    if qk is not None:
        return kl_div(pk, qk, base, axis, nan_policy=nan_policy, keepdims=keepdims)
    return evaluate(_entropy, base, axis, nan_policy, keepdims, pk=pk)


@recordable
def cross_entropy(
    pk: Vector,
    qk: Vector,
    base: float | None = None,
    axis: Axis = 0,
    *,
    nan_policy: NanPolicy = "propagate",
    keepdims: bool = False,
) -> Any:
    r"""Compute the cross entropy of two probability vectors.

    .. math:: H(p, q) = -\sum_c p_c \log q_c = H(p) + \mathrm{KL}(p \,\|\, q)

    Args:
        pk: Probabilities or counts of any shape, an array, list or tensor of real numbers (a tensor
            of float32, bfloat16, float16, float64 or integers).  They are divided by their sum.
        qk: A second vector of the same kind.  The two are broadcast against each other.
        base: Base of the logarithm: None for nats, 2 for bits.
        axis: The axis of a vector, or a tuple of axes whose entries together are one.  None
            flattens each argument first.
        nan_policy: ``"propagate"`` makes the result NaN for a vector with NaN.  ``"omit"`` leaves
            out NaN and the same entry of the other vector.  ``"raise"`` raises ValueError; compiled
            or transformed code gives NaN instead.
        keepdims: Whether the result keeps the axes of ``axis``, with size 1.

    Returns:
        The cross entropy, without ``axis``; for its type, dtype and empty vectors see
        :func:`entropy`.

    Raises:
        TypeError: The input does not hold real numbers, one of the vectors is a tensor and the
            other is not, or ``axis`` is neither an int nor a tuple of ints.
        ValueError: The shapes do not broadcast, or the input is a scalar; an axis is given twice;
            ``base`` is not positive and finite, or is 1; ``nan_policy`` is unknown, or ``"raise"``
            and there are NaN; a probability is negative (on a CPU; elsewhere, and in compiled or
            transformed code, the value is NaN).
        IndexError: The input does not have this axis.
        RuntimeError: The tensors are on different devices.

    Example:
        >>> import fastdiv
        >>> fastdiv.stats.cross_entropy([0.1, 0.2, 0.7], [0.2, 0.3, 0.5], base=2)
        np.float64(1.2796)

    Source: ``entropy(pk) + entropy(pk, qk)`` of :func:`scipy.stats.entropy`.
    """
    return evaluate(_cross_entropy, base, axis, nan_policy, keepdims, pk=pk, qk=qk)


@recordable
def kl_div(
    pk: Vector,
    qk: Vector,
    base: float | None = None,
    axis: Axis = 0,
    *,
    nan_policy: NanPolicy = "propagate",
    keepdims: bool = False,
) -> Any:
    r"""Compute the Kullback-Leibler divergence of the second vector from the first.

    .. math:: \mathrm{KL}(p \,\|\, q) = \sum_c p_c \,(\log p_c - \log q_c)

    It is infinite where ``pk`` has mass and ``qk`` has none.  Rounding does not make it negative.

    Args:
        pk: Probabilities or counts of any shape, an array, list or tensor of real numbers (a tensor
            of float32, bfloat16, float16, float64 or integers).  They are divided by their sum.
        qk: A second vector of the same kind.  The two are broadcast against each other.
        base: Base of the logarithm: None for nats, 2 for bits.
        axis: The axis of a vector, or a tuple of axes whose entries together are one.  None
            flattens each argument first.
        nan_policy: ``"propagate"`` makes the result NaN for a vector with NaN.  ``"omit"`` leaves
            out NaN and the same entry of the other vector.  ``"raise"`` raises ValueError; compiled
            or transformed code gives NaN instead.
        keepdims: Whether the result keeps the axes of ``axis``, with size 1.

    Returns:
        The divergence, without ``axis``; for its type, dtype and empty vectors see :func:`entropy`.

    Raises:
        TypeError: The input does not hold real numbers, one of the vectors is a tensor and the
            other is not, or ``axis`` is neither an int nor a tuple of ints.
        ValueError: The shapes do not broadcast, or the input is a scalar; an axis is given twice;
            ``base`` is not positive and finite, or is 1; ``nan_policy`` is unknown, or ``"raise"``
            and there are NaN; a probability is negative (on a CPU; elsewhere, and in compiled or
            transformed code, the value is NaN).
        IndexError: The input does not have this axis.
        RuntimeError: The tensors are on different devices.

    Example:
        >>> import fastdiv
        >>> fastdiv.stats.kl_div([9 / 25, 12 / 25, 4 / 25], [1, 1, 1])
        np.float64(0.0853)

    Source: :func:`scipy.stats.entropy` of two vectors.
    """
    return evaluate(_kl_div, base, axis, nan_policy, keepdims, pk=pk, qk=qk)


@recordable
def js_div(
    pk: Vector,
    qk: Vector,
    base: float | None = None,
    axis: Axis = 0,
    *,
    nan_policy: NanPolicy = "propagate",
    keepdims: bool = False,
) -> Any:
    r"""Compute the Jensen-Shannon divergence of two probability vectors.

    .. math:: \mathrm{JS}(p, q) = \tfrac12 \bigl(\mathrm{KL}(p \,\|\, m)
        + \mathrm{KL}(q \,\|\, m)\bigr), \qquad m = \tfrac12 (p + q)

    It is symmetric and in [0, ln 2], or in [0, 1] for ``base=2``.

    Args:
        pk: Probabilities or counts of any shape, an array, list or tensor of real numbers (a tensor
            of float32, bfloat16, float16, float64 or integers).  They are divided by their sum.
        qk: A second vector of the same kind.  The two are broadcast against each other.
        base: Base of the logarithm: None for nats, 2 for bits.
        axis: The axis of a vector, or a tuple of axes whose entries together are one.  None
            flattens each argument first.
        nan_policy: ``"propagate"`` makes the result NaN for a vector with NaN.  ``"omit"`` leaves
            out NaN and the same entry of the other vector.  ``"raise"`` raises ValueError; compiled
            or transformed code gives NaN instead.
        keepdims: Whether the result keeps the axes of ``axis``, with size 1.

    Returns:
        The divergence, without ``axis``; for its type, dtype and empty vectors see :func:`entropy`.

    Raises:
        TypeError: The input does not hold real numbers, one of the vectors is a tensor and the
            other is not, or ``axis`` is neither an int nor a tuple of ints.
        ValueError: The shapes do not broadcast, or the input is a scalar; an axis is given twice;
            ``base`` is not positive and finite, or is 1; ``nan_policy`` is unknown, or ``"raise"``
            and there are NaN; a probability is negative (on a CPU; elsewhere, and in compiled or
            transformed code, the value is NaN).
        IndexError: The input does not have this axis.
        RuntimeError: The tensors are on different devices.

    Example:
        >>> import fastdiv
        >>> fastdiv.stats.js_div([1, 0], [0, 1], base=2)
        np.float64(1.0)

    Source: Lin, *Divergence Measures Based on the Shannon Entropy* (1991).
    """
    return evaluate(_js_div, base, axis, nan_policy, keepdims, pk=pk, qk=qk)


@recordable
def jensenshannon(
    p: Vector,
    q: Vector,
    base: float | None = None,
    *,
    axis: Axis = 0,
    keepdims: bool = False,
    nan_policy: NanPolicy = "propagate",
) -> Any:
    r"""Compute the Jensen-Shannon distance of two probability vectors, a metric.

    .. math:: \sqrt{\mathrm{JS}(p, q)}

    It is the square root of :func:`js_div`, with gradient 0 where the two are equal.

    Args:
        p: Probabilities or counts of any shape, an array, list or tensor of real numbers (a tensor
            of float32, bfloat16, float16, float64 or integers).  They are divided by their sum.
        q: A second vector of the same kind.  The two are broadcast against each other.
        base: Base of the logarithm: None for nats, 2 for bits.
        axis: The axis of a vector, or a tuple of axes whose entries together are one.  None
            flattens each argument first.
        keepdims: Whether the result keeps the axes of ``axis``, with size 1.
        nan_policy: ``"propagate"`` makes the result NaN for a vector with NaN.  ``"omit"`` leaves
            out NaN and the same entry of the other vector.  ``"raise"`` raises ValueError; compiled
            or transformed code gives NaN instead.

    Returns:
        The distance, without ``axis``; for its type, dtype and empty vectors see :func:`entropy`.

    Raises:
        TypeError: The input does not hold real numbers, one of the vectors is a tensor and the
            other is not, or ``axis`` is neither an int nor a tuple of ints.
        ValueError: The shapes do not broadcast, or the input is a scalar; an axis is given twice;
            ``base`` is not positive and finite, or is 1; ``nan_policy`` is unknown, or ``"raise"``
            and there are NaN; a probability is negative (on a CPU; elsewhere, and in compiled or
            transformed code, the value is NaN).
        IndexError: The input does not have this axis.
        RuntimeError: The tensors are on different devices.

    Example:
        >>> import fastdiv
        >>> fastdiv.stats.jensenshannon([0.1, 0.2, 0.7], [0.2, 0.3, 0.5], base=2)
        np.float64(0.1778)

    Source: :func:`scipy.spatial.distance.jensenshannon`, which has no ``nan_policy``, and gives NaN
    for vectors so close that rounding makes the divergence negative.  Here that is 0.
    """
    return evaluate(_jensenshannon, base, axis, nan_policy, keepdims, p=p, q=q)


# --- the value, from distributions and the size of a nat --------------------------------------


def _information_content(given: Distributions, unit: float | Tensor) -> Tensor:
    (p,) = given.vectors
    value = _information(p) / unit
    return value if given.omitted is None else torch.where(given.omitted, torch.nan, value)


def _entropy(given: Distributions, unit: float | Tensor) -> Tensor:
    (p,) = given.vectors
    return masked_product(p, _information(p)).sum(given.dims) / unit


def _cross_entropy(given: Distributions, unit: float | Tensor) -> Tensor:
    p, q = given.vectors
    return reference.expected(p, _information(q)).sum(given.dims) / unit


def _kl_div(given: Distributions, unit: float | Tensor) -> Tensor:
    return _not_negative(_relative_entropy(*given.vectors).sum(given.dims)) / unit


def _js_div(given: Distributions, unit: float | Tensor) -> Tensor:
    p, q = given.vectors
    # Both sides are doubled: half of the smallest number would be 0.
    mixture = p + q
    terms = _relative_entropy(2 * p, mixture) + _relative_entropy(2 * q, mixture)
    return _not_negative(terms.sum(given.dims) / 4) / unit


def _jensenshannon(given: Distributions, unit: float | Tensor) -> Tensor:
    js = _js_div(given, unit)
    equal = js == 0
    return torch.where(equal, 0.0, torch.where(equal, 1.0, js).sqrt())


# --- terms ------------------------------------------------------------------------------------


def _information(p: Tensor) -> Tensor:
    """Compute -log p, as a difference from 0, since the negative of log 1 is -0."""
    return 0.0 - log_of(p)


def _relative_entropy(p: Tensor, q: Tensor) -> Tensor:
    """Compute ``p log(p / q) + q - p``, where ``q - p`` adds up to 0 and cancels the first order.

    The error of the sum of ``p log(p / q)`` alone is as large as the difference between the sums of
    p and q.  For close vectors that is larger than their divergence.
    """
    empty, lost = p == 0, q == 0
    near = (p - q).abs() < q / 2
    some_p, some_q = torch.where(empty, 1.0, p), torch.where(lost, 1.0, q)
    apart = torch.where(near, (p - q) / some_q, 0.0)
    log_ratio = torch.where(near, torch.log1p(apart), some_p.log() - some_q.log())
    terms = torch.where(empty, 0.0, p * log_ratio) + (q - p)
    return torch.where(lost & ~empty, torch.inf, terms)


def _not_negative(divergence: Tensor) -> Tensor:
    """Raise a value that rounding made negative to 0, and keep its derivatives."""
    return divergence - divergence.detach().clamp(max=0)
