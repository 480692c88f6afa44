"""Peak memory of forward and backward beyond the logits and their gradient.

There are two measures.  The benchmark reports what the system sees (``peak_of``): on a CPU Linux'
high-water mark of resident memory.  It is one of a whole process and contains what kernels and
libraries take for themselves, and freed memory that glibc has found no use for yet, so that it
differs from machine to machine.  Hence a new process for every measurement, forked from one that
has imported everything and run nothing: a started thread pool does not survive a fork.  Writing 5
to ``clear_refs`` lowers the mark to what is resident, once the inputs are there.  On a GPU all
memory comes from torch, which counts it.

The tests hold us to what we ask torch for (``temporary_bytes``): the tensors on a CPU that are
made and freed during a call.  That is the same on every machine.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .apart import run_apart
from .losses import DTYPES, LOSSES, Loss, as_computed

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")


class AnyJob(Protocol):
    """One call to measure: a NamedTuple that JSON can hold."""

    @property
    def device(self) -> str:
        """Where it computes."""


JobType = TypeVar("JobType", bound=AnyJob)
Made = TypeVar("Made")


class Job(NamedTuple):
    """One call to measure."""

    loss: str
    variant: str  # "fused", "in_place" or "eager"
    dtype: str
    rows: int
    classes: int
    device: str = "cpu"


def extra_memory(jobs: Sequence[Job]) -> Iterator[int | None]:
    """Bytes at the peak of each, as they come; None where nobody tells."""
    return measured_apart(__name__, jobs, _measure)


def measured_apart(
    module: str, jobs: Sequence[JobType], measure: Callable[[JobType], int | None]
) -> Iterator[int | None]:
    """``measure`` of each job; of a CPU in ``python -m module``, which hands them to ``serve``."""
    if jobs and jobs[0].device == "cuda":
        yield from map(measure, jobs)
        return
    if not (jobs and STATUS.exists() and RESET.exists()):
        yield from (None for _ in jobs)
        return
    with run_apart([sys.executable, "-m", module, json.dumps(jobs)]) as server:
        assert server.stdout is not None
        for _ in jobs:
            yield json.loads(server.stdout.readline() or "null")


def serve(jobs: Sequence[JobType], measure: Callable[[JobType], int | None]) -> None:
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


def peak_of(call: Callable[[], Made], device: str) -> tuple[Made, int | None]:
    """What a call returns, and the bytes at its peak beyond what was in use before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return call(), torch.cuda.max_memory_allocated() - before
    try:
        RESET.write_text("5")
    except OSError:
        return call(), None
    before = _resident("VmRSS")
    return call(), _resident("VmHWM") - before


def temporary_bytes(call: Callable[[], Made]) -> tuple[Made, int]:
    """Returns a call's result, and the most bytes at a time of CPU tensors that it freed again.

    What is still alive when the call returns, as its results are, does not count.
    """
    cpu = [ProfilerActivity.CPU]
    with profile(activities=cpu, profile_memory=True, acc_events=True) as recorded:
        made = call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    events = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    changes = [(e["args"]["Addr"], e["args"]["Bytes"]) for e in events]
    alive: dict[int, int] = {}
    for i, (address, change) in enumerate(changes):
        if change > 0:
            alive[address] = i
        else:
            alive.pop(address, None)
    for i in alive.values():
        changes[i] = (0, 0)
    return made, max(accumulate(change for _, change in changes), default=0)


def _measure(job: Job) -> int | None:
    loss, dtype = LOSSES[job.loss], DTYPES[job.dtype]
    call: Loss = getattr(loss, job.variant)
    _forward_backward(call, *loss.make_inputs((8, 128), dtype, job.device))  # loads what is lazy
    inputs = loss.make_inputs((job.rows, job.classes), dtype, job.device)
    gradient, peak = peak_of(lambda: _forward_backward(call, *inputs), job.device)
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


if __name__ == "__main__":
    serve([Job(*fields) for fields in json.loads(sys.argv[1])], _measure)
