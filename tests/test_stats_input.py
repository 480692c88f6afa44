"""What the functions of probability vectors take, what they return, and what they refuse."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from fastdiv import stats
from helpers.scipy_values import EVERY_PAIR, INF, NAN, PAIRS, Function, close

# --- what is given, and what is returned ---


@EVERY_PAIR
@pytest.mark.parametrize(
    ("given_dtype", "dtype"),
    [("f2", "f4"), ("f4", "f4"), ("f8", "f8"), (">f8", "f8"), ("i4", "f8"), ("u1", "f8")],
)
def test_dtypes_of_arrays(ours: Function, given_dtype: str, dtype: str) -> None:
    p, q = (np.array(v, dtype=given_dtype) for v in ([1, 2, 7], [2, 3, 5]))
    actual = ours(p, q)
    assert isinstance(actual, np.floating) and actual.dtype == np.dtype(dtype)
    expected = PAIRS[ours]([1, 2, 7], [2, 3, 5], base=None, axis=-1)
    close(actual, expected, rtol=3e-6 if dtype == "f4" else 1e-14)


@EVERY_PAIR
@pytest.mark.parametrize(
    ("given_dtype", "dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.int64, torch.float32),
        (torch.bool, torch.float32),
    ],
    ids=str,
)
def test_dtypes_of_tensors(ours: Function, given_dtype: torch.dtype, dtype: torch.dtype) -> None:
    p, q = (torch.tensor(v).to(given_dtype) for v in ([1, 2, 7], [2, 3, 5]))
    expected = PAIRS[ours](p.double().numpy(), q.double().numpy(), base=None, axis=-1)
    actual = ours(p, q)
    assert actual.dtype == dtype and actual.shape == ()
    close(actual.item(), expected, rtol=1e-6, atol=1e-7)
    if given_dtype.is_floating_point:
        p.requires_grad_()
        (dp,) = torch.autograd.grad(ours(p, q), p)
        assert dp.dtype == given_dtype and dp.isfinite().all()


def test_lists_and_strides() -> None:
    p, q = np.random.default_rng(0).random((2, 4, 6))
    expected = stats.kl_div(p, q, axis=0)
    assert isinstance(expected, np.ndarray) and expected.shape == (6,)
    read_only = p.copy()
    read_only.setflags(write=False)
    reversed_ = np.ascontiguousarray(p[:, ::-1])[:, ::-1]
    for same in (p.tolist(), np.asfortranarray(p), read_only, reversed_):
        np.testing.assert_array_equal(stats.kl_div(same, q, axis=0), expected)
    tensor = stats.kl_div(torch.tensor(p).T, torch.tensor(q).T, axis=-1)
    np.testing.assert_array_equal(tensor.numpy(), expected)
    assert stats.kl_div(np.ones((0, 3)), [1, 1, 1], axis=-1).shape == (0,)
    assert stats.entropy(p, q, axis=0).tolist() == expected.tolist()
    assert p.flags.writeable and (p > 0).all()  # and what was given is as it was


def test_scipy_is_not_needed() -> None:
    code = "import sys, fastdiv; fastdiv.stats.entropy([1, 2]); assert 'scipy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- bad input ---


TWO = [f for f in PAIRS if f is not stats.entropy]
PAIR_ERRORS: list[tuple[Any, Any, type[Exception], str]] = [
    ([1, 2], [1, 2, 3], ValueError, r"\(2,\) and \(3,\) do not broadcast"),
    ([[1, 2]], [[1], [2], [3]], IndexError, r"axis -3"),
    ([1, 2], torch.tensor([1, 2]), TypeError, "list and .* Tensor"),
    (torch.ones(2), np.ones(2), TypeError, "Tensor and .* ndarray"),
    (torch.ones(2), torch.ones(2, device="meta"), RuntimeError, "cpu.*meta|meta.*cpu"),
    ([0.5, 0.5], [1.5, -0.5], ValueError, r"probabilities, got -0.5.*softmax"),
]
ERRORS: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (["a", "b"], {}, TypeError, "real numbers.*<U1"),
    ([1j, 1], {}, TypeError, "real numbers.*complex128"),
    (np.array([None, 1]), {}, TypeError, "real numbers.*object"),
    (np.ma.masked_array([1, 2], [0, 1]), {}, TypeError, "MaskedArray"),
    (torch.ones(2, dtype=torch.complex64), {}, TypeError, "complex64"),
    (torch.ones(2).to(torch.float8_e5m2), {}, TypeError, "float8"),
    ([-0.1, 1.1], {}, ValueError, "probabilities, got -0.1.*softmax"),
    (torch.tensor([-0.5, 1.5]), {}, ValueError, "probabilities, got -0.5.*softmax"),
    (1.0, {}, ValueError, "dimension.*scalar"),
    ([1, 2], {"axis": 1}, IndexError, r"axis 1.*\(2,\)"),
    ([1, 2], {"axis": -2}, IndexError, r"axis -2.*\(2,\)"),
    ([[1, 2]], {"axis": (1, 2)}, IndexError, r"axis \(1, 2\).*\(1, 2\)"),
    ([[1, 2]], {"axis": (1, -1)}, ValueError, r"\(1, 2\) at most once, got \(1, -1\)"),
    ([1, 2], {"axis": ()}, ValueError, r"\(2,\).*got \(\)"),
    ([1, 2], {"axis": 0.5}, TypeError, "int, a tuple of ints or None, got 0.5"),
    ([1, 2], {"axis": (0, "1")}, TypeError, "got .0, '1'"),
    ([1, 2], {"nan_policy": "drop"}, ValueError, "propagate.*omit.*raise.*got 'drop'"),
    ([1, NAN], {"nan_policy": "raise"}, ValueError, r"nan values: 1 in pk? of shape \(2,\).*omit"),
    (torch.tensor([NAN, 1, NAN]), {"nan_policy": "raise"}, ValueError, r"2 in pk? .*\(3,\)"),
    ([NAN, -0.1, 1], {}, ValueError, "probabilities, got -0.1"),
    *[([1, 2], {"base": b}, ValueError, f"base.*{b}") for b in (0, -2, 1, INF, NAN)],
]


@pytest.mark.parametrize(("p", "q", "error", "says"), PAIR_ERRORS, ids=lambda v: str(v)[:30])
def test_bad_pairs(p: Any, q: Any, error: type[Exception], says: str) -> None:
    options = {"axis": -3} if error is IndexError else {}
    for ours in PAIRS:
        with pytest.raises(error, match=says):
            ours(p, q, **options)


@pytest.mark.parametrize(("p", "options", "error", "says"), ERRORS, ids=lambda v: str(v)[:30])
def test_bad_vectors(p: Any, options: dict[str, Any], error: type[Exception], says: str) -> None:
    for ours in (stats.entropy, stats.information_content):
        with pytest.raises(error, match=says):
            ours(p, **options)
    for ours in TWO:
        with pytest.raises(error, match=says):
            ours(p, p, **options)


def test_meta_tensors_have_no_values_to_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    for check in ("0", "1"):
        monkeypatch.setenv("FASTDIV_CHECK", check)
        assert stats.entropy(torch.ones(3, 2, device="meta"), axis=-1).shape == (3,)
