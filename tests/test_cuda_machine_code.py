"""What the compiler made of the CUDA kernels, read from the extension: no GPU is needed.

Registers decide how many threads share a multiprocessor, and so how much memory is in flight; local
memory and narrow accesses cost bandwidth.  Neither changes a result, so nothing else would tell.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import fastdiv._C as native
from helpers.checkout import ROOT
from helpers.programs import DIVERGENCE_POLICIES, POLICY_COUNT

needs_cuda_build = pytest.mark.skipif(
    not native.cuda_architectures, reason="built without nvcc, for CPU only"
)
ARCHITECTURES = native.cuda_architectures.split()
CUBINS = [a.removesuffix("+PTX") for a in ARCHITECTURES]
DTYPES = {"float": "f32", "double": "f64", "Half": "f16", "BFloat16": "bf16"}
KERNEL = re.compile(
    rf"(forward|backward|terms)_rows<(.*), ({'|'.join(DTYPES)})(?:, (true|false))?"
    r"(?:, (true|false))?>\("
)
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)")
pytestmark = pytest.mark.cpu_only("no GPU is used")


def tool(name: str, *arguments: str | Path, cwd: Path | None = None) -> str:
    """What a tool of the toolkit, or of the PyPI packages, prints."""
    packages = Path(sysconfig.get_path("purelib"), "nvidia").glob("cu*/bin")
    path = os.pathsep.join([*map(str, packages), os.environ["PATH"]])
    program = shutil.which(name, path=path)
    if program is None:
        pytest.skip(f"needs {name}")
    command = [program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd).stdout


def demangled(names: str) -> str:
    command = ["c++filt"]
    plain = subprocess.run(command, input=names, capture_output=True, text=True, check=True)
    return re.sub(r"fastdiv::|cuda::", "", plain.stdout)


class Kernel(NamedTuple):
    """One entry point: forward_rows<policy, dtype, softcapped, with gradient> and the like."""

    architecture: str
    skeleton: str
    policy: str
    dtype: str
    capped: bool
    gradient: bool

    @classmethod
    def parse(cls, architecture: str, line: str) -> Kernel | None:
        match = KERNEL.search(line)
        if match is None:
            return None
        skeleton, policy, dtype, capped, gradient = match.groups()
        return cls(
            architecture, skeleton, policy, DTYPES[dtype], capped == "true", gradient == "true"
        )

    @property
    def divergence(self) -> bool:
        return self.policy.split("<")[0] in DIVERGENCE_POLICIES.values()

    @property
    def has_terms(self) -> bool:
        return self.divergence and not self.policy.startswith("AlphaDiv")

    @property
    def registers(self) -> int:
        """The most that leave room for the blocks of 256 threads that rows.cuh counts on."""
        if self.dtype == "f64":
            return 255
        # One that walks a row twice for certain, or keeps a third log-sum-exp.
        twice = self.divergence and self.policy.split("<")[0] not in ("KlDiv", "ReverseKlDiv")
        if self.capped or "Stats" in self.policy or twice or (self.divergence and self.gradient):
            return 128
        return 80 if self.divergence or "true" in self.policy else 64


@functools.cache
def resources() -> dict[Kernel, dict[str, int]]:
    """REG, STACK, LOCAL and SHARED of every kernel."""
    found, architecture = {}, ""
    lines = iter(demangled(tool("cuobjdump", "-res-usage", native.__file__)).splitlines())
    for line in lines:
        if match := re.match(r"arch = sm_(\w+)", line):
            architecture = match[1]
        if "Function " in line:
            kernel = Kernel.parse(architecture, line)
            numbers = re.findall(r"([A-Z]+):(\d+)", next(lines))
            if kernel is not None:
                found[kernel] = {key: int(value) for key, value in numbers}
    return found


def instructions(architecture: str, folder: Path) -> dict[Kernel, Counter[str]]:
    """How often each kernel has each.

    Of all dtypes for the newest architecture, which takes half a minute; for the others of one.
    What is read at a time depends on the dtype in the source, not on the architecture.
    """
    tool("cuobjdump", "-xelf", "all", "-arch", f"sm_{architecture}", native.__file__, cwd=folder)
    counts = {}
    for cubin in folder.glob("*.cubin"):
        if architecture != CUBINS[-1] and b"BFloat16" not in cubin.read_bytes():
            continue
        functions = tool("nvdisasm", "-c", cubin).split("\n.text.")[1:]
        names = demangled("\n".join(f[: f.index(":")] for f in functions)).splitlines()
        for name, code in zip(names, functions, strict=True):
            if kernel := Kernel.parse(architecture, name):
                counts[kernel] = Counter(INSTRUCTION.findall(code))
    return counts


def count(code: Counter[str], prefix: str) -> int:
    return sum(n for name, n in code.items() if name == prefix or name.startswith(prefix + "."))


@needs_cuda_build
def test_every_kernel_is_there_for_every_architecture() -> None:
    listing = tool("cuobjdump", "-lelf", "-lptx", native.__file__)
    assert set(re.findall(r"sm_(\d+)\.cubin", listing)) == set(CUBINS)
    ptx = {a.removesuffix("+PTX") for a in ARCHITECTURES if a.endswith("+PTX")}
    assert set(re.findall(r"sm_(\d+)\.ptx", listing)) == ptx
    for architecture in CUBINS:
        for dtype in DTYPES.values():
            kernels = [k for k in resources() if (k.architecture, k.dtype) == (architecture, dtype)]
            assert len({k.policy for k in kernels}) == POLICY_COUNT
            plain = [k for k in kernels if not k.capped and "Stats" not in k.policy]
            terms = [k for k in plain if k.skeleton == "terms"]
            assert len(plain) == 3 * len({k.policy for k in plain}) + len(terms)
            assert len(terms) == sum(k.has_terms for k in plain if k.skeleton == "backward")


@needs_cuda_build
def test_registers_and_local_memory() -> None:
    too_many = {
        kernel: used
        for kernel, used in resources().items()
        if used["REG"] > kernel.registers or used["STACK"] or used["LOCAL"]
    }
    assert not too_many
    assert len(resources()) > 100 * len(CUBINS)


@needs_cuda_build
def test_launches_leave_room_for_static_shared_memory() -> None:
    """A launch asks for all shared memory of a block, less kStaticShared."""
    (static,) = re.findall(
        r"kStaticShared = (\d+);", (ROOT / "csrc/cuda/launch_shapes.h").read_text()
    )
    reserved = 1024  # by CUDA itself, for every block; cuobjdump counts it from sm_90 on
    most = {kernel: used["SHARED"] for kernel, used in resources().items()}
    assert not {k: v for k, v in most.items() if v > int(static) + reserved}
    assert max(most.values()) > 4096  # SHARED is what the kernels declare


@needs_cuda_build
@pytest.mark.slow
@pytest.mark.parametrize("architecture", CUBINS)
def test_memory_is_accessed_16_bytes_at_a_time(architecture: str, tmp_path: Path) -> None:
    kernels = instructions(architecture, tmp_path)
    dtypes = set(DTYPES.values()) if architecture == CUBINS[-1] else {"bf16"}
    assert {k.dtype for k in kernels} == dtypes
    assert kernels.keys() == {
        k for k in resources() if k.architecture == architecture and k.dtype in dtypes
    }
    for kernel, code in kernels.items():
        rows = 2 if kernel.divergence or "(Target)3" in kernel.policy else 1
        # One of an aligned row, two of one that is not (of which double needs half of the second).
        loads = rows if kernel.dtype == "f64" else 3 * rows
        assert count(code, "LDG.E.128") + count(code, "LD.E.128") >= loads, kernel
        if kernel.gradient or kernel.skeleton == "backward":
            assert count(code, "STG.E.128") + count(code, "ST.E.128") >= rows, kernel
        if kernel.gradient or (kernel.skeleton == "forward" and kernel.divergence):
            assert count(code, "STS.128") + count(code, "ST.E.128") >= rows, kernel  # the cache
        assert count(code, "LDL") == count(code, "STL") == 0, kernel
        if kernel.skeleton == "forward":
            assert (count(code, "UCGABAR_WAIT") > 0) == (int(architecture) >= 90), kernel


@needs_cuda_build
def test_every_op_has_a_kernel_on_both_devices() -> None:
    """And a fake, which opcheck compares with the CPU's kernel."""
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastdiv::_row_")]
    assert len(names) == 6
    for name in names:
        for key in ("CPU", "CUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), (name, key)


def test_only_what_every_torch_has_is_used() -> None:
    """Symbols of torch's stable interface, of Python, C and C++; no CUDA library, no driver."""
    lines = subprocess.run(
        ["nm", "-D", "--undefined-only", native.__file__],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    symbols = {line.split()[-1].split("@")[0] for line in lines}
    torch_side = {s for s in symbols if "torch" in s or "aoti" in s}
    assert torch_side and all(re.match(r"(aoti_torch|torch)_\w+$", s) for s in torch_side)
    assert not {s for s in symbols if re.match(r"cu[A-Z]|cuda", s) or "c10" in s or "_ZN2at" in s}
    needed = subprocess.run(["objdump", "-p", native.__file__], capture_output=True, text=True)
    assert "cudart" not in needed.stdout


@needs_cuda_build
def test_without_a_gpu_the_reason_is_the_drivers() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "CUDA" in native.gpu_trouble(0)


def test_without_a_toolkit_the_build_says_so() -> None:
    nowhere = (
        "import runpy, shutil, sys; shutil.which = lambda *_, **__: None; "
        "sys.argv = ['setup.py', '--name']; runpy.run_path('setup.py', run_name='__main__')"
    )
    command = [sys.executable, "-c", nowhere]
    environment = os.environ | {"PYTHONPATH": "."}  # for build_backend.py
    environment.pop("FASTDIV_CUDA_ARCHS", None)
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "building for CPU only" in result.stdout, result.stderr
