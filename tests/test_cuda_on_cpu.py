"""tests/cuda_on_cpu runs CUDA kernels on the CPU: right results, and every fault reported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import programs
from helpers.programs import SHIM, needs_fibers, run

MODES = ["plain", "asan", "tsan"]
ORDERS = ["forward", "reverse", "lockstep", "1", "2"]

# What must be reported under every order.  Other modes may see wrong results, or none.
FAULTS = [
    ("missing-barrier", "tsan", "data race"),
    ("missing-second-barrier", "tsan", "data race"),
    ("missing-last-cluster-sync", "tsan", "data race"),
    ("missing-last-cluster-sync", "asan", "use-after-poison"),
    ("static-overflow", "asan", "use-after-poison"),
    ("dynamic-overflow", "asan", "use-after-poison"),
    ("global-overflow", "asan", "heap-buffer-overflow"),
    ("misaligned-load", "asan", "misaligned address"),
    ("foreign-mask", "plain", "__shfl_sync with mask 000000ff, which lacks the lane"),
    ("exited-lane", "plain", "which does not exist or has exited"),
    ("divergent-barrier", "plain", "cuda_on_cpu: deadlock"),
    ("shared-not-allowed", "plain", "unless allow_dynamic_shared() is called before it"),
    ("shared-above-allowed", "plain", "that is more than was allowed"),
    ("shared-above-gpu", "plain", "the GPU has less than the static bytes and those allowed"),
    ("shared-by-a-byte", "plain", "unless allow_dynamic_shared() is called before it"),
]

pytestmark = [needs_fibers, pytest.mark.cpu_only("runs without torch")]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The path of the self-test in a mode, which is compiled when first asked for."""
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    strict = [f"-I{SHIM}", "-Wall", "-Wextra", "-Werror"]

    def path_of(mode: str) -> Path:
        program = folder / mode
        sources = [SHIM / "selftest.cpp"]
        return program if program.exists() else programs.build(program, sources, mode, strict)

    return path_of


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mode", MODES)
def test_correct_kernels(
    build: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, mode: str, order: str
) -> None:
    monkeypatch.setenv("FASTDIV_SHIM_ORDER", order)
    result = run(build(mode))
    assert result.returncode == 0, result.stdout + result.stderr[-5000:]
    assert result.stdout.endswith("1867 checks, 0 failures\n")
    assert not result.stderr


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fault, mode, report", FAULTS)
def test_faults_are_reported(
    build: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    mode: str,
    report: str,
    order: str,
) -> None:
    monkeypatch.setenv("FASTDIV_SHIM_ORDER", order)
    result = run(build(mode), fault)
    assert result.returncode != 0
    assert report in result.stderr
    if mode != "plain":
        assert "selftest.cpp:" in result.stderr  # where it is


def test_who_waits_where(build: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTDIV_SHIM_ORDER", raising=False)
    result = run(build("plain"), "divergent-barrier")
    assert result.stderr.splitlines() == [
        "cuda_on_cpu: deadlock",
        "  block 0: 4 threads have exited: 60-63",
        "  block 0: 36 threads wait at __syncthreads: 0-7, 32-59",
        "  block 0: 24 threads wait at __syncwarp: 8-31",
    ]


def test_unknown_order(build: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDIV_SHIM_ORDER", "sideways")
    result = run(build("plain"))
    assert result.returncode != 0
    assert "FASTDIV_SHIM_ORDER is 'sideways'" in result.stderr
