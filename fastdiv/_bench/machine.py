"""Facts about the machine that figures were measured on."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy
import torch

from .._engine.info import build_info

CPU_INFO = Path("/proc/cpuinfo")


def cpu_model() -> str:
    """Return the name of the processor."""
    if CPU_INFO.exists():
        for line in CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def torch_cpu_isa() -> str:
    """Return the instruction set of torch's own kernels, which ATEN_CPU_CAPABILITY may lower."""
    return torch.backends.cpu.get_cpu_capability().lower()


def give_each_isa_a_compiler_cache() -> None:
    """Let ``torch.compile`` cache its code in a folder for the instruction set that torch uses.

    Its cache does not distinguish instruction sets.  Code made for AVX-512 is compiled again under
    ``ATEN_CPU_CAPABILITY=avx2``, and gives NaN there.  A folder that the user chose stays.
    """
    folder = Path(tempfile.gettempdir()) / f"fastdiv_compiled_{os.getuid()}_{torch_cpu_isa()}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """Return all facts about this machine and its software that may change a timing."""
    facts = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cpu_count": os.cpu_count(),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "torch_cpu_isa": torch_cpu_isa(),
        **build_info(),
    }
    return {**facts, "gpu": _describe_gpu()} if device == "cuda" else facts


def _describe_gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties()
    return {
        "name": properties.name,
        "driver": _driver(),
        "torch_cuda": torch.version.cuda,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cache_bytes": properties.L2_cache_size,
        "packages": {name: _version(name) for name in ("triton", "liger-kernel", "quack-kernels")},
    }


def _driver() -> str | None:
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return None
    query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    return lines[0] if lines else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
