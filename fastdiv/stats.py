r"""Entropy and divergences of probability vectors, value for value those of SciPy.

The functions of :mod:`fastdiv` take logits; these take probabilities, or counts: what they are
given is divided by its sum along ``axis``, as :func:`scipy.stats.entropy` and
:func:`scipy.spatial.distance.jensenshannon` do.  Arrays and lists give NumPy; tensors give tensors,
on their device and differentiable.  :func:`entropy` lists arguments and errors of them all.

A class without mass adds nothing (:math:`0 \log 0 = 0`), mass where the other vector has none is
infinite.  Where a probability is 0, the infinite part of its derivative is left out, so that
gradients are finite.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import _check, reference
from ._recording import recordable
from .reference_divergences import log_of, masked_product

__all__ = [
    "cross_entropy",
    "entropy",
    "information_content",
    "jensenshannon",
    "js_div",
    "kl_div",
]

Vector = Tensor | npt.ArrayLike


@recordable
def information_content(pk: Vector, base: float | None = None, axis: int | None = -1) -> Any:
    r"""Information content of every event: what its observation tells.

    .. math:: I(p_c) = -\log p_c

    0 for a certain event, infinite for an impossible one, and additive for independent events.

    Arguments and errors are those of :func:`entropy`; the result has the shape of ``pk``.

    Example:
        >>> import fastdiv
        >>> fastdiv.stats.information_content([0.5, 0.25, 0.25], base=2)
        array([1., 2., 2.])

    Source: Shannon, *A Mathematical Theory of Communication* (1948).
    """
    unit = _check.log_of_base(base)
    (p,) = _distributions(axis, pk=pk)
    return _like(pk, _information(p) / unit)


@recordable
def entropy(
    pk: Vector, qk: Vector | None = None, base: float | None = None, axis: int | None = -1
) -> Any:
    r"""Shannon entropy of a probability vector, or its divergence from a second one.

    .. math:: H(p) = -\sum_c p_c \log p_c, \qquad
        \mathrm{KL}(p \,\|\, q) = \sum_c p_c \,(\log p_c - \log q_c)

    Args:
        pk: Probabilities or counts, an array, list or tensor of any shape and real dtype (of
            tensors float32, bfloat16, float16, float64 or integers); divided by their sum.
        qk: A second vector of the same kind, for the relative entropy :func:`kl_div`; it is
            broadcast against ``pk``.
        base: Base of the logarithm: nats by default, bits for ``base=2``.
        axis: The axis that the probabilities are on; ``None`` for all axes.

    Returns:
        Of arrays and lists an array without ``axis``, or a NumPy scalar; of tensors a tensor.  Its
        dtype is that of the input, float32 for half precision, float64 for integers in NumPy and
        torch's default dtype for integer tensors.  A vector of zeros, infinities or NaN gives NaN.

    Raises:
        TypeError: not real numbers; a tensor beside something else.
        ValueError: shapes that do not broadcast, nothing along ``axis``, a base that is not
            positive and finite or is 1, a negative probability (on CPU; elsewhere, and in compiled
            or transformed code, the value is NaN).
        IndexError: an axis that the vectors do not have.
        RuntimeError: tensors on different devices.

    Example:
        >>> import fastdiv, torch
        >>> fastdiv.stats.entropy([0.1, 0.2, 0.7], base=2)
        np.float64(1.1567796494)
        >>> fastdiv.stats.entropy(torch.tensor([[1, 1, 0, 0], [2, 2, 2, 2]]), base=2)
        tensor([1., 2.])

    Source: :func:`scipy.stats.entropy`, whose default is ``axis=0``.
    """
    if qk is not None:
        return kl_div(pk, qk, base, axis)
    unit = _check.log_of_base(base)
    (p,) = _distributions(axis, pk=pk)
    return _like(pk, masked_product(p, _information(p)).sum(axis) / unit)


@recordable
def cross_entropy(pk: Vector, qk: Vector, base: float | None = None, axis: int | None = -1) -> Any:
    r"""Cross entropy of two probability vectors.

    .. math:: H(p, q) = -\sum_c p_c \log q_c = H(p) + \mathrm{KL}(p \,\|\, q)

    Arguments, result and errors are those of :func:`entropy`.

    Example:
        >>> import fastdiv
        >>> fastdiv.stats.cross_entropy([0.1, 0.2, 0.7], [0.2, 0.3, 0.5], base=2)
        np.float64(1.2796)

    Source: ``entropy(pk) + entropy(pk, qk)`` of :func:`scipy.stats.entropy`.
    """
    unit = _check.log_of_base(base)
    p, q = _distributions(axis, pk=pk, qk=qk)
    return _like(pk, reference.expected(p, _information(q)).sum(axis) / unit)


@recordable
def kl_div(pk: Vector, qk: Vector, base: float | None = None, axis: int | None = -1) -> Any:
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
    unit = _check.log_of_base(base)
    p, q = _distributions(axis, pk=pk, qk=qk)
    return _like(pk, _not_negative(_relative_entropy(p, q).sum(axis)) / unit)


@recordable
def js_div(pk: Vector, qk: Vector, base: float | None = None, axis: int | None = -1) -> Any:
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
    unit = _check.log_of_base(base)
    p, q = _distributions(axis, pk=pk, qk=qk)
    return _like(pk, _jensen_shannon(p, q, axis) / unit)


@recordable
def jensenshannon(p: Vector, q: Vector, base: float | None = None, axis: int | None = -1) -> Any:
    r"""Jensen-Shannon distance of two probability vectors: a metric.

    .. math:: \sqrt{\mathrm{JS}(p, q)}

    The square root of :func:`js_div`, with gradient 0 where the two are equal.

    Arguments, result and errors are those of :func:`entropy`.

    Example:
        >>> import fastdiv
        >>> fastdiv.stats.jensenshannon([0.1, 0.2, 0.7], [0.2, 0.3, 0.5], base=2)
        np.float64(0.1778)

    Source: :func:`scipy.spatial.distance.jensenshannon`, whose default is ``axis=0``, and which
    gives NaN for vectors so close that rounding makes the divergence negative; here that is 0.
    """
    unit = _check.log_of_base(base)
    given = p
    p, q = _distributions(axis, p=p, q=q)
    js = _jensen_shannon(p, q, axis) / unit
    equal = js == 0
    return _like(given, torch.where(equal, 0.0, torch.where(equal, 1.0, js).sqrt()))


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


def _jensen_shannon(p: Tensor, q: Tensor, axis: int | None) -> Tensor:
    # Both sides doubled: half of the smallest number would be 0.
    mixture = p + q
    terms = _relative_entropy(2 * p, mixture) + _relative_entropy(2 * q, mixture)
    return _not_negative(terms.sum(axis) / 4)


def _not_negative(divergence: Tensor) -> Tensor:
    """Lifted to 0 where rounding took it below, with the derivatives it had."""
    return divergence - divergence.detach().clamp(max=0)


# --- what is given, and what is returned ------------------------------------------------------


def _distributions(axis: int | None, **given: Vector) -> tuple[Tensor, ...]:
    """Vectors of one shape and dtype that sum to 1, from arguments of these names."""
    vectors = [_as_tensor(v, name) for name, v in given.items()]
    if len({isinstance(v, Tensor) for v in given.values()}) == 2:
        kinds = " and ".join(f"{name} is a {type(v).__name__}" for name, v in given.items())
        raise TypeError(f"{kinds}: give both as tensors, or neither")
    if len(devices := {v.device for v in vectors}) == 2:
        raise RuntimeError(f"{' and '.join(given)} are on {' and '.join(map(str, devices))}")
    try:
        shape = torch.broadcast_shapes(*(v.shape for v in vectors))
    except RuntimeError:
        shapes = " and ".join(str(tuple(v.shape)) for v in vectors)
        raise ValueError(f"{' and '.join(given)} of shapes {shapes} do not broadcast") from None
    if not shape:
        raise ValueError(f"{' and '.join(given)} must have at least one dimension, got a scalar")
    if axis is not None and not -len(shape) <= axis < len(shape):
        raise IndexError(f"axis {axis} is out of range for probabilities of shape {tuple(shape)}")
    if (math.prod(shape) if axis is None else shape[axis]) == 0:
        raise ValueError(f"there are no probabilities along axis {axis} of shape {tuple(shape)}")
    dtype = reference.value_dtype(functools.reduce(torch.promote_types, (v.dtype for v in vectors)))
    # A negative number that was not looked at, as on other devices, makes its vector NaN.
    vectors = [torch.where(v < 0, torch.nan, v.to(dtype)).expand(shape) for v in vectors]
    return tuple(v / v.sum(axis, keepdim=True) for v in vectors)


def _as_tensor(v: Vector, name: str) -> Tensor:
    if isinstance(v, Tensor):
        if v.dtype not in _check.FLOATS and (v.is_floating_point() or v.is_complex()):
            raise TypeError(
                f"{name} must be float32, bfloat16, float16, float64 or integers, got {v.dtype}"
            )
        tensor = v if v.is_floating_point() else v.to(torch.get_default_dtype())
    else:
        array = np.asarray(v)
        if array.dtype.kind not in "biuf" or isinstance(v, np.ma.MaskedArray):
            kind = type(v).__name__
            raise TypeError(f"{name} must hold real numbers, got a {kind} of {array.dtype}")
        short = array.dtype.kind == "f" and array.dtype.itemsize <= 4
        # A copy in C order: torch knows no negative strides, and warns of read-only memory.
        array = np.array(array, dtype=np.float32 if short else np.float64, order="C")
        tensor = torch.from_numpy(array)
    _check_not_negative(tensor, name)
    return tensor


def _check_not_negative(v: Tensor, name: str) -> None:
    if _check.values_may_be_read(v) and bool((v < 0).any()):
        raise ValueError(
            f"{name} must hold probabilities, got {v.min().item()}: take the softmax of logits, "
            "or give them to the functions of fastdiv itself"
        )


def _like(given: Vector, value: Tensor) -> Any:
    """A tensor for a tensor; else a NumPy array, or scalar."""
    return value if isinstance(given, Tensor) else value.numpy()[()]
