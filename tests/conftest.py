"""Fixtures that run a test on every instruction set, and restore what a test changes."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch

import fastdiv._C as native

hypothesis.settings.register_profile("fastdiv", deadline=None, derandomize=True)
hypothesis.settings.load_profile("fastdiv")


@pytest.fixture(params=native.cpu_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this machine runs, forced."""
    before = native.cpu_isa()
    assert native.set_cpu_isa(request.param)
    yield request.param
    native.set_cpu_isa(before)


@pytest.fixture(autouse=True)
def fixed_seed_and_threads() -> Iterator[None]:
    """The same random numbers for every test; a changed thread count does not leak."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
