"""Whether processes have ended."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest


def runs(pid: int) -> bool:
    """Tell whether the process is there, and more than an entry that nobody has asked for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until_ended(pids: list[int]) -> None:
    """Wait a minute at most; kill what is left then, and fail."""
    deadline = time.monotonic() + 60
    while left := [pid for pid in pids if runs(pid)]:
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            pytest.fail(f"{len(left)} of {len(pids)} processes have not ended")
        time.sleep(0.02)
