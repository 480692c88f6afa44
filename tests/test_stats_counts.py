"""Counts at the ends of the range of their dtype, whose sum or its reciprocal overflows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from fastdiv import stats
from helpers.scipy_values import EVERY_PAIR, Function, close, value

ENDS = {
    np.float64: (2.0**1010, 2.0**-1072),
    np.float32: (2.0**115, 2.0**-147),
    np.float16: (2.0**3, 2.0**-24),
}


@EVERY_PAIR
@pytest.mark.parametrize("dtype", ENDS)
def test_sums_at_the_ends_of_the_range(ours: Function, dtype: Any) -> None:
    """Counts times a power of two have the bits of the counts, also where their sum overflows."""
    rng = np.random.default_rng(0)
    most = 2**13 - 1 if dtype is not np.float16 else 2**11 - 1
    p, q = rng.integers(0, most, (2, 3, 200)).astype(dtype)
    for factor in map(dtype, ENDS[dtype]):
        scaled = p * factor, q * factor
        assert np.isfinite(scaled).all() and np.array_equal(scaled[0] / factor, p)
        for options in ({"axis": -1}, {"axis": None}, {"axis": -1, "nan_policy": "omit"}):
            expected = ours(p, q, **options)
            np.testing.assert_array_equal(value(ours, *scaled, **options), expected)
            np.testing.assert_array_equal(ours(scaled[0], q, **options), expected)
            for one in (stats.entropy, stats.information_content):
                actual = value(one, scaled[0], **options)
                np.testing.assert_array_equal(actual, one(p, **options))


@EVERY_PAIR
def test_the_largest_counts(ours: Function) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        power = 2.0 ** (math.frexp(torch.finfo(dtype).max)[1] - 1)
        most = torch.full((9,), power, dtype=dtype).requires_grad_()
        ones = torch.ones(9, dtype=dtype)
        for given in ((most, ones), (ones, most), (most, most)):
            result = ours(*given)
            assert result == ours(ones, ones)
            (gradient,) = torch.autograd.grad(result, most)
            assert gradient.abs().max() <= 1e-4  # what it is for float16, whose power is 2^15
        most = torch.full_like(most, torch.finfo(dtype).max)
        close(ours(most, ones).item(), ours(ones, ones).item(), rtol=0, atol=2e-7)
    assert stats.entropy([1e308, 1e308]) == np.log(2)
    assert np.isnan(stats.entropy([np.inf, 1.0]))  # which is more than the largest


@EVERY_PAIR
def test_derivatives_of_the_smallest_counts(ours: Function) -> None:
    """The reciprocal of their sum is infinite; times a derivative of 0 it must not be NaN."""
    for dtype in (torch.float64, torch.float32):
        smallest = torch.finfo(dtype).smallest_normal * 2.0**-9
        for counts in (torch.ones(5, dtype=dtype), torch.tensor([1, 3, 4, 2, 6], dtype=dtype)):
            other = torch.tensor([1, 2, 4, 8, 16], dtype=dtype)
            for swap in (False, True):
                signs = []
                for factor in (1.0, smallest):
                    p = (counts * factor).requires_grad_()
                    result = ours(other, p) if swap else ours(p, other)
                    signs.append(torch.autograd.grad(result, p)[0].sign())
                assert torch.equal(*signs)


def test_large_integers() -> None:
    """Integers have the digits of the dtype of the result, whatever they are beside."""
    counts, other = [2**60, 2**60 - 2**8, 3], [1, 2, 3.5]
    expected = scipy.stats.entropy(np.array(counts, dtype=np.float64), other)
    for p in (counts, np.array(counts), np.array(counts, dtype=np.uint64)):
        close(stats.kl_div(p, other), expected, rtol=1e-15)
    q = torch.tensor(other, dtype=torch.float64)
    close(stats.kl_div(torch.tensor(counts), q), expected, rtol=1e-15)
    near = torch.tensor([2**24 + 1, 1])
    first = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert stats.cross_entropy(first, near) == stats.information_content(near.double())[0]


def test_integers_beyond_a_default_dtype_of_half_precision() -> None:
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float16)  # the largest of which is 65504
        for dtype in (torch.int64, torch.int32, torch.uint32):
            counts = torch.tensor([100_000, 100_000], dtype=dtype)
            assert stats.entropy(counts).item() == np.float32(np.log(2))
    finally:
        torch.set_default_dtype(default)
