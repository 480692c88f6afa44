"""Functions of probability vectors: SciPy's values, tensors with derivatives, clear errors."""

from __future__ import annotations

import functools
import math
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats
import torch
from hypothesis import given
from hypothesis.extra import numpy as hnp
from torch import Tensor

import fastdiv
from fastdiv import stats
from helpers.scipy_values import EVERY_PAIR, INF, NAN, PAIRS, SYMMETRIC, Function, close, value

# --- SciPy's values ---


@st.composite
def vectors(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int | None]:
    """Counts or probabilities of shapes that broadcast, with zeros, and an axis."""
    axis = draw(st.integers(-3, -1))
    shapes = draw(
        hnp.mutually_broadcastable_shapes(num_shapes=2, min_dims=3, max_dims=3, max_side=5)
    ).input_shapes
    length = draw(st.integers(1, 9))
    arrays = []
    for shape in shapes:
        full = list(shape)
        full[axis] = length
        # As far apart as 1e-30 and 1; a vector of zeros is no distribution.
        entries = st.one_of(st.just(0.0), st.floats(1e-30, 1.0), st.integers(1, 999).map(float))
        array = draw(hnp.arrays(np.float64, tuple(full), elements=entries))
        array[np.broadcast_to(array.sum(axis, keepdims=True) == 0, array.shape)] = 1.0
        arrays.append(array)
    if draw(st.booleans()) and axis == -1:
        arrays[1] = arrays[1][0]
    return arrays[0], arrays[1], draw(st.sampled_from([axis, axis, axis, None]))


@given(vectors(), st.sampled_from([None, 2, 10, 0.5, math.e]))
def test_values_of_scipy(pair: tuple[np.ndarray, np.ndarray, int | None], base: Any) -> None:
    p, q, axis = pair
    if axis is None:
        p, q = (np.ascontiguousarray(v) for v in np.broadcast_arrays(p, q))
    for ours, theirs in PAIRS.items():
        with np.errstate(invalid="ignore"):
            expected = np.asarray(theirs(p, q, base=base, axis=axis))
        actual = np.asarray(value(ours, p, q, base=base, axis=axis))
        # Their distance of nearly equal vectors is NaN or its square root of a rounding error.
        tiny = 1e-7 if ours is stats.jensenshannon else 1e-13
        if ours in SYMMETRIC and not (base and base < 1):
            expected = np.nan_to_num(expected, nan=0.0)
        close(actual, expected, atol=tiny)
        if ours is stats.entropy:
            close(value(ours, p, base=base, axis=axis), theirs(p, base=base, axis=axis))


def test_information_content() -> None:
    p = np.array([[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0]])
    content = value(stats.information_content, p, base=2, axis=-1)
    np.testing.assert_array_equal(content, [[1, 2, 2, INF], [0, INF, INF, INF]])
    assert not np.signbit(content).any()
    counts = np.array([[3.0, 1.0], [2.0, 2.0], [5.0, 1.0]])
    for axis in (0, 1, None):
        expected = -np.log(counts / counts.sum(axis, keepdims=True))
        close(value(stats.information_content, counts, axis=axis), expected)
    # Its expectation is the entropy.
    close((counts / 14 * stats.information_content(counts, axis=None)).sum(),
          scipy.stats.entropy(counts, axis=None))  # fmt: skip


@EVERY_PAIR
def test_zeros(ours: Function) -> None:
    theirs = PAIRS[ours]
    rows = [
        ([0.5, 0.5, 0.0], [0.25, 0.75, 0.0]),
        ([0.5, 0.5, 0.0], [0.25, 0.5, 0.25]),
        ([0.25, 0.5, 0.25], [0.5, 0.5, 0.0]),
        ([1.0, 0.0, 0.0], [0.0, 0.5, 0.5]),
        ([0.0, 1.0, 0.0], [0.0, 1.0, 0.0]),
        ([5e-324, 1.0, 0.0], [0.0, 1.0, 0.0]),
    ]
    for p, q in rows[:-1]:
        close(value(ours, p, q), theirs(p, q, base=None, axis=-1))
        assert not np.signbit(value(ours, p, q))
    # SciPy's mixture of the smallest number with 0 is 0, and its distance infinite.
    assert value(ours, *rows[-1]) == (0 if ours in SYMMETRIC else INF)


@EVERY_PAIR
@pytest.mark.parametrize("bad", [[0.0, 0.0], [NAN, 1.0], [INF, 1.0]], ids=str)
def test_no_distribution_gives_nan(ours: Function, bad: list[float]) -> None:
    assert np.isnan(value(ours, bad, [0.5, 0.5])) and np.isnan(value(ours, [0.5, 0.5], bad))
    assert np.isnan(value(stats.entropy, bad)) and np.isnan(scipy.stats.entropy(bad))


@EVERY_PAIR
def test_close_vectors(ours: Function) -> None:
    """Digits and sign are kept where SciPy's divergences are rounding, and its distance NaN."""
    rng = np.random.default_rng(0)
    p = rng.random((5000, 2)) + 0.1
    for ulps in (0, 1, 3):
        value = ours(p, p * (1 + ulps * 2**-52 * rng.standard_normal(p.shape)), axis=-1)
        assert (value >= 0).all() and (ulps or ours is stats.cross_entropy or (value == 0).all())
    d = rng.standard_normal(p.shape) * 1e-6
    q = p * (1 + d)
    with pytest.warns(RuntimeWarning, match="sqrt"):
        theirs = scipy.spatial.distance.jensenshannon(p, p * (1 + d * 1e-2), axis=-1)
    assert np.isnan(theirs).any()
    p = p / p.sum(-1, keepdims=True)
    variance = (p * (d - (p * d).sum(-1, keepdims=True)) ** 2).sum(-1)
    limit = {stats.kl_div: variance / 2, stats.js_div: variance / 8}  # to second order in d
    limit[stats.jensenshannon] = np.sqrt(limit[stats.js_div])
    if ours in limit:
        kept = variance > 1e-14  # at 1e-16 the rounding of q shows
        close(ours(p, q, axis=-1)[kept], limit[ours][kept], rtol=2e-5, atol=0)


# --- tensors ---


def tensors(rows: int = 3) -> tuple[Tensor, Tensor]:
    p, q = torch.rand(2, rows, 5, dtype=torch.float64) + 0.1
    return p.requires_grad_(), q.requires_grad_()


@EVERY_PAIR
def test_derivatives(ours: Function) -> None:
    for base, axis in ((None, -1), (2, 0), (10, None)):
        inputs = tensors()
        function = lambda *v: ours(*v, base=base, axis=axis)  # noqa: E731, B023
        assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, inputs)
    if ours is stats.entropy:
        assert torch.autograd.gradcheck(ours, inputs[:1])
    assert torch.autograd.gradcheck(stats.information_content, inputs[:1])


def test_gradients_where_a_probability_is_zero() -> None:
    """Those of the other classes; the infinite part of a derivative at zero is left out."""
    p = torch.tensor([0.5, 0.25, 0.25, 0.0, 0.0], dtype=torch.float64)
    q = torch.tensor([0.25, 0.25, 0.0, 0.5, 0.0], dtype=torch.float64)
    smooth = torch.tensor([0.2, 0.3, 0.1, 0.2, 0.2], dtype=torch.float64)
    for ours in PAIRS:
        for pair in ((p, q), (q, p), (p, smooth), (smooth, p), (p, p)):
            inputs = [v.clone().requires_grad_() for v in pair]
            first = torch.autograd.grad(ours(*inputs), inputs, create_graph=True)
            assert all(g.isfinite().all() for g in first), (ours, pair, first)
            # A sum without the gradients that do not depend on the inputs.
            total = sum(g.square().sum() for g in first)
            if total.requires_grad:
                second = torch.autograd.grad(total, inputs, allow_unused=True)
                assert all(g is None or g.isfinite().all() for g in second), (ours, pair)
    one = p.clone().requires_grad_()
    (dp,) = torch.autograd.grad(stats.entropy(one), one)
    entropy = stats.entropy(p)
    close(dp[:3].numpy(), (-p[:3].log() - entropy).numpy())
    # One that only adds to the sum: d H(p / sum p) less its own -p log p.
    close(dp[3:].numpy(), (1 - entropy).expand(2).numpy())
    one = p.clone().requires_grad_()
    (dp,) = torch.autograd.grad(stats.cross_entropy(one, smooth), one)
    close(dp.numpy(), (-smooth.log() - stats.cross_entropy(p, smooth)).numpy())  # all finite


def test_gradient_of_the_distance_of_equal_vectors() -> None:
    p, q = tensors()
    for g in torch.autograd.grad(stats.jensenshannon(p, p.detach()).sum(), p):
        assert (g == 0).all()
    near = (p * (1 + 1e-9 * q)).detach()
    for g in torch.autograd.grad(stats.jensenshannon(p, near).sum(), p):
        assert g.isfinite().all() and g.abs().max() < 10


@EVERY_PAIR
def test_compile_and_vmap(ours: Function) -> None:
    p, q = (v.detach() for v in tensors(4))
    torch._dynamo.reset()
    of_rows = functools.partial(ours, axis=-1)
    compiled = torch.compile(of_rows, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(p, q), of_rows(p, q))
    wrong = p.clone()
    wrong[1, 2] = -0.1  # which no error says, since that needs a look at the values
    assert compiled(wrong, q).isnan().tolist() == [False, True, False, False]
    assert compiled(q, wrong).isnan().tolist() == [False, True, False, False]
    torch.testing.assert_close(torch.func.vmap(ours)(p, q), of_rows(p, q))
    each = torch.func.vmap(torch.func.grad(ours))(p, q)
    p.requires_grad_()
    torch.testing.assert_close(each, torch.autograd.grad(of_rows(p, q).sum(), p)[0])


def test_agreement_with_the_functions_of_logits() -> None:
    x, t = torch.randn(2, 7, 9, dtype=torch.float64)
    p, q = t.softmax(-1), x.softmax(-1)
    target = {"target_type": "logits", "reduction": "none"}
    close(stats.entropy(q, axis=-1), fastdiv.entropy(x))
    close(stats.entropy(q, base=2, axis=-1), fastdiv.entropy(x, base=2))
    close(stats.cross_entropy(p, q, axis=-1), fastdiv.cross_entropy(x, p, reduction="none"))
    close(stats.kl_div(p, q, axis=-1), fastdiv.kl_div(x, t, **target))
    close(stats.kl_div(q, p, axis=-1), fastdiv.reverse_kl_div(x, t, **target))
    close(stats.js_div(p, q, axis=-1), fastdiv.js_div(x, t, **target))
    index = torch.arange(7)
    close(stats.information_content(q, axis=-1)[index, index], -fastdiv.log_prob(x, index))
