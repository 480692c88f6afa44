"""The ranks that share a vocabulary, and the check that all of them make the same call.

Before a call, ranks exchange a few numbers that say what each is about to do.  Groups of a CPU do
it at every call, groups of GPUs and compiled code once for each kind of call.  If one rank raises,
or the shards do not fit together, all ranks raise.  Without this check a collective would wait for
ever, or mix unrelated data.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from .._engine.torch_private import constant, is_fake, is_jit_traced
from .alike import ALIKE, check_alike

T = TypeVar("T")
Group = Any  # torch.distributed.ProcessGroup, which a torch without distributed lacks


@dataclass(frozen=True)
class World:
    """The ranks of a process group, by its name, which ops and the compiler accept."""

    name: str
    rank: int
    size: int


@dataclass(frozen=True)
class Shards:
    """How many classes every rank has."""

    world: World
    sizes: tuple[int, ...]

    @property
    def classes(self) -> int:
        """The number of all classes."""
        return sum(self.sizes)

    @property
    def first(self) -> int:
        """The first class of this rank."""
        return sum(self.sizes[: self.world.rank])


def world_of(group: Group) -> World:
    """Return the ranks of a group, or of all processes for None."""
    if is_jit_traced():
        raise RuntimeError(
            "torch.jit.trace cannot record the collectives of fastdiv.distributed: trace a model "
            "without its loss, or a function of fastdiv, which takes whole rows"
        )
    if group is None:
        return World(*_default_world())
    return World(group.group_name, dist.get_rank(group), dist.get_world_size(group))


@constant
def _default_world() -> tuple[str, int, int]:
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "fastdiv.distributed needs a process group: call torch.distributed.init_process_group "
            "first, or use the functions of fastdiv, which take whole rows"
        )
    world: Group = dist.group.WORLD
    return world.group_name, dist.get_rank(), dist.get_world_size()


# --- what a rank is about to do ---------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What must be the same on all ranks (``call``), and what may differ."""

    call: tuple[str, ...]
    classes: int = 0
    labels: tuple[int, int, int] = (0, 0, 0)  # smallest, largest, sum; of those that count
    alike: tuple[int, ...] = (0,) * len(ALIKE)  # checksums of tensors that must be the same

    def header(self, failed: bool = False) -> list[int]:
        """Return numbers of one length and dtype for every plan, so their exchange always fits."""
        digest = hashlib.blake2b(repr(self.call).encode(), digest_size=8).digest()
        code = int.from_bytes(digest, "little", signed=True)
        return [int(failed), code, self.classes, *self.labels, *self.alike]


def checked(world: World, prepare: Callable[[], T]) -> T:
    """Return what ``prepare`` returns; if it raises on one rank, raise on all ranks."""
    if torch.compiler.is_compiling():
        return prepare()
    try:
        return prepare()
    except Exception as error:
        if world.size > 1 and every_call(world.name) and not nothing_is_real():
            gather_numbers(world, Plan(()).header(failed=True))
            _gather_objects(world, f"{type(error).__name__}: {error}")
        raise


def agree(world: World, plan: Plan) -> Shards:
    """Return the shards of all ranks; raise if the ranks are about to do different things."""
    if world.size == 1 or nothing_is_real():
        return Shards(world, (plan.classes,) * world.size)
    if torch.compiler.is_compiling() or not every_call(world.name):
        of_plan = plan.call, plan.classes, plan.labels, plan.alike
        return Shards(world, _agree_once((world.name, world.rank, world.size), of_plan))
    return Shards(world, _agree(world, plan))


_agreed: dict[tuple[Any, Any], tuple[int, ...]] = {}


@constant
def _agree_once(world: tuple[str, int, int], plan: tuple[Any, ...]) -> tuple[int, ...]:
    """Return the sizes.  The arguments are plain values, since the compiler passes no others."""
    if (world, plan) not in _agreed:
        if len(_agreed) >= 1024:  # of groups that are gone, or of many numbers of rows
            _agreed.clear()
        _agreed[world, plan] = _agree(World(*world), Plan(*plan))
    return _agreed[world, plan]


def _agree(world: World, plan: Plan) -> tuple[int, ...]:
    headers = gather_numbers(world, plan.header())
    failed, codes, classes, *rest = zip(*headers, strict=True)
    labels, alike = rest[: -len(ALIKE)], rest[-len(ALIKE) :]
    if any(failed):
        texts = _gather_objects(world, None)
        rank = next(r for r, text in enumerate(texts) if text)
        raise RuntimeError(f"rank {rank} of the group refused its arguments: {texts[rank]}")
    if len(set(codes)) > 1:
        calls = _gather_objects(world, plan.call)
        common = set.intersection(*map(set, calls))
        differing = [", ".join(i for i in call if i not in common) for call in calls]
        raise RuntimeError(
            "the ranks of the group do not make the same call:\n" + _by_rank(differing)
        )
    if len(set(zip(*labels, strict=True))) > 1:
        texts = [f"{a} to {b}, with sum {s}" for a, b, s in zip(*labels, strict=True)]
        raise RuntimeError(
            "every rank must have the same labels, as global indices:\n" + _by_rank(texts)
        )
    check_alike(list(zip(*alike, strict=True)))
    return classes


def nothing_is_real() -> bool:
    """Return whether new tensors are fake, so that ranks cannot exchange numbers.

    Callers then assume that the other ranks have as many classes as this one.
    """
    return not torch.compiler.is_compiling() and is_fake(torch.empty(0))


def _by_rank(texts: list[str]) -> str:
    return "\n".join(f"  rank {r}: {text}" for r, text in enumerate(texts))


# --- the exchange -----------------------------------------------------------------------------


def _device(name: str) -> torch.device:
    """Return the device of headers: the CPU if the group supports it, so that no GPU waits."""
    if "cpu:" in dist.get_backend_config(_group(name)):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _group(name: str) -> Any:
    return distributed_c10d._resolve_process_group(name)  # type: ignore


def every_call(name: str) -> bool:
    """Return whether ranks compare every call.  Those on a GPU compare each kind of call once."""
    return _device(name).type == "cpu" or os.environ.get("FASTDIV_CHECK") == "1"


def gather_numbers(world: World, mine: list[int]) -> list[list[int]]:
    """Return the numbers of every rank, in rank order."""
    numbers = torch.tensor(mine, dtype=torch.int64, device=_device(world.name))
    return gather(world, numbers).tolist()


def _gather_objects(world: World, mine: Any) -> list[Any]:
    objects: list[Any] = [None] * world.size
    dist.all_gather_object(objects, mine, group=_group(world.name))
    return objects


def gather(world: World, mine: Tensor) -> Tensor:
    """Return this tensor of all ranks, in rank order: ``[W, ...]``."""
    ops = torch.ops._c10d_functional
    flat = ops.all_gather_into_tensor(mine.contiguous().view(-1), world.size, world.name)
    return ops.wait_tensor(flat).view(world.size, *mine.shape)


def sum_over(name: str, v: Tensor) -> Tensor:
    """Return the sum of this tensor over all ranks of a group, as a new tensor."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(v.contiguous(), "sum", name))


def scatter_sum(world: World, mine: Tensor) -> Tensor:
    """Return this rank's part of the sum of ``[W, ...]`` over all ranks, as a new tensor."""
    ops = torch.ops._c10d_functional
    flat = mine.contiguous().view(-1)
    part = ops.reduce_scatter_tensor(flat, "sum", world.size, world.name)
    return ops.wait_tensor(part).view(mine.shape[1:])
