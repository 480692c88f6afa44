"""A rank that fails, or does not fit the others, gives an error on all of them: nobody waits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fastdiv.distributed as sharded
from fastdiv.distributed.alike import LENGTH, checksum
from helpers import shard_failures
from helpers.ranks import RankFailed, Ranks

pytestmark = [
    pytest.mark.cpu_only("the ranks of these tests are processes of the CPU"),
    pytest.mark.timeout(300),
]
# The error of the rank that is different, a part of what it says, and of what the others say; "":
# what that one does.
EXPECTED = {
    "option": ("ValueError", "got 'all'", "rank {odd} of the group refused"),
    "type": ("TypeError", "input must be a Tensor", "TypeError: input must be a Tensor"),
    "shape": ("ValueError", "target must have the shape", "ValueError: target must have"),
    "pointwise": ("ValueError", "got 'pointwise'", ""),
    "layer": ("ValueError", "linear_weight must have shape", "linear_weight must have shape"),
    "chunk": ("ValueError", "chunk_size", "chunk_size"),
    "rows": ("RuntimeError", "rank {odd}: rows: 5", ""),
    "dtype": ("RuntimeError", "rank {odd}: dtype: torch.bfloat16", ""),
    "temperature": ("RuntimeError", "rank {odd}: 1 / temperature: 0.5", ""),
    "smoothing": ("RuntimeError", "label smoothing: (0.1, 'all')", ""),
    "loss": ("RuntimeError", "loss: kl_div", ""),
    "hidden gradient": ("RuntimeError", "gradients of hidden states: [True, False]", ""),
    "labels": ("RuntimeError", "must have the same labels", ""),
    "order of labels": ("RuntimeError", "the labels must be the same on every rank", ""),
    "token weights": ("RuntimeError", "token_weight must be the same on every rank", ""),
    "hidden states": ("RuntimeError", "input, the hidden states of a tensor-parallel layer", ""),
    "one hidden state": ("RuntimeError", "input, the hidden states of a tensor-parallel", ""),
    "teacher": ("RuntimeError", "target, the hidden states of a tensor-parallel teacher", ""),
    "number": ("ValueError", "num_classes must be a positive", "num_classes must be a positive"),
    "numbers": ("RuntimeError", "rank {odd}: num_classes: 11", ""),
    "range": ("IndexError", "target[0] is 1000, out of range for", ""),
    "index": ("IndexError", "index[0] is -1, out of range for", ""),
    "nothing": ("none", "", ""),
}


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    started = Ranks(tmp_path)
    yield started
    started.close()


@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_raises(ranks: Ranks, size: int) -> None:
    *others, odd = ranks.run(size, shard_failures.failures)
    assert odd.keys() == EXPECTED.keys()
    different = {2: "rank 0 / rank 1", 4: "ranks 0, 1, 2 / rank 3"}[size]
    for name in ("order of labels", "token weights", "hidden states", "teacher"):
        assert f"between {different}" in odd[name][1]
    for name, (kind, own, theirs) in EXPECTED.items():
        assert odd[name][0] == kind and own.format(odd=size - 1) in odd[name][1], odd[name]
        for other in others:
            if theirs:
                assert other[name][0] == "RuntimeError", (name, other[name])
                assert theirs.format(odd=size - 1) in other[name][1], (name, other[name])
            else:
                assert other[name] == odd[name], name


def test_gathered_logits(ranks: Ranks) -> None:
    """With the number of classes, logits that are not sharded are refused on all ranks."""
    first, second = ranks.run(2, shard_failures.gathered)
    assert first == second
    for kind, text in first.values():
        assert kind == "ValueError" and "num_classes=5 classes in all, got 5 + 5 = 10" in text


def test_a_rank_that_dies(ranks: Ranks) -> None:
    with pytest.raises(RankFailed) as error:
        ranks.run(2, shard_failures.dies)
    assert "rank 1 of 2: is gone" in str(error.value) and "rank 0" not in str(error.value)


def test_a_rank_that_hangs_says_where(ranks: Ranks) -> None:
    with pytest.raises(RankFailed) as error:
        ranks.run(2, shard_failures.waits_for_no_one)
    assert "this rank has failed" in str(error.value)
    hanging = str(error.value).split("rank 1 of 2: does not answer")[1]
    assert "shard_failures.py" in hanging and "in waits_for_no_one" in hanging


def test_no_group() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        sharded.entropy(torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_checksum(dtype: torch.dtype) -> None:
    """It changes with any entry, and with the order of entries near and far; not with strides."""
    v = torch.arange(3 * LENGTH // 2).remainder(251).to(dtype).view(-1, 12)
    seen = {int(checksum(v)), int(checksum(v[:-1]))}
    seen |= {int(checksum(v[[1, 0, *range(2, len(v))]])), int(checksum(v.flip(0)))}
    seen |= {int(checksum(v.roll(LENGTH // 12, 0))), int(checksum(v.t()))}
    for place in (0, len(v) - 1):
        other = v.clone()
        other[place, 5] += 1
        seen.add(int(checksum(other)))
    assert len(seen) == 8
    assert checksum(v) == checksum(v.t().contiguous().t())
    assert checksum(torch.zeros(3, 0)) == 0
