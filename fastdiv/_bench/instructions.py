"""Instructions per element, counted by valgrind: they show a slowdown even on a busy machine.

Every loss is called with few rows and with more.  The difference, divided by the elements, is the
cost of the kernels.  On any machine with the same instruction set, torch and compiler the count
repeats within 0.1 %; a time does not.  Valgrind has no AVX-512 and emulates a processor with AVX2.

All calls run in one process under callgrind, because ``torch.utils.benchmark``'s
``collect_callgrind`` starts one per statement, which takes 50 seconds.
"""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from .losses import DTYPES, LOSSES
from .processes import run_apart
from .results import Record
from .timing import Advance

CLASSES = 16384
ROWS = (1, 9)
REPEATS = 3  # of which the least counts: now and then Python or torch does something else, too
WARM_UP = 10  # calls, after which Python has specialised its code and torch has filled its caches
PHASES = ("forward", "training")
MARKED = "counted"  # begins the name of a call's dump


def why_not() -> str:
    """Return why nothing can be counted here; empty if it can."""
    missing = [tool for tool in ("valgrind", "callgrind_control") if not shutil.which(tool)]
    return f"needs {' and '.join(missing)}" if missing else ""


def count_instructions(
    losses: Sequence[str], dtypes: Sequence[str], advance: Advance
) -> list[Record]:
    """Run this module under valgrind, and read what it counted."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "callgrind")
        command = ["valgrind", "-q", "--tool=callgrind", f"--callgrind-out-file={out}"]
        command += ["--instr-atstart=no"]  # halves the time of the imports
        command += [sys.executable, "-m", __name__, json.dumps([losses, dtypes])]
        same_hashes = {**os.environ, "PYTHONHASHSEED": "0"}
        said = ""  # in the end the instruction set
        with run_apart(command, same_hashes, stderr=subprocess.DEVNULL) as counted:
            assert counted.stdout is not None
            for line in counted.stdout:
                said = line.strip()
                advance(said)
            if code := counted.wait():
                raise RuntimeError(f"valgrind ended with {code}")
        totals: dict[str, int] = {}
        for key, total in _totals(Path(folder)):
            totals[key] = min(total, totals.get(key, total))

    def per_element(call: str) -> float:
        few, many = ROWS
        more = totals[f"{call} {many}"] - totals[f"{call} {few}"]
        return round(more / ((many - few) * CLASSES), 3)

    return [
        {
            "loss": name,
            "dtype": dtype,
            "phase": phase,
            "isa": said,
            "per_element": per_element(f"{name} {dtype} {phase}"),
        }
        for name in losses
        for dtype in dtypes
        for phase in PHASES
    ]


def _totals(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield the name of each dump, and its number of instructions."""
    for file in folder.iterdir():
        text = file.read_text()
        name = re.search(rf"^desc: Trigger: dump {MARKED} (.*)$", text, re.MULTILINE)
        total = re.search(r"^totals: (\d+)", text, re.MULTILINE)
        if name and total:
            yield name[1], int(total[1])


# --- inside valgrind --------------------------------------------------------------------------


def _control(*what: str) -> None:
    command = ["callgrind_control", *what, str(os.getpid())]
    # Not captured: how often Python waits for output differs from run to run.
    nowhere = subprocess.DEVNULL
    subprocess.run(command, stdout=nowhere, stderr=nowhere, check=True)


def _call_each(losses: Sequence[str], dtypes: Sequence[str]) -> None:
    torch.set_num_threads(1)
    gc.disable()
    _control("-i", "on")
    for name in losses:
        for dtype in dtypes:
            calls = {rows: _calls(name, dtype, rows) for rows in ROWS}
            for phase in PHASES:
                for _ in range(WARM_UP):
                    calls[ROWS[0]][phase]()
                for rows in REPEATS * ROWS:
                    calls[rows][phase]()
                    _control("-z")
                    calls[rows][phase]()
                    _control("-d", f"{MARKED} {name} {dtype} {phase} {rows}")
            print(f"{name} {dtype}", flush=True)


def _calls(name: str, dtype: str, rows: int) -> dict[str, Callable[[], object]]:
    loss = LOSSES[name]
    x, *target = loss.make_inputs((rows, CLASSES), DTYPES[dtype])
    leaf = x.clone().requires_grad_()
    return {
        "forward": lambda: loss.fused(x, *target),
        "training": lambda: torch.autograd.grad(loss.fused(leaf, *target), leaf),
    }


if __name__ == "__main__":
    from .._engine.info import build_info

    _call_each(*json.loads(sys.argv[1]))
    print(build_info()["cpu_isa"])
