"""Sharded losses under autograd, the compiler, DTensor and DDP, and of linear layers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import shard_programs
from ranks import Ranks

pytestmark = pytest.mark.cpu_only("the ranks of these tests are processes of the CPU")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(Path(tmp_path_factory.mktemp("ranks")))
    yield started
    started.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [2, 4])
def test_linear(ranks: Ranks, size: int, dtype: torch.dtype) -> None:
    results = ranks.run(size, shard_programs.linear, dtype)
    assert all(result == results[0] for result in results)


def test_linear_logits_are_never_held_whole(ranks: Ranks) -> None:
    assert max(ranks.run(2, shard_programs.linear_memory)) < 1024 * 3000 / 10


@pytest.mark.parametrize("size", [2, 3])
def test_backwards(ranks: Ranks, size: int) -> None:
    ranks.run(size, shard_programs.backwards)


@pytest.mark.parametrize("size", [2, 4])
def test_statistics(ranks: Ranks, size: int) -> None:
    ranks.run(size, shard_programs.statistics)


@pytest.mark.slow
def test_compiled(ranks: Ranks) -> None:
    first, second = ranks.run(2, shard_programs.compiled)
    assert first == second


def test_dtensors(ranks: Ranks) -> None:
    ranks.run(4, shard_programs.dtensors)


@pytest.mark.parametrize("size", [2, 4])
def test_mean_over_data_parallel_ranks(ranks: Ranks, size: int) -> None:
    results = ranks.run(size, shard_programs.data_parallel)
    assert len(set(results)) == 1
