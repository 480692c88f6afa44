"""The CUDA kernels, run on the CPU: sources and launch shapes as on a GPU, threads as fibers.

First they run without torch, in exact memory, against plain loops in double.  That covers every
loss, dtype and skeleton, several orders of the threads and of asynchronous copies, GPUs with and
without clusters, and rows that fit shared memory or do not.  AddressSanitizer and ThreadSanitizer
watch; the latter finds missing barriers.  Then the suite itself runs in a copy of the package whose
CPU tensors go to the CUDA ops.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import fastdiv
from helpers.checkout import ROOT
from helpers.programs import (
    CUDA_FLAGS,
    CUDA_SOURCES,
    FEW_LOSSES,
    SHIM,
    build,
    build_extension,
    compile_objects,
    needs_fibers,
    run,
)

pytestmark = [needs_fibers, pytest.mark.slow, pytest.mark.cpu_only("no GPU is used")]
PROGRAM = ROOT / "tests/sanitize_rows/main.cpp"
NO_CLUSTERS = {"FASTDIV_SHIM_ARCHITECTURE": "80"}
# One block has the whole row, so more stages of it than slots.
LONG_SLICES = {"FASTDIV_SHIM_CLUSTER": "1"}

ROWS = {s.stem.removeprefix("rows_"): s for s in CUDA_SOURCES if s.stem.startswith("rows_")}
# A program that looks at the kernels of float; without those of another dtype it skips them.
OF_FLOAT = [PROGRAM, ROWS["f32"], *(s for s in CUDA_SOURCES if s not in ROWS.values())]


def check(result: subprocess.CompletedProcess[str], least: int) -> None:
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
    checks, failures = map(int, re.findall(r"(\d+) checks, (\d+) failures", result.stdout)[0])
    assert checks > least and not failures


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The kernels, compiled."""
    folder = tmp_path_factory.mktemp("kernels")
    return compile_objects(folder, CUDA_SOURCES, "plain", [*CUDA_FLAGS, "-fvisibility=hidden"])


def test_against_plain_loops(tmp_path: Path, kernels: list[Path]) -> None:
    """Every order finds another kind of missing barrier, whatever the dtype."""
    program = build(tmp_path / "rows", [PROGRAM], "plain", CUDA_FLAGS, kernels)
    check(run(program, FASTDIV_SHIM_ORDER="forward"), 1_000_000)
    for order, dtype, gpu in (
        ("reverse", "f64", NO_CLUSTERS),
        ("lockstep", "f32", LONG_SLICES | {"FASTDIV_SHIM_COPIES": "1"}),
        ("1", "bf16", NO_CLUSTERS),
    ):
        check(run(program, dtype, FASTDIV_SHIM_ORDER=order, **gpu), 250_000)


def test_addresses(tmp_path: Path) -> None:
    """Nothing beside a row is read or written, and no vector access is misaligned.

    Every loss in float; a loss of each kind in dtypes of which a vector holds more or fewer.
    """
    flags = [*CUDA_FLAGS, *FEW_LOSSES]
    few = compile_objects(tmp_path, [ROWS["f64"], ROWS["bf16"]], "asan-quick", flags)
    program = build(tmp_path / "rows", OF_FLOAT, "asan-quick", CUDA_FLAGS, few)
    check(run(program, **LONG_SLICES), 1_000_000)


def test_races(tmp_path: Path) -> None:
    """What threads share is the same for all dtypes, and for the losses of a kind."""
    program = build(tmp_path / "rows", OF_FLOAT, "tsan-quick", [*CUDA_FLAGS, *FEW_LOSSES])
    for gpu in ({}, LONG_SLICES, NO_CLUSTERS):
        check(run(program, "shared", **gpu), 50)


# What a kernel has to do with: values, all gradients, every alignment, rows that do not count.
# (Not those about threads and many rows, of which a fiber has nothing to tell, nor the reference.)
SUITE = [
    "accuracy",
    "edge_rows",
    "dead_rows",
    "layout",
    "in_place_gradients",
    "determinism",
    "ops",
    "terms",
    "log_prob",
    "token_weight",
]
# An index out of range raises on a CPU only.
ELSEWHERE = " and ".join(
    f"not {name}"
    for name in ("scalar_reductions", "test_threads", "split_columns", "reference", "remembered")
)


def test_suite(tmp_path: Path, kernels: list[Path]) -> None:
    """The tests of the library, with the CUDA ops in place of the CPU's."""
    shutil.copytree(ROOT / "tests", tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "csrc/losses", tmp_path / "csrc/losses")  # the registry
    package = tmp_path / "fastdiv"
    installed = Path(fastdiv.__file__).parent
    shutil.copytree(installed, package, ignore=shutil.ignore_patterns("*.so"))
    torch_side = [ROOT / "csrc/ops/cuda.cpp", ROOT / "csrc/ops/schema.cpp", SHIM / "module.cpp"]
    module = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    build_extension(package / module, torch_side, kernels)
    tests = [f"tests/test_{name}.py" for name in SUITE]
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-k", ELSEWHERE, *tests]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) > 1000
