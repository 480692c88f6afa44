"""The kernels in a compiled file: their names, what they use, and their machine code."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from helpers.programs import DIVERGENCE_POLICIES

DTYPES = {"float": "f32", "double": "f64", "Half": "f16", "BFloat16": "bf16"}
KERNEL = re.compile(
    rf"(forward|backward|terms)_rows<(.*), ({'|'.join(DTYPES)})(?:, (true|false))?"
    r"(?:, (true|false))?>\("
)
RESERVED_SHARED = 1024  # by CUDA itself, for every block; cuobjdump counts it from sm_90 on


def tool(name: str, *arguments: str | Path, cwd: Path | None = None) -> str:
    """What a tool of the toolkit, or of the PyPI packages, prints."""
    packages = Path(sysconfig.get_path("purelib"), "nvidia").glob("cu*/bin")
    path = os.pathsep.join([*map(str, packages), os.environ["PATH"]])
    program = shutil.which(name, path=path)
    if program is None:
        pytest.skip(f"needs {name}")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr or done.stdout}")
    return done.stdout


def demangled(names: str) -> str:
    command = ["c++filt"]
    plain = subprocess.run(command, input=names, capture_output=True, text=True, check=True)
    return without_namespaces(plain.stdout)


def without_namespaces(names: str) -> str:
    return re.sub(r"fastdiv::|cuda::", "", names)


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
    def rows(self) -> int:
        """How many rows of logits or of a target it reads side by side."""
        return 2 if self.divergence or "(Target)3" in self.policy else 1

    @property
    def has_terms(self) -> bool:
        return self.divergence and not self.policy.startswith("AlphaDiv")


@functools.cache
def resources(file: str) -> dict[Kernel, dict[str, int]]:
    """REG, STACK, LOCAL and SHARED of every kernel of a library, an object or a cubin."""
    found, architecture = {}, ""
    listing = tool("cuobjdump", "-res-usage", file)
    if "arch = " not in listing:
        architecture = architecture_of(Path(file))
    lines = iter(demangled(listing).splitlines())
    for line in lines:
        if match := re.match(r"arch = sm_(\w+)", line):
            architecture = match[1]
        if "Function " in line:
            kernel = Kernel.parse(architecture, line)
            numbers = re.findall(r"([A-Z]+):(\d+)", next(lines))
            if kernel is not None:
                found[kernel] = {key: int(value) for key, value in numbers}
    return found


def symbols(cubin: Path) -> dict[str, str]:
    """Return the index of every function, by its mangled name."""
    lines = [line.split() for line in tool("readelf", "-sW", cubin).splitlines()]
    return {s[-1]: s[0].rstrip(":") for s in lines if len(s) > 7 and s[3] == "FUNC"}


def architecture_of(cubin: Path) -> str:
    """Return "90" of a cubin for sm_90."""
    listing = tool("nvdisasm", "-fun", next(iter(symbols(cubin).values())), cubin)
    (found,) = re.findall(r"^\s*\.target\s+sm_(\w+)", listing, re.MULTILINE)
    return str(found)


def listings(file: str, wanted: Callable[[Kernel], bool]) -> Iterator[tuple[Kernel, str]]:
    """Yield the machine code of the kernels that are wanted; others are not disassembled."""
    architectures = {kernel.architecture for kernel in resources(file) if wanted(kernel)}
    with tempfile.TemporaryDirectory() as folder:
        for architecture in sorted(architectures, key=int):
            if file.endswith(".cubin"):
                cubins = [Path(file).resolve()]
            else:
                place = Path(folder, architecture)
                place.mkdir()
                elf = ["-xelf", "all", "-arch", f"sm_{architecture}"]
                tool("cuobjdump", *elf, Path(file).resolve(), cwd=place)
                cubins = sorted(place.glob("*.cubin"))
            for cubin in cubins:
                yield from disassemble(cubin, architecture, wanted)


def disassemble(
    cubin: Path, architecture: str, wanted: Callable[[Kernel], bool]
) -> Iterator[tuple[Kernel, str]]:
    """Yield the machine code of the kernels of one cubin that are wanted."""
    functions = symbols(cubin)
    plain = demangled("\n".join(functions)).splitlines()
    kernels = {}
    for name, line in zip(functions, plain, strict=True):
        kernel = Kernel.parse(architecture, line)
        if kernel is not None and wanted(kernel):
            kernels[name] = kernel
    if not kernels:
        return
    indices = ",".join(functions[name] for name in kernels)
    for section in tool("nvdisasm", "-c", "-fun", indices, cubin).split("\n.text.")[1:]:
        name, _, text = section.partition(":")
        yield kernels[name], text.partition("\n//-----")[0]
