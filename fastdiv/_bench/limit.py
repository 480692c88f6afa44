"""The yardstick: a plain, hand-vectorised loop of each loss, compiled where there is a compiler.

``limit.cpp`` is the code.  A yardstick computes what the loss of the same name in ``LOSSES`` does,
for plain rows on the CPU::

    yardstick = Yardstick("kl_div", torch.float32)
    value, kept = yardstick.forward(x, t)
    dx = yardstick.backward(kept, x, t)
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import torch
from torch import Tensor

from .._engine.info import build_info

SOURCES = [Path(__file__).with_name(name) for name in ("limit.cpp", "limit_vectors.h")]
FLAGS = ["-std=c++17", "-O3", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math"]
OF_ISA = {
    "avx512": "-DW=16 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mprefer-vector-width=512",
    "avx2": "-DW=8 -mavx2 -mfma -mf16c",
    "baseline": "-DW=4",
}
DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}
KEPT = 4  # floats that a forward keeps of a row; the first one is its value


def why_not() -> str:
    """Return why there is no yardstick here; empty if there is one."""
    try:
        library()
    except (OSError, RuntimeError) as error:
        return str(error)
    return ""


@functools.cache
def library() -> ctypes.CDLL:
    """Compile the yardsticks for the instruction set in use, or take those compiled before."""
    isa = build_info().get("cpu_isa")
    if isa is None:
        raise RuntimeError("fastdiv's kernels do not run here")
    command = [*compiler(), *FLAGS, *OF_ISA[isa].split()]
    text = b"".join(source.read_bytes() for source in SOURCES) + shlex.join(command).encode()
    file = _own_folder() / f"{hashlib.sha256(text).hexdigest()[:16]}.so"
    if not file.exists():
        made = file.with_suffix(f".{os.getpid()}")
        done = subprocess.run(
            [*command, str(SOURCES[0]), "-o", str(made)], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)} failed: {done.stderr.strip()[:500]}")
        made.replace(file)
    return ctypes.CDLL(str(file))


def compiler() -> list[str]:
    """Return the command of the C++ compiler: that of CXX, or the first of the usual ones."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    for command in [wanted] if wanted else [["g++"], ["c++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise RuntimeError(f"there is no C++ compiler {wanted[0] if wanted else 'g++ or clang++'}")


def _own_folder() -> Path:
    """Return a folder for compiled code, in which nobody else can put any."""
    folder = Path(tempfile.gettempdir()) / f"fastdiv_limit_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise RuntimeError(f"{folder} is not only this user's")
    return folder


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


class Yardstick:
    """The yardstick of one loss for one dtype: its mean over the rows, and the gradient of that.

    It uses as many threads as torch.  Tensors are contiguous and on the CPU; x is ``[R, C]``.  The
    target is that of the loss: labels, logits or probabilities, top-k values and indices, or none.
    """

    def __init__(self, loss: str, dtype: torch.dtype) -> None:
        """Find the loop of a loss; raise RuntimeError where there is none."""
        if dtype not in DTYPES:
            raise RuntimeError(f"there is no yardstick for {dtype}")
        function = library()[f"{loss}_{DTYPES[dtype]}"]
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        function.argtypes = [pointer] * 3 + [number] * 3 + [pointer, ctypes.c_float, pointer]
        function.restype = None
        self._function: Callable[..., None] = function

    def __call__(self, x: Tensor, *target: Tensor) -> Tensor:
        """Return the mean of the rows."""
        return self.forward(x, *target)[0]

    def forward(self, x: Tensor, *target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean of the rows, and what the backward needs of each row."""
        kept = torch.empty(len(x), KEPT)
        self._run(kept, None, x, *target)
        return kept[:, 0].mean(), kept

    def backward(self, kept: Tensor, x: Tensor, *target: Tensor) -> Tensor:
        """Return the gradient of the mean as a new tensor."""
        grad = torch.empty_like(x)
        self._run(kept, grad, x, *target)
        return grad

    def _run(self, kept: Tensor, grad: Tensor | None, x: Tensor, *target: Tensor) -> None:
        """Divide the rows among threads; ctypes lets go of Python's lock."""
        rows, classes = x.shape
        labels = next((t for t in target if t.dtype == torch.int64), None)
        matrix = next((t for t in target if t is not labels), None)
        targets = target[0].numel() // rows if target else 0
        tensors = [(x, classes), (matrix, targets), (labels, targets), (kept, KEPT)]
        tensors.append((grad, classes))
        assert all(t is None or t.is_contiguous() for t, _ in tensors)
        pointers = [
            (0 if t is None else t.data_ptr(), width * (0 if t is None else t.element_size()))
            for t, width in tensors
        ]

        def part(begin: int, end: int) -> None:
            x, t, y, kept, d = (p + begin * stride for p, stride in pointers)
            self._function(x, t, y, end - begin, classes, targets, kept, 1 / rows, d)

        parts = min(rows, torch.get_num_threads())
        ends = [rows * i // parts for i in range(parts + 1)]
        if parts == 1:
            part(0, rows)
            return
        for done in wait([_pool(parts).submit(part, *e) for e in zip(ends, ends[1:])]).done:
            done.result()
