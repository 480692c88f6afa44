"""Processes of a Gloo group on this machine, started once and used by many tests."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

MOST = 4
SECONDS = 240  # that a task may take; far more than any does, on a busy machine too


class RankFailed(Exception):
    """A task raised on some rank, or did not end; the message has its traceback."""


def _serve(rank: int, store: str, pipe: Connection) -> None:
    stack = open(f"{store}.{rank}", "w")  # faulthandler writes to it for as long as this runs
    faulthandler.register(signal.SIGUSR1, file=stack)  # whatever the rank hangs in
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
        self.folder, self.starts = folder, 0
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["fastdiv.distributed", "torch.distributed.tensor"])
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []

    def _start(self) -> None:
        self.starts += 1
        for rank in range(MOST):
            ours, theirs = self.context.Pipe()
            arguments = (rank, str(self.folder / f"store{self.starts}"), theirs)
            process = self.context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What it returned on every rank, in their order."""
        if not self.processes:
            self._start()
        pipes = self.pipes[:size]
        for pipe in pipes:
            pipe.send((size, function, arguments))
        results, failures = [], {}
        for rank, pipe in enumerate(pipes):
            # Who waits for a rank that has failed need not be waited for.
            if not pipe.poll(5 if failures else SECONDS):
                failures[rank] = f"does not answer\n{self._stack(rank)}"
                continue
            try:
                result, failure = pipe.recv()
            except EOFError:
                result, failure = None, "is gone"
            results.append(result)
            if failure:
                failures[rank] = failure
        if any(text.startswith(("does not answer", "is gone")) for text in failures.values()):
            self.close()
        if failures:
            lines = (f"rank {rank} of {size}: {text}" for rank, text in failures.items())
            raise RankFailed("\n".join(lines))
        return results

    def _stack(self, rank: int) -> str:
        """Where a rank is that does not answer."""
        os.kill(self.processes[rank].pid, signal.SIGUSR1)
        file = self.folder / f"store{self.starts}.{rank}"
        text = ""
        for _ in range(50):
            time.sleep(0.1)
            before, text = text, file.read_text()
            if text and text == before:  # all of it is there
                break
        return text

    def close(self) -> None:
        """Ends the processes; the next task starts new ones."""
        for pipe in self.pipes:
            try:
                pipe.send(None)
            except OSError:
                pass
        for process in self.processes:
            process.join(3)
            if process.is_alive():
                process.kill()
        self.pipes, self.processes = [], []
