"""Which function of SciPy each function of probability vectors is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats
import torch
from torch import Tensor

from fastdiv import stats

INF, NAN = math.inf, math.nan
Function = Callable[..., Any]


def scipy_cross_entropy(p: Any, q: Any, base: float | None, axis: int | None) -> Any:
    entropy = scipy.stats.entropy
    return entropy(p, base=base, axis=axis) + entropy(p, q, base=base, axis=axis)


def scipy_js_div(p: Any, q: Any, base: float | None, axis: int | None) -> Any:
    distance = scipy.spatial.distance.jensenshannon(p, q, axis=axis)
    return distance**2 / math.log(base or math.e)


PAIRS: dict[Function, Function] = {
    stats.entropy: scipy.stats.entropy,
    stats.cross_entropy: scipy_cross_entropy,
    stats.kl_div: scipy.stats.entropy,
    stats.js_div: scipy_js_div,
    stats.jensenshannon: scipy.spatial.distance.jensenshannon,
}
EVERY_PAIR = pytest.mark.parametrize("ours", PAIRS)
SYMMETRIC = (stats.js_div, stats.jensenshannon)


def close(actual: Any, expected: Any, rtol: float = 1e-11, atol: float = 1e-13) -> None:
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


def value(function: Function, *args: Any, **options: Any) -> Any:
    """Of arrays, once as they are and once as tensors, which must agree."""
    of_arrays = function(*args, **options)
    of_tensors = function(*(torch.tensor(np.ascontiguousarray(v)) for v in args), **options)
    assert isinstance(of_arrays, (np.ndarray, np.floating))
    assert isinstance(of_tensors, Tensor)
    np.testing.assert_array_equal(of_arrays, of_tensors.numpy())
    return of_arrays
