"""Peak memory of forward and backward beyond the logits and their gradient.

torch counts no memory on CPUs, and its profiler does not see what a kernel allocates for itself, so
that the system has to tell: Linux' high-water mark of resident memory.  It is one of a whole
process, freed memory that stays with the process included.  Hence a new process for every
measurement, forked from one that has imported everything and run nothing: a started thread pool
does not survive a fork.  Writing 5 to ``clear_refs`` lowers the mark to what is resident, once the
inputs are there.  On a GPU all memory comes from torch, which counts it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .losses import DTYPES, LOSSES, Loss

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")
AnyJob = TypeVar("AnyJob")


class Job(NamedTuple):
    """One call to measure."""

    loss: str
    variant: str  # "fused", "in_place" or "eager"
    dtype: str
    rows: int
    classes: int
    device: str = "cpu"


def extra_memory(jobs: Sequence[Job]) -> Iterator[int | None]:
    """Bytes at the peak of each, as they come; None where the system does not tell."""
    if jobs and jobs[0].device == "cuda":
        yield from map(_measure_on_gpu, jobs)
        return
    if not (jobs and STATUS.exists() and RESET.exists()):
        yield from (None for _ in jobs)
        return
    yield from in_fresh_processes(__name__, jobs)


def in_fresh_processes(module: str, jobs: Sequence[tuple[object, ...]]) -> Iterator[int | None]:
    """What ``python -m module`` prints for each of the jobs, which it hands to ``serve``."""
    server = subprocess.Popen(
        [sys.executable, "-m", module, json.dumps(jobs)], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    with server:
        for _ in jobs:
            yield json.loads(server.stdout.readline() or "null")


def serve(jobs: Sequence[AnyJob], measure: Callable[[AnyJob], int | None]) -> None:
    """Prints one line for every job, which a process of its own has measured."""
    for job in jobs:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writer, json.dumps(measure(job)).encode())
            os._exit(0)
        os.close(writer)
        with open(reader) as answer:
            print(answer.read() or "null", flush=True)  # null: killed, for its memory perhaps
        os.waitpid(child, 0)


def peak_of(call: Callable[[], object]) -> int | None:
    """Bytes at the peak of a call beyond what was resident before it."""
    try:
        RESET.write_text("5")
    except OSError:
        return None
    before = _resident("VmRSS")
    result = call()
    peak = _resident("VmHWM") - before
    del result
    return peak


def _measure(job: Job) -> int | None:
    loss, dtype = LOSSES[job.loss], DTYPES[job.dtype]
    call: Loss = getattr(loss, job.variant)
    _forward_backward(call, *loss.make_inputs((8, 128), dtype))  # loads what is loaded lazily
    x, target = loss.make_inputs((job.rows, job.classes), dtype)
    try:
        RESET.write_text("5")
    except OSError:
        return None
    before = _resident("VmRSS")
    gradient = _forward_backward(call, x, target)
    kept = 0 if gradient.data_ptr() == x.data_ptr() else gradient.nbytes
    return max(0, _resident("VmHWM") - before - kept)


def _measure_on_gpu(job: Job) -> int:
    loss, dtype = LOSSES[job.loss], DTYPES[job.dtype]
    call: Loss = getattr(loss, job.variant)
    _forward_backward(call, *loss.make_inputs((8, 128), dtype, "cuda"))
    x, target = loss.make_inputs((job.rows, job.classes), dtype, "cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradient = _forward_backward(call, x, target)
    kept = 0 if gradient.data_ptr() == x.data_ptr() else gradient.nbytes
    return max(0, torch.cuda.max_memory_allocated() - before - kept)


def _forward_backward(call: Loss, x: Tensor, target: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    logits = leaf.view_as(leaf)
    return torch.autograd.grad(call(logits, target), logits)[0]


def _resident(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


if __name__ == "__main__":
    serve([Job(*fields) for fields in json.loads(sys.argv[1])], _measure)
