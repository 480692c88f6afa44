"""Sharded losses, run by two to four processes, against those of whole rows."""

from __future__ import annotations

import pytest
import torch

from helpers import shard_edges, shards
from helpers.ranks import Ranks

pytestmark = pytest.mark.cpu_only("the ranks of these tests are processes of the CPU")
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def same_on_all(results: list) -> None:
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_loss(ranks: Ranks, size: int, dtype: torch.dtype) -> None:
    """Values and gradients obey the accept rule; the values of all ranks have the same bits."""
    same_on_all(ranks.run(size, shards.compare, dtype))


def test_reruns_have_the_same_bits(ranks: Ranks) -> None:
    first, again = (ranks.run(3, shards.compare, torch.float32) for _ in range(2))
    assert first == again


def test_reference(ranks: Ranks) -> None:
    same_on_all(ranks.run(3, shards.compare, torch.float32, "reference"))


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("what", ["divergences", "rows_of_logits", "next_to_zero"])
def test_hard_rows(ranks: Ranks, what: str, size: int) -> None:
    same_on_all(ranks.run(size, getattr(shard_edges, what)))


def test_hard_rows_that_are_not_looked_for(ranks: Ranks) -> None:
    """As on a GPU, which is not asked whether there are any."""
    looked_for = ranks.run(3, shard_edges.divergences)
    assert ranks.run(3, shard_edges.divergences_like_gpu) == looked_for
