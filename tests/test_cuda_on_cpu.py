"""tests/cuda_on_cpu runs CUDA kernels on the CPU: right results, and every fault reported."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from helpers import programs
from helpers.programs import SHIM, needs_fibers, run

MODES = ["plain", "asan", "tsan"]
ORDERS = ["forward", "reverse", "lockstep", "1", "2"]
LANDINGS = ["late", "reverse", "eager", "1", "2"]  # of asynchronous copies
# The sanitizers see each order of threads with one of the copies.
PAIRS = [("forward", "late"), ("reverse", "eager"), ("lockstep", "1"), ("1", "reverse"), ("2", "2")]

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
    ("overlapping-masks", "plain", "with mask 0000ffff, but .* with mask 0000ff80"),
    ("missing-syncwarp", "tsan", "data race"),
    ("shared-not-allowed", "plain", r"unless allow_dynamic_shared\(\) is called before it"),
    ("shared-above-allowed", "plain", "that is more than was allowed"),
    ("shared-above-gpu", "plain", "the GPU has less than the static bytes and those allowed"),
    ("shared-by-a-byte", "plain", r"unless allow_dynamic_shared\(\) is called before it"),
]

# The same for asynchronous copies, under every order of theirs.
ASYNC_FAULTS = [
    # A ring of slots that bulk copies fill.
    ("unawaited-stage", "tsan", "data race"),
    ("early-refill", "tsan", "data race|threads wait at barrier_wait"),
    ("missing-fence", "tsan", "data race"),
    ("too-few-expected", "tsan", "data race"),
    ("init-without-barrier", "tsan", "data race|barrier_wait: the barrier is not initialised"),
    ("missing-init-fence", "plain", "copy_bulk: barrier_init without barrier_init_fence"),
    ("wrong-parity", "plain", "deadlock\n.*threads wait at barrier_wait"),
    ("misaligned-copy", "plain", "copy_bulk: .* is not aligned to 16 bytes"),
    ("copy-of-no-size", "plain", "copy_bulk of 24 bytes"),
    ("copy-past-global", "asan", "heap-buffer-overflow"),
    ("copy-past-shared", "asan", "use-after-poison"),
    ("copy-past-shared", "plain", "copy_bulk: 512 bytes at .* are not in an array of the block"),
    ("bulk-copy-on-ampere", "plain", "needs sm_90"),
    # Copies of 16 bytes.
    ("unawaited-copy-16", "tsan", "data race"),
    ("copy-16-of-another", "tsan", "data race"),
    ("tile-without-barrier", "tsan", "data race"),
    ("misaligned-copy-16", "plain", "copy_16: .* is not aligned to 16 bytes"),
    ("copy-16-past-global", "asan", "heap-buffer-overflow"),
    ("exit-before-copies", "plain", "the thread exits with copy_16 under way"),
    # Barriers.
    ("no-init", "plain", "barrier_expect: the barrier is not initialised"),
    ("second-init", "plain", "barrier_init of a barrier that is in use"),
    ("barrier-overwritten", "plain", "copy_bulk: the barrier is not initialised"),
    ("too-many-arrivals", "plain", "all 1 arrivals of the phase have come before"),
    ("too-many-bytes", "plain", "expects 1048576 bytes, more than 1048575"),
    ("overlapping-copies", "tsan", "data race|an earlier copy_bulk under way writes"),
    ("exit-before-bulk-copy", "plain", "the block exits"),
    # Clusters.
    ("cluster-on-ampere", "plain", "impossible before sm_90: launch"),
    ("cluster-too-large", "plain", "impossible launch .* clusters of 16"),
    ("missing-init-fence-of-peer", "plain", "which has not called barrier_init_fence"),
    ("missing-cluster-wait", "plain", "without cluster_wait|has not initialised the barrier"),
    ("second-cluster-arrive", "plain", "cluster_arrive without a cluster_wait"),
    ("exit-within-cluster-barrier", "plain", "exits between cluster_arrive and cluster_wait"),
    ("missing-relaxed-leave", "tsan", "data race"),
    ("early-send", "tsan", "data race"),
    ("unawaited-words", "tsan", "data race"),
    ("relaxed-read", "tsan", "data race"),
    ("early-leaver", "plain", "the block exits"),
]

pytestmark = [needs_fibers, pytest.mark.cpu_only("runs without torch")]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The path of the self-test in a mode, which is compiled when first asked for."""
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    strict = [f"-I{SHIM}", "-Wall", "-Wextra", "-Werror"]

    def path_of(mode: str) -> Path:
        program = folder / mode
        sources = sorted(SHIM.glob("selftest*.cpp"))
        return program if program.exists() else programs.build(program, sources, mode, strict)

    return path_of


def run_in_order(
    program: Path, order: str, landing: str, *fault: str
) -> subprocess.CompletedProcess[str]:
    environment = {"FASTDIV_SHIM_ORDER": order, "FASTDIV_SHIM_COPIES": landing}
    # The first report is enough.
    environment["TSAN_OPTIONS"] = "atexit_sleep_ms=0 halt_on_error=1"
    return run(program, *fault, **environment)


@pytest.mark.parametrize("mode", MODES)
def test_correct_kernels(build: Callable[[str], Path], mode: str) -> None:
    for order, landing in product(ORDERS, LANDINGS) if mode == "plain" else PAIRS:
        result = run_in_order(build(mode), order, landing)
        assert result.returncode == 0, result.stdout + result.stderr[-5000:]
        assert result.stdout.endswith("4035 checks, 0 failures\n")
        assert not result.stderr


def check_report(build: Callable[[str], Path], planted: tuple[str, str, str], *order: str) -> None:
    fault, mode, report = planted
    result = run_in_order(build(mode), *order, fault)
    assert result.returncode != 0
    assert re.search(report, result.stderr), result.stderr[-5000:]
    if mode != "plain" and "Sanitizer" in result.stderr:
        assert re.search(r"selftest\w*\.cpp:", result.stderr)  # where it is


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("planted", FAULTS, ids="-".join)
def test_faults_are_reported(
    build: Callable[[str], Path], planted: tuple[str, str, str], order: str
) -> None:
    check_report(build, planted, order, "late")


@pytest.mark.parametrize("planted", ASYNC_FAULTS, ids=lambda planted: "-".join(planted[:2]))
def test_faults_of_copies_are_reported(
    build: Callable[[str], Path], planted: tuple[str, str, str]
) -> None:
    for order in PAIRS if planted[1] == "plain" else PAIRS[:3]:
        check_report(build, planted, *order)


def test_who_waits_where(build: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTDIV_SHIM_ORDER", raising=False)
    result = run(build("plain"), "divergent-barrier")
    assert result.stderr.splitlines() == [
        "cuda_on_cpu: deadlock",
        "  block 0: 4 threads have exited: 60-63",
        "  block 0: 36 threads wait at __syncthreads: 0-7, 32-59",
        "  block 0: 24 threads wait at __syncwarp: 8-31",
    ]


def test_what_a_barrier_lacks(build: Callable[[str], Path]) -> None:
    result = run_in_order(build("plain"), "forward", "late", "wrong-parity")
    assert result.stderr.splitlines() == [
        "cuda_on_cpu: deadlock",
        "  block 0: 64 threads wait at barrier_wait: 0-63",
        "  block 0: phase 1 of a barrier lacks 1 arrivals and 0 bytes",
    ]


@pytest.mark.parametrize("variable", ["FASTDIV_SHIM_ORDER", "FASTDIV_SHIM_COPIES"])
def test_unknown_order(build: Callable[[str], Path], variable: str) -> None:
    result = run(build("plain"), **{variable: "sideways"})
    assert result.returncode != 0
    assert f"{variable} is 'sideways'" in result.stderr
