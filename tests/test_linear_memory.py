"""How much of the logits a linear loss holds at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import fastdiv
from fastdiv._bench.linear import LinearJob, losses, step
from fastdiv._linear.loops import Problem
from fastdiv._linear.ops import problem
from fastdiv._linear.tiles import Gradients, ranges
from fastdiv.reference import Spec

LOSSES = {
    **losses(),
    "weight": partial(fastdiv.linear_cross_entropy, accumulate="weight"),
    "rows": partial(fastdiv.linear_cross_entropy, accumulate="rows"),
    "float32 logits": partial(fastdiv.linear_cross_entropy, logits_dtype=torch.float32),
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Memory does not depend on the threads."""
    torch.set_num_threads(1)


def temporary_bytes(call: Callable[[], object], folder: Path) -> int:
    """Return the most bytes at a time of CPU tensors that a call makes and frees again.

    Tensors that are alive when the call returns, as its results are, do not count.
    """
    cpu = [ProfilerActivity.CPU]
    with profile(activities=cpu, profile_memory=True, acc_events=True) as recorded:
        made = call()
    recorded.export_chrome_trace(str(folder / "trace.json"))
    del made
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
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
    return max(accumulate(change for _, change in changes), default=0)


def share_of_the_logits(
    variant: str, dtype: str, size: tuple[int, int, int], folder: Path
) -> float:
    """Return the memory of a forward and a backward over that of the logits.

    Arguments and gradients do not count.  The tensors that are made are the same on every machine;
    the memory of the process also depends on the allocator.
    """
    job = LinearJob(variant, dtype, *size)
    tensors = job.make_inputs()
    extra = temporary_bytes(lambda: step(LOSSES[variant], *tensors), folder)
    return extra / job.logits_bytes


MEMORY = pytest.mark.parametrize(
    ("variant", "dtype", "size", "allowed"),
    [
        # 256 rows are more than a tenth, and some 50 bytes come with each row:
        ("fused", "f32", (1024, 128, 16000), 0.26),
        ("per_row", "f32", (1024, 128, 16000), 0.26),
        ("fused", "bf16", (1024, 128, 16000), 0.26),
        ("fused", "f32", (4096, 128, 8000), 0.1),
        # The logits are made twice, in the forward 256 rows at a time:
        ("per_row", "f32", (4096, 128, 8000), 0.07),
        ("rows", "f32", (4096, 128, 8000), 0.07),
        ("fused", "bf16", (4096, 128, 8000), 0.07),
        # A tile has 256 rows beside sums in float32:
        ("fused", "bf16", (4096, 64, 8000), 0.07 + 4 * 64 / (2 * 4096) + 4 * 64 / (2 * 8000)),
        # Twelve hundredths are a tile and the sum of the hidden states' gradient:
        ("weight", "bf16", (4096, 128, 8000), 0.12 + 4 * 128 / (2 * 4096)),
        # Of logits of twice the size; a block of their gradient and of the weight is converted:
        ("float32 logits", "bf16", (1024, 128, 16000), 2 * 0.28),
        ("float32 logits", "bf16", (4096, 128, 8000), 2 * 0.1 + 4 * 128 / (2 * 4096)),
    ],
)


@pytest.mark.cpu_only("a GPU's memory is measured by gpu_check")
@MEMORY
def test_memory(
    variant: str,
    dtype: str,
    size: tuple[int, int, int],
    allowed: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tile is a tenth of the logits, or 256 rows; the bound fails if a tile is held twice."""
    # As the processor has them or not, tiles would be larger or smaller.
    monkeypatch.setattr("fastdiv._linear.tiles.multiplies", lambda half: True)
    assert share_of_the_logits(variant, dtype, size, tmp_path) <= allowed
    tiles, held = Problem.tiles, []

    def twice(self: Problem, *place: Any) -> Any:
        found = tiles(self, *place)
        held[:] = [found[0].clone()]
        return found

    monkeypatch.setattr(Problem, "tiles", twice)
    assert share_of_the_logits(variant, dtype, size, tmp_path) > allowed


@pytest.mark.cpu_only("a GPU has limits of its own")
@pytest.mark.parametrize(
    ("dtype", "rows", "classes", "expected"),
    [
        (torch.float32, 200, 32000, 200),
        (torch.float32, 300, 32000, 160),  # two chunks
        (torch.float32, 1024, 32000, 256),
        (torch.float32, 1024, 128256, 256),
        (torch.float32, 4096, 32000, 320),  # a twelfth, in 13 even chunks
        (torch.float32, 1 << 20, 32000, 524),  # 64 MiB
        (torch.float32, 1 << 20, 128256, 256),  # more than 64 MiB
        (torch.bfloat16, 1024, 32000, 256),
    ],
)
@pytest.mark.parametrize("halves", [True, False])
def test_rows_of_a_chunk(
    halves: bool,
    dtype: torch.dtype,
    rows: int,
    classes: int,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A chunk has at least 256 rows, also of converted logits, and its memory is bounded."""
    monkeypatch.setattr("fastdiv._linear.tiles.multiplies", lambda half: halves)
    x = torch.zeros((), dtype=dtype)  # takes no memory
    p = problem((x.expand(rows, 64), x.expand(classes, 64), *[None] * 7), Spec("cross_entropy"), 0)
    student = Gradients(p.student, (False, False, False))
    chunk = next(ranges(slice(0, rows), p.rows_of_chunk([student])))
    assert chunk.stop == expected


@pytest.mark.cpu_only("a GPU has limits of its own")
def test_rows_of_a_chunk_of_float32_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as those of a float32 layer: a twelfth of float32 logits."""
    monkeypatch.setattr("fastdiv._linear.tiles.multiplies", lambda half: True)
    x = torch.zeros((), dtype=torch.bfloat16)  # takes no memory
    tensors = (x.expand(4096, 64), x.expand(32000, 64), *[None] * 7)
    p = problem(tensors, Spec("cross_entropy"), 0, torch.float32)
    student = Gradients(p.student, (False, False, False))
    assert next(ranges(slice(0, 4096), p.rows_of_chunk([student]))).stop == 320
