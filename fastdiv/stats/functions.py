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
    r"""Information content of every event: what its observation tells.

    .. math:: I(p_c) = -\log p_c

    0 for a certain event, infinite for an impossible one, and additive for independent events.

    Arguments and errors are those of :func:`entropy`; the result has the shape of ``pk``, and NaN
    where ``nan_policy="omit"`` leaves an entry out.

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
    r"""Shannon entropy of a probability vector, or its divergence from a second one.

    .. math:: H(p) = -\sum_c p_c \log p_c, \qquad
        \mathrm{KL}(p \,\|\, q) = \sum_c p_c \,(\log p_c - \log q_c)

    Args:
        pk: Probabilities or counts, an array, list or tensor of any shape and real dtype (of
            tensors float32, bfloat16, float16, float64 or integers); divided by their sum.
        qk: A second vector of the same kind, for the relative entropy :func:`kl_div`; the two are
            broadcast against each other.
        base: Base of the logarithm: nats by default, bits for ``base=2``.
        axis: The axis that the probabilities are on, or a tuple of axes, whose entries together are
            one vector.  ``None`` ravels each argument first.
        nan_policy: ``"propagate"`` makes the result of a vector with NaN NaN.  ``"omit"`` leaves
            NaN out, and with it the same entry of the other vector.  ``"raise"`` raises a
            ValueError; compiled or transformed code cannot raise, and gives NaN.
        keepdims: Whether the result keeps the axes of ``axis`` with size 1.

    Returns:
        Of arrays and lists an array without ``axis``, or a NumPy scalar; of tensors a tensor.  Its
        dtype is that of the input, float32 for half precision, float64 for integers in NumPy and
        torch's default dtype for integer tensors.  A vector of zeros, or with an infinity, gives
        NaN.  A vector without entries gives 0, also one whose entries are all left out.

    Raises:
        TypeError: The input is not of real numbers, only one of the two is a tensor, or ``axis`` is
            no int and no tuple of ints.
        ValueError: The shapes do not broadcast, or are those of scalars; an axis is named twice;
            ``base`` is not positive and finite, or is 1; ``nan_policy`` is unknown, or
            ``"raise"`` and there are NaN; a probability is negative (on CPU; elsewhere, and in
            compiled or transformed code, the value is NaN).
        IndexError: The vectors do not have this axis.
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
    r"""Cross entropy of two probability vectors.

    .. math:: H(p, q) = -\sum_c p_c \log q_c = H(p) + \mathrm{KL}(p \,\|\, q)

    Arguments, result and errors are those of :func:`entropy`.

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
    r"""Kullback-Leibler divergence of the second vector from the first.

    .. math:: \mathrm{KL}(p \,\|\, q) = \sum_c p_c \,(\log p_c - \log q_c)

    Infinite where ``pk`` has mass and ``qk`` none; rounding does not make it negative.

    Arguments, result and errors are those of :func:`entropy`.

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
    r"""Jensen-Shannon divergence of two probability vectors.

    .. math:: \mathrm{JS}(p, q) = \tfrac12 \bigl(\mathrm{KL}(p \,\|\, m)
        + \mathrm{KL}(q \,\|\, m)\bigr), \qquad m = \tfrac12 (p + q)

    Symmetric, and in [0, ln 2]: in [0, 1] for ``base=2``.

    Arguments, result and errors are those of :func:`entropy`.

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
    r"""Jensen-Shannon distance of two probability vectors: a metric.

    .. math:: \sqrt{\mathrm{JS}(p, q)}

    The square root of :func:`js_div`, with gradient 0 where the two are equal.

    Arguments, result and errors are those of :func:`entropy`; ``axis`` is given by its name.

    Example:
        >>> import fastdiv
        >>> fastdiv.stats.jensenshannon([0.1, 0.2, 0.7], [0.2, 0.3, 0.5], base=2)
        np.float64(0.1778)

    Source: :func:`scipy.spatial.distance.jensenshannon`, which has no ``nan_policy``, and gives NaN
    for vectors so close that rounding makes the divergence negative; here that is 0.
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
    # Both sides doubled: half of the smallest number would be 0.
    mixture = p + q
    terms = _relative_entropy(2 * p, mixture) + _relative_entropy(2 * q, mixture)
    return _not_negative(terms.sum(given.dims) / 4) / unit


def _jensenshannon(given: Distributions, unit: float | Tensor) -> Tensor:
    js = _js_div(given, unit)
    equal = js == 0
    return torch.where(equal, 0.0, torch.where(equal, 1.0, js).sqrt())


# --- terms ------------------------------------------------------------------------------------


def _information(p: Tensor) -> Tensor:
    """-log p; subtracted from 0, since the negative of log 1 is -0."""
    return 0.0 - log_of(p)


def _relative_entropy(p: Tensor, q: Tensor) -> Tensor:
    """``p log(p / q) + q - p``; what is added has no sum, and takes the first order in p - q away.

    The sum of ``p log(p / q)`` alone is off by as much as the two sums are from each other, which
    between close vectors is more than their divergence.
    """
    empty, lost = p == 0, q == 0
    near = (p - q).abs() < q / 2
    some_p, some_q = torch.where(empty, 1.0, p), torch.where(lost, 1.0, q)
    apart = torch.where(near, (p - q) / some_q, 0.0)
    log_ratio = torch.where(near, torch.log1p(apart), some_p.log() - some_q.log())
    terms = torch.where(empty, 0.0, p * log_ratio) + (q - p)
    return torch.where(lost & ~empty, torch.inf, terms)


def _not_negative(divergence: Tensor) -> Tensor:
    """Lifted to 0 where rounding took it below, with the derivatives it had."""
    return divergence - divergence.detach().clamp(max=0)
