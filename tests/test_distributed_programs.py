"""Sharded losses under autograd, the compiler, DTensor and DDP, and of linear layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from helpers import shard_dtensors, shard_linear, shard_programs, shards
from helpers.ranks import Ranks

ON_CPU = pytest.mark.cpu_only("the ranks of these tests are processes of the CPU")


@ON_CPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [2, 4])
def test_linear(ranks: Ranks, size: int, dtype: torch.dtype) -> None:
    results = ranks.run(size, shard_linear.linear, dtype)
    assert all(result == results[0] for result in results)


@ON_CPU
@pytest.mark.parametrize("size", [2, 3])
def test_linear_rows_of_infinite_divergence(ranks: Ranks, size: int) -> None:
    """The same bits whether a rank looks for such rows first, or, as on a GPU, cannot."""
    results = [r for gpu in (False, True) for r in ranks.run(size, shard_linear.infinite, gpu)]
    assert all(result == results[0] for result in results)


@ON_CPU
def test_linear_logits_are_never_held_whole(ranks: Ranks) -> None:
    assert max(ranks.run(2, shard_linear.linear_memory)) < 1024 * 3000 / 10


@ON_CPU
@pytest.mark.parametrize("size", [2, 4])
def test_linear_float_logits(ranks: Ranks, size: int) -> None:
    ranks.run(size, shard_linear.float_logits)


@ON_CPU
def test_linear_flops(ranks: Ranks) -> None:
    """Each layer's logits in the forward and in the backward, and the weight's gradient."""
    for found in ranks.run(2, shard_linear.linear_flops):
        assert found == {"cross_entropy": 3, "kl_div": 5}


@ON_CPU
@pytest.mark.parametrize("size", [2, 3])
def test_backwards(ranks: Ranks, size: int) -> None:
    ranks.run(size, shard_programs.backwards)


@ON_CPU
@pytest.mark.parametrize("size", [2, 4])
def test_statistics(ranks: Ranks, size: int) -> None:
    ranks.run(size, shard_programs.statistics)


@ON_CPU
@pytest.mark.slow
def test_compiled(ranks: Ranks) -> None:
    first, second = ranks.run(2, shard_programs.compiled)
    assert first == second


@ON_CPU
def test_fake_tensors(ranks: Ranks) -> None:
    ranks.run(2, shard_programs.fake)


@ON_CPU
@pytest.mark.slow
def test_options_that_change(ranks: Ranks) -> None:
    ranks.run(2, shard_programs.changing_options)


@ON_CPU
def test_dtensors(ranks: Ranks) -> None:
    ranks.run(4, shard_programs.dtensors)


@ON_CPU
@pytest.mark.parametrize("where", shard_dtensors.PLACEMENTS)
def test_dtensors_of_logits(ranks: Ranks, where: str) -> None:
    ranks.run(4, shard_dtensors.functions_of_logits, where)


@ON_CPU
@pytest.mark.parametrize("what", ["functions_of_layers", "terms_and_statistics", "without_values"])
def test_dtensors_everywhere(ranks: Ranks, what: str) -> None:
    ranks.run(4, getattr(shard_dtensors, what))


@ON_CPU
def test_a_weight_of_data_parallel_ranks(ranks: Ranks) -> None:
    """The error names both readings, on all ranks."""
    for kind, text in ranks.run(4, shard_dtensors.fsdp):
        assert kind == "RuntimeError" and text.startswith("input must be the same on every rank")
        assert "tensor parallelism" in text and "FSDP2" in text


@ON_CPU
def test_plain_tensors_that_differ_beside_dtensors(ranks: Ranks) -> None:
    for found in ranks.run(4, shard_dtensors.plain_tensors):
        for name, (kind, text) in found.items():
            assert kind == "RuntimeError" and "target must be the same" in text, (name, text)


@ON_CPU
@pytest.mark.parametrize("size", [2, 4])
def test_mean_over_data_parallel_ranks(ranks: Ranks, size: int) -> None:
    results = ranks.run(size, shard_programs.data_parallel)
    assert len(set(results)) == 1


def nccl_rank(rank: int, store: str, backend: str) -> None:
    torch.set_default_device(f"cuda:{rank}")
    torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=2)
    for dtype in (torch.float32, torch.bfloat16):
        shards.compare(None, rank, dtype)
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl"])
def test_nccl(tmp_path: Path, backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    torch.multiprocessing.spawn(nccl_rank, (str(tmp_path / "store"), backend), nprocs=2)
