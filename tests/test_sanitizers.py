"""The CPU kernels without torch under AddressSanitizer, UBSan and ThreadSanitizer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ["tests/sanitize_rows.cpp", "csrc/cpu/rows_baseline.cpp"]
# As setup.py builds, but for the level of optimisation.
FLAGS = "-std=c++17 -O1 -g1 -fopenmp-simd -fno-math-errno -fno-trapping-math -pthread".split()
KINDS = {
    "asan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-fsanitize=thread"],
}


def build(kind: str, csrc: Path, target: Path) -> Path:
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        pytest.skip(f"needs {compiler}")
    works = [compiler, *KINDS[kind], "-x", "c++", "-", "-o", target]
    if subprocess.run(works, input=b"int main() {}", capture_output=True).returncode:
        pytest.skip(f"{compiler} has no {kind}")
    sources = [str(csrc.parent / s) for s in SOURCES]
    subprocess.run(
        [compiler, *FLAGS, *KINDS[kind], f"-I{csrc}", *sources, "-o", target], check=True
    )
    return target


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # TSan does not know the address space layouts of newer kernels.
    fixed = [shutil.which("setarch"), "-R"] if shutil.which("setarch") else []
    return subprocess.run(
        [*fixed, program, *arguments], capture_output=True, text=True, timeout=500
    )


@pytest.mark.slow
def test_addresses_and_undefined_behaviour(tmp_path: Path) -> None:
    """Every loss, target, dtype and skeleton, over odd sizes and rows with infinities and NaN."""
    result = run(build("asan", ROOT / "csrc", tmp_path / "rows"))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
    checks, failures = map(int, re.findall(r"(\d+) checks, (\d+) failures", result.stdout)[0])
    assert checks > 1_000_000 and not failures


@pytest.mark.slow
def test_races_of_shared_columns(tmp_path: Path) -> None:
    """The segments of a row on three threads."""
    result = run(build("tsan", ROOT / "csrc", tmp_path / "rows"), "split")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
