"""The choice of what computes a loss: the kernels, or reference torch operations."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import get_args

import torch

from ..reference.choices import Backend, check_choice
from .torch_private import constant

try:
    from .. import _C as _C
except ImportError as error:  # the source tree was not built, or torch is too old
    _C = None  # type: ignore[assignment]
    load_error: ImportError | None = error
else:
    load_error = None

BACKENDS = get_args(Backend)


def _checked(name: str, where: str) -> str:
    check_choice(name, BACKENDS, where)
    return name


_current = _checked(os.environ.get("FASTDIV_BACKEND", "auto"), "FASTDIV_BACKEND")

if _C is not None and (_isa := os.environ.get("FASTDIV_CPU_ISA")) and not _C.set_cpu_isa(_isa):
    raise ImportError(
        f"FASTDIV_CPU_ISA={_isa}: this machine runs {', '.join(_C.cpu_isas())} "
        f"(built: {', '.join(_C.built_cpu_isas())})"
    )


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Choose what computes the losses inside a ``with`` block.

    The choice holds for the whole process, as torch's backend flags do.  It is made when a loss is
    called, for its backward too.  The default is the environment variable ``FASTDIV_BACKEND``, or
    ``"auto"``.

    Args:
        name: ``"auto"`` uses a kernel where one fits, and reference torch operations elsewhere.
            ``"native"`` raises RuntimeError where no kernel fits.  ``"reference"`` uses no kernel.

    Returns:
        A context manager; the previous choice returns when it ends.

    Raises:
        ValueError: The name is unknown.

    Example:
        >>> import torch, fastdiv
        >>> x, y = torch.zeros(2, 4), torch.tensor([0, 3])
        >>> with fastdiv.backend("reference"):
        ...     print(f"{fastdiv.cross_entropy(x, y):.4f}")
        1.3863
    """
    global _current
    previous, _current = _current, _checked(name, "backend")
    try:
        yield
    finally:
        _current = previous


def chosen() -> str:
    """Return what computes the losses now."""
    return _current


def is_native() -> bool:
    """Return whether losses without a kernel must raise."""
    return _current == "native"


def use_kernel(x: torch.Tensor, pointwise: bool = False) -> bool:
    """Return whether a kernel computes a loss of these logits; raise if one must and none can."""
    if _current == "reference":
        return False
    fits = _C is not None and not pointwise and (x.is_cpu or _device_trouble(x) is None)
    if not fits and _current == "native":
        raise RuntimeError(f"backend 'native': {_why_not(x, pointwise)}; use backend 'auto'")
    return fits


def _why_not(x: torch.Tensor, pointwise: bool) -> str:
    if _C is None:
        return f"the extension module fastdiv._C could not be loaded ({load_error})"
    if pointwise:
        return (
            "reduction 'pointwise' has no kernel (its result is as large as the logits, so nothing "
            "can be fused)"
        )
    return str(_device_trouble(x))


def _device_trouble(x: torch.Tensor) -> str | None:
    """Return why no kernel runs on the device of these logits; None if one does."""
    if not x.is_cuda or torch.version.cuda is None:
        return f"there is no kernel for device {x.device.type!r}"
    return _gpu_trouble(x.device.index)


@constant
def _gpu_trouble(index: int) -> str | None:
    """Return why the CUDA kernels do not run on this GPU; None if they do."""
    return _find_gpu_trouble(index)


@cache
def _find_gpu_trouble(index: int) -> str | None:
    assert _C is not None
    built = _C.cuda_architectures
    if not built:
        return "built without CUDA kernels (no nvcc was found, or FASTDIV_CUDA_ARCHS=none)"
    try:
        with torch.cuda.device(index):
            trouble = _C.gpu_trouble(index)
    except (RuntimeError, AssertionError) as error:  # a fake tensor on a machine without a GPU
        trouble = str(error)
    if not trouble:
        return None
    return (
        f"the CUDA kernels, built with toolkit {_C.cuda_toolkit} for {built}, do not run on GPU "
        f"{index}: {trouble}"
    )
