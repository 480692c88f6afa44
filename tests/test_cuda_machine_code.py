"""What the compiler made of the CUDA kernels, read from the extension: no GPU is needed.

Registers decide how many threads share a multiprocessor, and so how much memory is in flight; local
memory and narrow accesses cost bandwidth.  Neither changes a result, so nothing else would tell.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch

import fastdiv._C as native
from helpers import cuda_binary
from helpers.checkout import ROOT
from helpers.cuda_binary import DTYPES, RESERVED_SHARED, Kernel, listings, tool
from helpers.machine_code import parse_blocks
from helpers.programs import POLICY_COUNT

needs_cuda_build = pytest.mark.skipif(
    not native.cuda_architectures, reason="built without nvcc, for CPU only"
)
ARCHITECTURES = native.cuda_architectures.split()
CUBINS = [a.removesuffix("+PTX") for a in ARCHITECTURES]
pytestmark = pytest.mark.cpu_only("no GPU is used")


def has_rest(kernel: Kernel) -> bool:
    """Whether it computes log-probabilities of named classes, and a number about the others."""
    return kernel.policy.startswith("NamedLogProbs") and "true" in kernel.policy


def most_registers(kernel: Kernel) -> int:
    """The most that leave room for the blocks that rows.cuh counts on."""
    slow = kernel.capped or "Stats" in kernel.policy
    if kernel.skeleton != "backward":  # blocks of 128 threads: three, four or six
        if kernel.rows == 2:
            return 168
        return 128 if slow or kernel.dtype == "f64" or has_rest(kernel) else 80
    if kernel.dtype == "f64":
        return 255
    # Blocks of 256 threads: two, three or four.
    name = kernel.policy.split("<")[0]
    twice = kernel.divergence and name not in ("KlDiv", "ReverseKlDiv")
    single = kernel.divergence and kernel.dtype == "f32"
    weights = name == "CrossEntropyOf" and "true" in kernel.policy
    if slow or twice or single or weights:
        return 128
    return 80 if kernel.divergence or name == "NamedLogProbs" else 64


def resources() -> dict[Kernel, dict[str, int]]:
    return cuda_binary.resources(native.__file__)


def instructions(architecture: str) -> dict[Kernel, Counter[str]]:
    """How often each kernel has each.

    Of all dtypes for the newest architecture, which takes half a minute; for the others of one.
    What is read at a time depends on the dtype in the source, not on the architecture.
    """
    newest = architecture == CUBINS[-1]
    listed = listings(
        native.__file__,
        lambda k: k.architecture == architecture and (newest or k.dtype == "bf16"),
    )
    return {
        kernel: Counter(i.name for block in parse_blocks(text)[0] for i in block)
        for kernel, text in listed
    }


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
            named = {k.policy for k in plain if k.policy.startswith("NamedLogProbs")}
            # Those of named classes have no forward with a gradient.
            assert len(plain) == 3 * len({k.policy for k in plain}) - len(named) + len(terms)
            assert len(terms) == sum(k.has_terms for k in plain if k.skeleton == "backward")


@needs_cuda_build
def test_registers_and_local_memory() -> None:
    too_many = {
        kernel: used
        for kernel, used in resources().items()
        if used["REG"] > most_registers(kernel) or used["STACK"] or used["LOCAL"]
    }
    assert not too_many
    assert len(resources()) > 100 * len(CUBINS)


@needs_cuda_build
def test_launches_leave_room_for_static_shared_memory() -> None:
    """A launch asks for all shared memory of a block, less kStaticShared."""
    (static,) = re.findall(
        r"kStaticShared = (\d+);", (ROOT / "csrc/cuda/launch_shapes.h").read_text()
    )
    most = {kernel: used["SHARED"] for kernel, used in resources().items()}
    assert not {k: v for k, v in most.items() if v > int(static) + RESERVED_SHARED}
    assert max(most.values()) > 4096  # SHARED is what the kernels declare


@needs_cuda_build
@pytest.mark.slow
@pytest.mark.parametrize("architecture", CUBINS)
def test_memory_is_accessed_16_bytes_at_a_time(architecture: str) -> None:
    kernels = instructions(architecture)
    dtypes = set(DTYPES.values()) if architecture == CUBINS[-1] else {"bf16"}
    assert {k.dtype for k in kernels} == dtypes
    assert kernels.keys() == {
        k for k in resources() if k.architecture == architecture and k.dtype in dtypes
    }
    bulk = int(architecture) >= 90
    for kernel, code in kernels.items():
        rows = kernel.rows
        # One of an aligned row, two of one that is not (of which double needs half of the second).
        loads = rows if kernel.dtype == "f64" else 3 * rows
        if kernel.skeleton == "backward":
            assert count(code, "LDG.E.128") + count(code, "LD.E.128") >= loads, kernel
        else:  # through shared memory, by copies
            assert count(code, "LDS.128") >= loads, kernel
            assert count(code, "LDGSTS.E.BYPASS.128") >= rows, kernel
            assert (count(code, "UBLKCP") >= rows) == bulk, kernel
        if kernel.gradient or kernel.skeleton == "backward":
            assert count(code, "STG.E.128") + count(code, "ST.E.128") >= rows, kernel
        assert count(code, "LDL") == count(code, "STL") == 0, kernel
        clusters = bulk and kernel.skeleton != "backward"
        assert (count(code, "STAS") > 0) == (count(code, "UCGABAR_WAIT") > 0) == clusters, kernel
        assert count(code, "MEMBAR.ALL.GPU") == 0, kernel  # an exchange needs no fence


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
