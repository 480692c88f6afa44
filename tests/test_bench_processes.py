"""Processes that the benchmark starts end with it, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastdiv._bench.memory import Job, extra_memory
from fastdiv._bench.processes import run_apart
from helpers.processes import runs, wait_until_ended

pytestmark = [
    pytest.mark.cpu_only("processes"),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc"),
]

# Ignores SIGTERM, as valgrind does, and has a child that does, too.
VALGRIND = """#!/bin/sh
trap '' TERM HUP
sleep 500 &
echo $$ $! >"$PIDS.new"
mv "$PIDS.new" "$PIDS"
echo a line
wait
"""
# Behind nohup, or in a shell's background, signals would be ignored.
BENCH = """
import signal, sys
from fastdiv.__main__ import main
signal.signal(signal.SIGINT, signal.default_int_handler)
for kind in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(kind, signal.SIG_DFL)
sys.exit(main(["bench", "entropy", "--instructions", "--dtypes", "f32"]))
"""
RAISES = """
from fastdiv._bench.instructions import count_instructions
def advance(line): raise ZeroDivisionError(line)
count_instructions(["entropy"], ["f32"], advance)
"""


@pytest.fixture
def pids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which a valgrind that never ends writes its processes."""
    for name, text in (("valgrind", VALGRIND), ("callgrind_control", "#!/bin/sh\n")):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))
    return tmp_path / "pids"


def processes_in(file: Path) -> list[int]:
    """The processes, once they are there."""
    deadline = time.monotonic() + 120
    while not file.exists():
        assert time.monotonic() < deadline, "the benchmark did not start valgrind"
        time.sleep(0.02)
    return list(map(int, file.read_text().split()))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_instructions_that_are_cut_off_leave_no_valgrind(pids: Path, how: signal.Signals) -> None:
    quiet = subprocess.DEVNULL
    with subprocess.Popen([sys.executable, "-c", BENCH], stdout=quiet, stderr=quiet) as bench:
        try:
            started = processes_in(pids)
            assert all(map(runs, started))
            bench.send_signal(how)
            assert bench.wait(60) != 0
        finally:
            bench.kill()
    wait_until_ended(started)


def test_an_exception_leaves_no_valgrind(pids: Path) -> None:
    done = subprocess.run([sys.executable, "-c", RAISES], capture_output=True, text=True)
    assert done.returncode == 1 and "ZeroDivisionError: a line" in done.stderr
    wait_until_ended(processes_in(pids))


def test_signals_are_as_before_afterwards() -> None:
    kinds = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(kind) for kind in kinds]
    with run_apart([sys.executable, "-c", "print('here')"]) as process:
        assert process.stdout is not None and process.stdout.read() == "here\n"
        for kind, handler in zip(kinds, before, strict=True):
            ignored = handler == signal.SIG_IGN
            assert (signal.getsignal(kind) == handler) == ignored
        assert process.wait() == 0
    assert [signal.getsignal(kind) for kind in kinds] == before


def test_memory_that_is_left_unread_leaves_no_server() -> None:
    def children() -> set[str]:
        return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())

    before = children()
    peaks = extra_memory([Job("entropy", "fused", "f32", 8, 128)] * 1000)
    next(peaks)
    (server,) = children() - before
    peaks.close()  # type: ignore[attr-defined]
    wait_until_ended([int(server)])
