"""C++ programs of the tests: how they are compiled, sanitized and run."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from helpers.checkout import ROOT

SHIM = ROOT / "tests/cuda_on_cpu"
# As setup.py builds, but for the level of optimisation.
FLAGS = ["-std=c++17", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-fPIC"]
# -O0 where many kernels are compiled: with sanitizers that takes a quarter of the time.
MODES = {
    "plain": ["-O1", "-g0"],
    "asan": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-O1", "-g1", "-fsanitize=thread"],
    "asan-quick": ["-O0", "-g1", "-fsanitize=address,alignment", "-fno-sanitize-recover=all"],
    "tsan-quick": ["-O0", "-g1", "-fsanitize=thread"],
}
# The CUDA kernels as C++.
CUDA_FLAGS = ["-DFD_CUDA_ON_CPU", "-fno-strict-aliasing", f"-I{SHIM}"]
CUDA_SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
# A loss of each kind, where the others would show the same: a third of the time to compile.
FEW_LOSSES = ["-include", f"{ROOT / 'tests/few_losses.h'}"]

REGISTRY = (ROOT / "csrc/losses/registry.h").read_text()


def policies_of(table: str) -> dict[str, str]:
    """The policy of every loss of a table of the registry; losses may share one."""
    entries = REGISTRY.split(f"#define {table}(X)")[1].split("\n\n")[0]
    return dict(re.findall(r"X\((\w+), ([^)]*)\)", entries))


DIVERGENCE_POLICIES = policies_of("FD_DIVERGENCES")
POLICY_COUNT = len(set(policies_of("FD_ROW_LOSSES").values())) + 3 * len(
    set(DIVERGENCE_POLICIES.values())
)

needs_fibers = pytest.mark.skipif(
    platform.machine() != "x86_64" or platform.system() != "Linux",
    reason="the fibers of cuda_on_cpu are written for x86-64 Linux",
)


def compiler_for(mode: str, folder: Path) -> str:
    """The C++ compiler; skips the test where it is missing or lacks the sanitizer."""
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        pytest.skip(f"needs {compiler}")
    works = [compiler, *MODES[mode], "-x", "c++", "-", "-o", folder / "works"]
    if subprocess.run(works, input=b"int main() {}", capture_output=True).returncode:
        pytest.skip(f"{compiler} has no {mode}")
    return compiler


def compile_objects(
    folder: Path, sources: Sequence[Path], mode: str, flags: Sequence[str] = ()
) -> list[Path]:
    """Compiles the sources next to each other."""
    compiler = compiler_for(mode, folder)

    def compile_one(source: Path) -> Path:
        out = folder / f"{source.name}.o"
        command = [compiler, *FLAGS, *MODES[mode], *flags, f"-I{ROOT / 'csrc'}"]
        subprocess.run([*command, "-x", "c++", "-c", source, "-o", out], check=True)
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))


def build(
    target: Path,
    sources: Sequence[Path],
    mode: str,
    flags: Sequence[str] = (),
    link: Sequence[str | Path] = (),
) -> Path:
    """Compiles the sources, and links them with what there is already."""
    compiler = compiler_for(mode, target.parent)
    objects = compile_objects(target.parent, sources, mode, flags)
    subprocess.run([compiler, *MODES[mode], "-pthread", *objects, *link, "-o", target], check=True)
    return target


def build_extension(target: Path, sources: Sequence[Path], objects: Sequence[Path]) -> Path:
    """The sources and objects as a module fastdiv._C."""
    from torch.utils import cpp_extension

    folders = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    libraries = cpp_extension.library_paths()
    defines = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_EXTENSION_NAME=_C"]
    return build(
        target,
        sources,
        "plain",
        [*CUDA_FLAGS, "-fvisibility=hidden", *defines, *(f"-I{f}" for f in folders)],
        [
            *objects,
            *("-shared", *(f"-L{f}" for f in libraries), *(f"-Wl,-rpath,{f}" for f in libraries)),
            *("-ltorch", "-ltorch_cpu", "-lc10", "-ltorch_python"),
        ],
    )


def run(program: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # TSan does not know the address space layouts of newer kernels, and waits a second at the end.
    fixed = [shutil.which("setarch"), "-R"] if shutil.which("setarch") else []
    return subprocess.run(
        [*fixed, program, *arguments],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"TSAN_OPTIONS": "atexit_sleep_ms=0"} | environment,
    )
