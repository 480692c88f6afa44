"""Axes, NaN and kept dimensions of the functions of probability vectors, as SciPy has them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
import scipy.stats
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdiv import stats
from helpers.scipy_values import EVERY_PAIR, NAN, PAIRS, Function, close, value

AXES = [0, 1, -1, None, (1,), (0, 2), (-1, 1), (2, 0, 1)]
EVERY_AXIS = pytest.mark.parametrize("axis", AXES, ids=str)
EVERY_POLICY = pytest.mark.parametrize("nan_policy", ["propagate", "omit"])
Vectors = tuple[np.ndarray, ...]


def js_div(p: np.ndarray, q: np.ndarray) -> Any:
    m = (p + q) / 2
    return (scipy.special.rel_entr(p, m) + scipy.special.rel_entr(q, m)).sum() / 2


FORMULAS: dict[Function, Callable[..., Any]] = {
    stats.entropy: lambda p: scipy.special.entr(p).sum(),
    stats.kl_div: lambda p, q: scipy.special.rel_entr(p, q).sum(),
    stats.cross_entropy: lambda p, q: -scipy.special.xlogy(p, q).sum(),
    stats.js_div: js_div,
    stats.jensenshannon: lambda p, q: np.sqrt(js_div(p, q)),
}


def by_formula(ours: Function, given: Vectors, axis: Any, nan_policy: str) -> Any:
    """The value of one vector after the other, whose entries are chosen before it is divided."""
    given = tuple(np.broadcast_arrays(*given))
    axes = tuple(range(given[0].ndim)) if axis is None else axis if np.ndim(axis) else (axis,)
    last = tuple(range(-len(axes), 0))
    moved = [np.moveaxis(v.astype(float), axes, last) for v in given]
    shape = moved[0].shape[: -len(axes)]
    result = np.empty(shape)
    for i in np.ndindex(shape):
        rows = np.stack([v[i].ravel() for v in moved])
        missing = np.isnan(rows).any(0)
        if nan_policy == "omit":
            rows = rows[:, ~missing]
        elif missing.any():
            result[i] = NAN
            continue
        with np.errstate(invalid="ignore"):  # zeros are no distribution
            result[i] = FORMULAS[ours](*(row / row.sum() for row in rows)) if rows.size else 0
    return result


def vectors(number: int, dtype: Any, holes: bool = False) -> Vectors:
    """Of shape (3, 4, 5), the second one (4, 5), with zeros; some entries are NaN, one row all."""
    rng = np.random.default_rng(7)
    p, q = rng.integers(0, 9, (3, 4, 5)).astype(dtype), rng.integers(1, 9, (4, 5)).astype(dtype)
    if holes:
        p[rng.random(p.shape) < 0.1] = NAN
        p[0, 1] = p[1, :, 3] = NAN
        q[2, 0] = NAN
    return (p, q)[:number]


@pytest.mark.parametrize("ours", FORMULAS)
@EVERY_AXIS
@EVERY_POLICY
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int64, np.uint8])
def test_every_axis(ours: Function, axis: Any, nan_policy: str, dtype: Any) -> None:
    real = issubclass(dtype, np.floating)
    single = real and dtype is not np.float64
    nat = math.sqrt(math.log(2)) if ours is stats.jensenshannon else math.log(2)
    options = {"axis": axis, "nan_policy": nan_policy}
    for holes in (False, True) if real else (False,):
        given = vectors(1 if ours is stats.entropy else 2, dtype, holes)
        given = tuple(np.broadcast_to(v, (3, 4, 5)) if axis is None else v for v in given)
        expected = by_formula(ours, given, axis, nan_policy)
        bounds = {"rtol": 2e-5, "atol": 1e-6} if single else {"rtol": 1e-12, "atol": 1e-14}
        actual = ours(*given, **options)
        assert actual.dtype == (np.float32 if single else np.float64)
        close(actual, expected, **bounds)
        kept = np.expand_dims(expected, tuple(range(3)) if axis is None else axis)
        bits = ours(*given, base=2, keepdims=True, **options)
        assert bits.shape == kept.shape
        close(bits * nat, kept, **bounds)
        if real:
            value(ours, *given, keepdims=True, **options)  # tensors agree
        else:
            tensors = [torch.tensor(np.ascontiguousarray(v)) for v in given]
            close(ours(*tensors, **options), expected, rtol=2e-5, atol=1e-6)
        counts = [torch.tensor(np.ascontiguousarray(v)).bfloat16() for v in given]  # exact
        close(ours(*counts, **options), expected, rtol=2e-5, atol=1e-6)


@EVERY_AXIS
@EVERY_POLICY
@pytest.mark.parametrize("keepdims", [False, True])
def test_every_axis_against_scipy(axis: Any, nan_policy: str, keepdims: bool) -> None:
    options = {"axis": axis, "keepdims": keepdims}
    for holes in (False, True):
        p, q = np.broadcast_arrays(*vectors(2, np.float64, holes))
        policy = {"nan_policy": nan_policy}
        for given in ((p,), (p, q)):
            expected = scipy.stats.entropy(*given, base=2, **options, **policy)
            actual = stats.entropy(*given, 2, **options, **policy) if len(given) == 2 else (
                stats.entropy(p, base=2, **options, **policy)
            )  # fmt: skip
            close(actual, expected)
            assert np.shape(actual) == np.shape(expected) and actual.dtype == expected.dtype
        if nan_policy == "propagate":
            expected = scipy.spatial.distance.jensenshannon(p, q, 2, **options)
            close(stats.jensenshannon(p, q, 2, **options), expected)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (stats.entropy, scipy.stats.entropy),
        (stats.jensenshannon, scipy.spatial.distance.jensenshannon),
    ],
)
def test_signature_of_scipy(ours: Function, theirs: Function) -> None:
    """Each argument has the name, place and default that it has there; ours may have more."""
    of_ours = inspect.signature(ours).parameters
    names = list(inspect.signature(theirs).parameters)
    assert list(of_ours)[: len(names)] == names
    for name, parameter in inspect.signature(theirs).parameters.items():
        assert (of_ours[name].kind, of_ours[name].default) == (parameter.kind, parameter.default)


def test_axis_0_by_default() -> None:
    p, q = vectors(2, np.float64)
    for ours in FORMULAS:
        given = (p,) if ours is stats.entropy else (p, q)
        np.testing.assert_array_equal(ours(*given), ours(*given, axis=0))
        assert ours(*given).shape == (4, 5)
    content = stats.information_content(p)
    np.testing.assert_array_equal(content, stats.information_content(p, axis=0))


@EVERY_AXIS
@EVERY_POLICY
def test_information_content(axis: Any, nan_policy: str) -> None:
    for holes in (False, True):
        (p,) = vectors(1, np.float64, holes)
        add_up = np.nansum if nan_policy == "omit" else np.sum
        with np.errstate(divide="ignore", invalid="ignore"):
            expected = -np.log(p / add_up(p, axis=axis, keepdims=True))
        actual = value(stats.information_content, p, axis=axis, nan_policy=nan_policy)
        close(actual, expected)


@EVERY_PAIR
def test_no_axis_ravels_each_vector(ours: Function) -> None:
    p, q = np.arange(1.0, 6), np.arange(3.0, 8)
    expected = ours(p, q)
    for given in ((p[:, None], q), (p[None], q[:, None]), (p, q[None, :, None])):
        close(value(ours, *given, axis=None), expected)
        assert ours(*given, axis=None, keepdims=True).shape == (1,) * max(v.ndim for v in given)
    close(scipy.stats.entropy(p[:, None], q[None], axis=None), stats.kl_div(p, q))
    with pytest.raises(ValueError, match=r"\(2, 5\) and \(5,\), raveled for axis=None, do not"):
        ours(np.ones((2, 5)), q, axis=None)


# --- NaN ---


@EVERY_PAIR
def test_omitted_entries_get_no_gradient(ours: Function) -> None:
    p = torch.tensor([[0.2, NAN, 0.3, 0.5], [NAN] * 4, [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    q = torch.tensor([0.4, 0.2, NAN, 0.4], dtype=torch.float64)
    kept = torch.tensor([True, False, False, True])
    inputs = p.requires_grad_(), q.requires_grad_()
    result = ours(*inputs, axis=-1, nan_policy="omit")
    assert result[1] == 0
    close(result[0].item(), ours(p[0, kept], q[kept]).item())
    dp, dq = torch.autograd.grad(result.sum(), inputs)
    assert dp.isfinite().all() and dq.isfinite().all()
    assert (dp[p.isnan() | q.isnan()] == 0).all() and (dq[2] == 0).all()
    (alone,) = torch.autograd.grad(ours(p[0, kept], q[kept]), p)
    close(dp[0].numpy(), alone[0].numpy())


@EVERY_PAIR
def test_nan_that_is_an_error(ours: Function) -> None:
    p, q = np.array([0.5, NAN, 0.5]), np.ones(3)
    for convert in (np.asarray, torch.tensor):
        with pytest.raises(ValueError, match=r"The input contains nan values: 1 in pk? of.*omit"):
            ours(convert(p), convert(q), nan_policy="raise")
        with pytest.raises(ValueError, match=r"The input contains nan values: 1 in qk? of.*omit"):
            ours(convert(q), convert(p), nan_policy="raise")
    assert ours(q, q, nan_policy="raise") == ours(q, q)
    # Where nothing can be raised the value is NaN.
    rows = torch.tensor(np.stack([q, p]))
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert compiled(rows[1], rows[1], nan_policy="raise").isnan()
    each = torch.func.vmap(lambda v: ours(v, v, nan_policy="raise"))(rows)
    assert each.isnan().tolist() == [False, True]


@EVERY_PAIR
def test_no_entries(ours: Function) -> None:
    """As in SciPy the sum of no terms is 0, and zeros are no distribution."""
    empty = np.ones((0, 2))
    for options in ({}, {"axis": (0, 1)}, {"axis": None}, {"nan_policy": "omit"}):
        assert (value(ours, empty, empty, **options) == 0).all()
        assert (value(stats.entropy, empty, **options) == 0).all()
    assert scipy.stats.entropy(empty).tolist() == [0, 0]
    assert value(ours, empty.T, empty.T).shape == (0,)
    assert value(stats.information_content, empty).shape == (0, 2)
    missing, zeros = np.array([NAN, NAN]), np.array([0.0, NAN])
    for of_missing in (value, lambda f, *v, **o: f(*v, **o)):
        assert of_missing(ours, missing, np.ones(2), nan_policy="omit") == 0
        assert of_missing(stats.entropy, missing, nan_policy="omit") == 0
        assert np.isnan(of_missing(ours, zeros, np.ones(2), nan_policy="omit"))
    assert scipy.stats.entropy(missing, nan_policy="omit") == 0
    assert np.isnan(scipy.stats.entropy(zeros, nan_policy="omit"))


# --- tensors without values, and derivatives, with these arguments ---


OPTIONS = [
    {"axis": (0, 2)},
    {"axis": (0, 2), "keepdims": True},
    {"axis": None, "keepdims": True},
    {"axis": 1, "nan_policy": "omit"},
    {"axis": (1, 0), "nan_policy": "omit", "keepdims": True, "base": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_compile(options: dict[str, Any]) -> None:
    """The functions have their arguments in common, and one check of them."""
    p, q = (torch.rand(2, 3, 2, dtype=torch.float64) + 0.1 for _ in range(2))
    torch._dynamo.reset()
    of = lambda p, q: stats.kl_div(p, q, **options)  # noqa: E731
    compiled = torch.compile(of, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(p, q), of(p, q))


@EVERY_PAIR
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_derivatives_and_vmap(ours: Function, options: dict[str, Any]) -> None:
    p, q = (torch.rand(2, 3, 2, dtype=torch.float64) + 0.1 for _ in range(2))
    of = lambda p, q: ours(p, q, **options)  # noqa: E731
    expected = of(p, q)
    each = torch.func.vmap(of)(torch.stack([p, q]), torch.stack([q, p]))
    torch.testing.assert_close(each, torch.stack([expected, of(q, p)]))
    inputs = p.requires_grad_(), q.requires_grad_()
    assert torch.autograd.gradcheck(of, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(of, inputs)


@EVERY_PAIR
@pytest.mark.parametrize("nan_policy", ["propagate", "omit", "raise"])
def test_fake_and_meta_tensors(ours: Function, nan_policy: str) -> None:
    options = {"axis": (0, -1), "nan_policy": nan_policy, "keepdims": True}
    p = torch.empty(2, 3, 4, device="meta")
    assert ours(p, p, **options).shape == (1, 3, 1)
    with FakeTensorMode():
        for p in (torch.rand(2, 3, 4), torch.ones(2, 3, 4, dtype=torch.int64)):
            assert ours(p, p, **options).shape == (1, 3, 1)
            content = stats.information_content(p, axis=None, nan_policy=nan_policy)
            assert content.shape == p.shape
        # Arrays have values also there, and give values.
        of_arrays = ours([1.0, 2.0], [3.0, 4.0], nan_policy=nan_policy)
    assert of_arrays == ours([1.0, 2.0], [3.0, 4.0])


def test_every_function_is_tested() -> None:
    names = {f.__name__ for f in FORMULAS} | {"information_content"}
    assert names == set(stats.__all__) and PAIRS.keys() == FORMULAS.keys()
