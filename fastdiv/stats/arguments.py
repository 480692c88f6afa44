"""Arguments of :mod:`fastdiv.stats`: from arrays or tensors to distributions, and back."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import reference
from .._engine import arguments
from .._engine.torch_private import without_fake_mode
from ..reference.choices import NanPolicy, check_choice

Vector = Tensor | npt.ArrayLike
Axis = int | Sequence[int] | None
NAN_POLICIES = get_args(NanPolicy)
FAR = 2.0**64  # more than any number of summands, and a power of two: products with it are exact


class Distributions(NamedTuple):
    """Vectors of one shape and dtype whose entries along ``dims`` add up to 1."""

    vectors: tuple[Tensor, ...]
    dims: tuple[int, ...]
    kept: tuple[int, ...]  # the axes of size 1 that keepdims puts into the result, in order
    omitted: Tensor | None  # which entries nan_policy="omit" left out


def evaluate(
    function: Callable[[Distributions, float | Tensor], Tensor],
    base: float | None,
    axis: Axis,
    nan_policy: NanPolicy,
    keepdims: bool = False,
    **given: Vector,
) -> Any:
    """Call ``function`` with distributions and the size of a nat in units of ``base``.

    Tensors give a tensor, arrays and lists a NumPy array or scalar.
    """
    unit = arguments.log_of_base(base)
    check_choice(nan_policy, NAN_POLICIES, "nan_policy")
    if _are_tensors(given):
        return _value(function, unit, axis, nan_policy, keepdims, given)
    with without_fake_mode():
        tensors = {name: _from_array(v, name) for name, v in given.items()}
        return _value(function, unit, axis, nan_policy, keepdims, tensors).numpy()[()]


def _value(
    function: Callable[[Distributions, float | Tensor], Tensor],
    unit: float | Tensor,
    axis: Axis,
    nan_policy: NanPolicy,
    keepdims: bool,
    given: dict[str, Any],
) -> Tensor:
    found = _distributions(axis, nan_policy, given)
    value = function(found, unit).to(found.vectors[0].dtype)
    for dim in found.kept if keepdims else ():
        value = value.unsqueeze(dim)
    return value


def _are_tensors(given: dict[str, Vector]) -> bool:
    tensors = [isinstance(v, Tensor) for v in given.values()]
    if any(tensors) and not all(tensors):
        kinds = " and ".join(f"{name} is a {type(v).__name__}" for name, v in given.items())
        raise TypeError(f"{kinds}: pass two tensors, or two arrays")
    return all(tensors)


def _from_array(v: Any, name: str) -> Tensor:
    array = np.asarray(v)
    if array.dtype.kind not in "biuf" or isinstance(v, np.ma.MaskedArray):
        kind = type(v).__name__
        raise TypeError(f"{name} must hold real numbers, got a {kind} of {array.dtype}")
    short = array.dtype.kind == "f" and array.dtype.itemsize <= 4
    # Copy in C order: torch has no negative strides, and warns about read-only memory.
    return torch.from_numpy(np.array(array, dtype=np.float32 if short else np.float64, order="C"))


def _distributions(axis: Axis, nan_policy: NanPolicy, given: dict[str, Tensor]) -> Distributions:
    dtype = _common_dtype(given)
    if len(devices := {v.device for v in given.values()}) == 2:
        raise RuntimeError(f"{' and '.join(given)} are on {' and '.join(map(str, devices))}")
    shape = tuple(_common_shape(axis, given))
    dims = _dims(axis, shape)
    kept = tuple(sorted(dims))
    if axis is None:
        kept = tuple(range(max(v.dim() for v in given.values())))
        if len(given) == 2:
            given = {name: v.reshape(-1) for name, v in given.items()}
    given = {name: v.to(dtype) for name, v in given.items()}
    for name, v in given.items():
        _check_values(v, name, nan_policy)
    vectors = torch.broadcast_tensors(*given.values())
    omitted = None
    if nan_policy == "omit":
        omitted = functools.reduce(torch.logical_or, (v.isnan() for v in vectors))
    divided = tuple(_normalised(v, dims, omitted) for v in vectors)
    return Distributions(divided, dims, kept, omitted)


def _common_dtype(given: dict[str, Tensor]) -> torch.dtype:
    """Return the dtype of all computation, which for integers alone is torch's default."""
    for name, v in given.items():
        arguments.check_tensor(v, name)
        if v.dtype not in arguments.FLOATS and (v.is_floating_point() or v.is_complex()):
            raise TypeError(
                f"{name} must be float32, bfloat16, float16, float64 or integers, got {v.dtype}"
            )
    floats = [v.dtype for v in given.values() if v.is_floating_point()]
    promoted = functools.reduce(torch.promote_types, floats or [torch.get_default_dtype()])
    return reference.value_dtype(promoted)


def _common_shape(axis: Axis, given: dict[str, Tensor]) -> tuple[int, ...]:
    """Return the shape that vectors are broadcast to; ``axis=None`` flattens each first."""
    shapes = [tuple(v.shape) for v in given.values()]
    if not any(shapes):
        raise ValueError(f"{' and '.join(given)} must have at least one dimension, got a scalar")
    flat = axis is None and len(shapes) == 2
    try:
        return torch.broadcast_shapes(*([(math.prod(s),) for s in shapes] if flat else shapes))
    except RuntimeError:
        names, listed = " and ".join(given), " and ".join(map(str, shapes))
        how = ", raveled for axis=None," if flat else ""
        raise ValueError(f"{names} of shapes {listed}{how} do not broadcast") from None


def _dims(axis: Axis, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the axes, counted from 0."""
    if axis is None:
        return tuple(range(len(shape)))
    axes = axis if isinstance(axis, (tuple, list)) else (axis,)
    try:
        axes = [operator.index(a) for a in axes]
    except TypeError:
        raise TypeError(f"axis must be an int, a tuple of ints or None, got {axis!r}") from None
    if not all(-len(shape) <= a < len(shape) for a in axes):
        raise IndexError(f"axis {axis} is out of range for probabilities of shape {shape}")
    dims = tuple(a % len(shape) for a in axes)
    if not dims or len(set(dims)) < len(dims):
        raise ValueError(f"axis must have each axis of shape {shape} at most once, got {axis}")
    return dims


def _check_values(v: Tensor, name: str, nan_policy: NanPolicy) -> None:
    """Raise for negative numbers where reading them is free, and for NaN if asked to."""
    if arguments.values_may_be_read(v) and bool((v < 0).any()):
        raise ValueError(
            f"{name} must hold probabilities, got {v[v < 0].min().item()}: take the softmax of "
            "logits, or pass logits to the functions of fastdiv itself"
        )
    if nan_policy == "raise" and arguments.values_exist(v):
        if bool((nans := v.isnan()).any()):
            raise ValueError(
                f"The input contains nan values: {int(nans.sum())} in {name} of shape "
                f"{tuple(v.shape)}; nan_policy='omit' leaves them out"
            )


def _normalised(v: Tensor, dims: tuple[int, ...], omitted: Tensor | None) -> Tensor:
    """Divide entries by their sum, unless there are none or all of them are omitted.

    Vectors near the ends of the range are scaled first.  So neither the sum overflows nor the
    derivative, which contains its reciprocal.
    """
    if any(v.shape[d] == 0 for d in dims):
        return v
    # A negative number that was not checked, as on other devices, makes its vector NaN.
    v = torch.where(v < 0, torch.nan, v)
    if omitted is not None:
        v = torch.where(omitted, 0.0, v)
    largest, info = v.detach().amax(dims, keepdim=True), torch.finfo(v.dtype)
    scale = torch.ones_like(largest).masked_fill(largest > info.max / FAR, 1 / FAR)
    v = v * scale.masked_fill(largest < info.tiny * FAR, FAR)
    total = v.sum(dims, keepdim=True)
    if omitted is not None:
        total = torch.where(omitted.all(dims, keepdim=True), 1.0, total)
    return v / total
