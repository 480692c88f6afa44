"""Facts about the build, and about what runs on this machine."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch

from . import backend


def build_info() -> dict[str, Any]:
    """Return what was compiled into fastdiv, and which of it this machine runs.

    Returns:
        A dictionary with the versions of fastdiv and torch, the compiler, the current backend and
        the number of threads; the instruction sets that were built, those that this machine runs
        and the one in use; whether CUDA kernels were built, with which toolkit and for which
        architectures.  Without kernels it says why they could not be loaded.

    Example:
        >>> import fastdiv
        >>> "baseline" in fastdiv.build_info()["cpu_isas_built"]
        True
    """
    native = backend._C
    info: dict[str, Any] = {
        "fastdiv": version("fastdiv"),
        "torch": torch.__version__,
        "backend": backend._current,
        "native": native is not None,
        "threads": torch.get_num_threads(),
    }
    if native is None:
        return info | {"load_error": str(backend.load_error)}
    return info | {
        "compiler": native.compiler,
        "cpu_isas_built": native.built_cpu_isas(),
        "cpu_isas_supported": native.cpu_isas(),
        "cpu_isa": native.cpu_isa(),
        "cuda": bool(native.cuda_architectures),
        "cuda_toolkit": native.cuda_toolkit,
        "cuda_architectures": native.cuda_architectures,
    }
