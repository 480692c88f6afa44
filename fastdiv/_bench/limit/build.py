"""Compile the yardsticks for the instruction set in use, where there is a C++ compiler."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from ..._engine.info import build_info

FOLDER = Path(__file__).parent
FLAGS = ["-std=c++17", "-O3", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-pthread", "-fno-signed-zeros", "-ffinite-math-only"]  # rows are plain; not -ffast-math
OF_ISA = {
    "avx512": "-DW=16 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c"
    " -mprefer-vector-width=512",
    "avx2": "-DW=8 -mavx2 -mfma -mf16c",
    "baseline": "-DW=4",
}
OF_DTYPE = {torch.float32: "float", torch.bfloat16: "Bf16", torch.float16: "F16"}


class NoYardstickError(Exception):
    """Says why there is none."""


def why_not(dtype: torch.dtype, device: str = "cpu") -> str:
    """Return why there are no yardsticks of a dtype here; empty if there are."""
    if device != "cpu":
        return "yardsticks are for the CPU"
    found = _library(dtype, build_info().get("cpu_isa"))
    return found if isinstance(found, str) else ""


def library(dtype: torch.dtype) -> ctypes.CDLL:
    """Return the compiled yardsticks of a dtype; raise NoYardstickError where there are none."""
    found = _library(dtype, build_info().get("cpu_isa"))
    if isinstance(found, str):
        raise NoYardstickError(found)
    return found


@functools.cache
def _library(dtype: torch.dtype, isa: str | None) -> ctypes.CDLL | str:
    """Return the library or, so that a failure is kept too, why there is none."""
    if isa is None:
        return "fastdiv's kernels do not run here"
    if dtype not in OF_DTYPE or (dtype, isa) == (torch.float16, "baseline"):
        return f"there is no yardstick in {dtype} for {isa}"
    flags = [*FLAGS, *OF_ISA[isa].split(), f"-DDTYPE={OF_DTYPE[dtype]}"]
    try:
        return ctypes.CDLL(str(_compiled([*compiler(), *flags, str(FOLDER / "limit.cpp")])))
    except (OSError, NoYardstickError) as error:
        return str(error)


def compiler() -> list[str]:
    """Return the command of the C++ compiler: that of CXX, or the first of the usual ones."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    for command in [wanted] if wanted else [["g++"], ["c++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise NoYardstickError(f"there is no C++ compiler {' '.join(wanted) or 'g++ or clang++'}")


def describe_compiler() -> str:
    """Return the compiler and its version."""
    command = [*compiler(), "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return said.partition("\n")[0].strip()


def _compiled(command: list[str]) -> Path:
    """Return what a command compiles the sources to, which is kept for other processes."""
    sources = sorted(path for path in FOLDER.iterdir() if path.suffix in (".cpp", ".h"))
    key = hashlib.sha256(shlex.join(command).encode())
    for source in sources:
        key.update(source.read_bytes())
    file = _own_folder() / f"{key.hexdigest()[:16]}.so"
    if not file.exists():
        made = file.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-o", made], capture_output=True, text=True, check=False)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            raise NoYardstickError(f"{shlex.join(command)} failed: {' '.join(errors[:1])}")
        made.replace(file)  # at once, since other processes may look for it
    return file


def _own_folder() -> Path:
    """Return a folder for compiled code, in which no other user can put any."""
    folder = Path(tempfile.gettempdir()) / f"fastdiv_limit_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise NoYardstickError(f"others can write to {folder}")
    return folder
