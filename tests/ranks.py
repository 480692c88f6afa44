"""Processes of a Gloo group on this machine, started once and used by many tests."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

MOST = 4
SECONDS = 120  # that a task may take; far more than any does


class RankFailed(Exception):
    """A task raised on some rank, or did not end; the message has its traceback."""


def _serve(rank: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=MOST,
        timeout=timedelta(seconds=SECONDS),
    )
    # Of two and three ranks, and of all: None.
    groups = {size: dist.new_group(list(range(size))) for size in range(2, MOST)}
    while (task := pipe.recv()) is not None:
        size, function, arguments = task
        torch.manual_seed(0)
        try:
            pipe.send((function(groups.get(size), rank, *arguments), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """Runs ``function(group, rank, *arguments)`` on the ranks of a group, all at once."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["fastdiv.distributed", "torch.distributed.tensor"])
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(MOST):
            ours, theirs = context.Pipe()
            arguments = (rank, str(folder / "store"), theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What it returned on every rank, in their order."""
        return self.run_each(function, [arguments] * size)

    def run_each(
        self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]
    ) -> list[Any]:
        """The same with arguments for every rank."""
        pipes = self.pipes[: len(arguments)]
        for pipe, of_rank in zip(pipes, arguments, strict=True):
            pipe.send((len(arguments), function, of_rank))
        results, failures = [], []
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(SECONDS + 10):
                self.close()
                raise RankFailed(f"rank {rank} does not answer")
            result, failure = pipe.recv()
            results.append(result)
            if failure:
                failures.append(f"rank {rank} of {len(arguments)}:\n{failure}")
        if failures:
            raise RankFailed("\n".join(failures))
        return results

    def close(self) -> None:
        """Ends the processes."""
        for pipe in self.pipes:
            try:
                pipe.send(None)
            except OSError:
                pass
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
