"""The CPU kernels without torch under AddressSanitizer, UBSan and ThreadSanitizer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from helpers.checkout import ROOT
from helpers.programs import FEW_LOSSES, build, run

SOURCES = [ROOT / "tests/sanitize_rows/main.cpp"]
KERNELS = ("rows_baseline.cpp", "memory.cpp", "named_indices.cpp")
SOURCES += [ROOT / "csrc/cpu" / name for name in KERNELS]

pytestmark = pytest.mark.cpu_only("its kernels are the CPU's")


@pytest.mark.slow
def test_addresses_and_undefined_behaviour(tmp_path: Path) -> None:
    """Every loss, target, dtype and skeleton, over odd sizes and rows with infinities and NaN."""
    result = run(build(tmp_path / "rows", SOURCES, "asan"))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
    checks, failures = map(int, re.findall(r"(\d+) checks, (\d+) failures", result.stdout)[0])
    assert checks > 1_000_000 and not failures


@pytest.mark.slow
def test_races_of_shared_columns(tmp_path: Path) -> None:
    """The segments of a row on three threads, which are the same for losses of a kind."""
    result = run(build(tmp_path / "rows", SOURCES, "tsan-quick", FEW_LOSSES), "shared")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
