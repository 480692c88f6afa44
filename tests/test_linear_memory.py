"""How much of the logits a linear loss holds at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdiv._bench.linear import LinearJob, losses, step
from fastdiv._bench.memory import temporary_bytes
from fastdiv._linear.chunks import Problem


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Memory does not depend on the threads."""
    torch.set_num_threads(1)


def share_of_the_logits(variant: str, dtype: str, size: tuple[int, int, int]) -> float:
    """Memory of a forward and a backward beyond arguments and gradients, over that of the logits.

    It counts the tensors that are made, which are the same on every machine; how much memory of the
    system they come to is a matter of its allocator.
    """
    job = LinearJob(variant, dtype, *size)
    tensors = job.make_inputs()
    _, extra = temporary_bytes(lambda: step(losses()[variant], *tensors))
    return extra / job.logits_bytes


MEMORY = pytest.mark.parametrize(
    ("variant", "dtype", "size", "allowed"),
    [
        ("fused", "f32", (1024, 128, 16000), 0.1),
        ("fused", "f32", (4096, 128, 8000), 0.1),
        # The logits are made twice, and so that two tiles would not hide in a tenth:
        ("per_row", "f32", (4096, 128, 8000), 0.06),
        ("fused", "bf16", (4096, 128, 8000), 0.06),
    ],
)


@pytest.mark.cpu_only("a GPU's memory is measured by gpu_check")
@MEMORY
def test_memory(
    variant: str,
    dtype: str,
    size: tuple[int, int, int],
    allowed: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Forward and backward take a tenth of the logits; the bound fails if a tile is held twice."""
    # As the processor has them or not, tiles would be larger or smaller.
    monkeypatch.setattr("fastdiv._linear.tiles.multiplies", lambda half: True)
    assert share_of_the_logits(variant, dtype, size) <= allowed
    tiles, held = Problem.tiles, []

    def twice(self: Problem, *place: Any) -> Any:
        found = tiles(self, *place)
        held[:] = [found[0].clone()]
        return found

    monkeypatch.setattr(Problem, "tiles", twice)
    assert share_of_the_logits(variant, dtype, size) > allowed
