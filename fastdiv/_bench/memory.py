"""Peak memory of forward and backward beyond the logits and their gradient.

On a CPU it is Linux' high-water mark of resident memory, which belongs to a whole process.  The
mark includes buffers of kernels and libraries, and memory that glibc has freed but not returned.
So each measurement has a new process, forked from one that has imported everything and run nothing:
a started thread pool does not survive a fork.  Once the inputs are made, writing 5 to
``clear_refs`` lowers the mark to what is resident.  On a GPU torch counts all memory.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .losses import DTYPES, LOSSES, Loss, as_computed
from .processes import run_apart

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")
SERVER = """
import json, sys
from {0} import {1} as measure
from {2} import serve
serve(json.loads(sys.argv[1]), measure)
"""

Made = TypeVar("Made")


class Job(NamedTuple):
    """One call to measure."""

    loss: str
    variant: str  # "fused", "in_place", "eager" or "compile"
    dtype: str
    rows: int
    classes: int
    device: str = "cpu"


def extra_memory(jobs: Sequence[Job]) -> Iterator[int | None]:
    """Yield the bytes at the peak of each job; None where the system does not count them."""
    return measured_apart(measure, jobs)


def measured_apart(measure: Callable[..., int | None], jobs: Sequence[Any]) -> Iterator[int | None]:
    """Yield ``measure(*job)`` of each job, on a CPU measured in a new process for each."""
    if jobs and jobs[0].device == "cuda":
        yield from (measure(*job) for job in jobs)
        return
    if not (jobs and STATUS.exists() and RESET.exists()):
        yield from (None for _ in jobs)
        return
    program = SERVER.format(measure.__module__, measure.__name__, __name__)
    with run_apart([sys.executable, "-c", program, json.dumps(jobs)]) as server:
        assert server.stdout is not None
        for _ in jobs:
            yield json.loads(server.stdout.readline() or "null")


def serve(jobs: Sequence[Any], measure: Callable[..., int | None]) -> None:
    """Print a line for each job, measured in a process of its own."""
    for job in jobs:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writer, json.dumps(measure(*job)).encode())
            os._exit(0)
        os.close(writer)
        with open(reader) as answer:
            print(answer.read() or "null", flush=True)  # null: killed, perhaps out of memory
        os.waitpid(child, 0)


def peak_of(call: Callable[[], Made], device: str) -> tuple[Made, int | None]:
    """Return the result of a call, and the bytes at its peak beyond those in use before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return call(), torch.cuda.max_memory_allocated() - before
    # Memory that glibc has freed but not returned would hide as much of what the call takes.
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        RESET.write_text("5")
    except OSError:
        return call(), None
    before = _resident("VmRSS")
    return call(), _resident("VmHWM") - before


def measure(*job: Any) -> int | None:
    """Return the bytes of a job at its peak beyond its inputs and the gradient."""
    name, variant, dtype, rows, classes, device = job
    loss = LOSSES[name]
    call: Loss = getattr(loss, variant)
    # A small call first loads what is loaded lazily.  Compiled code is for one shape only.
    first = (rows, classes) if variant == "compile" else (8, 128)
    _forward_backward(call, *loss.make_inputs(first, DTYPES[dtype], device))
    inputs = loss.make_inputs((rows, classes), DTYPES[dtype], device)
    gradient, peak = peak_of(lambda: _forward_backward(call, *inputs), device)
    kept = 0 if gradient.data_ptr() == inputs[0].data_ptr() else gradient.nbytes
    return None if peak is None else max(0, peak - kept)


def _forward_backward(call: Loss, x: Tensor, *target: Tensor) -> Tensor:
    logits = as_computed(x)
    return torch.autograd.grad(call(logits, *target), logits)[0]


def _resident(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)
