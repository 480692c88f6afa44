"""Instructions for an element, counted by valgrind: a slowdown shows however busy the machine is.

Every loss is called with few rows and with more; the difference, divided by the elements, is what
the kernels take.  The count repeats within a permille on any machine that runs the same instruction
set, torch and compiler, which a time does not.  valgrind knows no AVX-512: it stands for a
processor with AVX2.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .._cli.console import Advance
from .apart import run_apart
from .losses import DTYPES, LOSSES

CLASSES = 16384
ROWS = (1, 9)
REPEATS = 3  # of which the least counts: now and then Python or torch do something else, too
WARM_UP = 10  # calls after which Python has specialised its code, and torch filled its caches
PHASES = ("forward", "training")
MARKED = "counted"  # what the dumps of a call are named


@dataclass(frozen=True)
class Count:
    """Instructions for an element of the logits."""

    loss: str
    dtype: str
    phase: str
    isa: str
    per_element: float

    def to_json(self) -> dict[str, Any]:
        """For the JSON file."""
        return asdict(self)

    @classmethod
    def from_json(cls, written: Mapping[str, Any]) -> Count:
        """From the JSON file."""
        return cls(**written)


def why_not() -> str:
    """Why nothing can be counted here; empty if it can."""
    missing = [tool for tool in ("valgrind", "callgrind_control") if not shutil.which(tool)]
    return f"needs {' and '.join(missing)}" if missing else ""


def count_instructions(
    losses: Sequence[str], dtypes: Sequence[str], advance: Advance
) -> list[Count]:
    """Runs this module under valgrind, and reads what it counted."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "callgrind")
        command = ["valgrind", "-q", "--tool=callgrind", f"--callgrind-out-file={out}"]
        command += ["--instr-atstart=no"]  # imports are not counted, and so take half the time
        command += [sys.executable, "-m", __name__, json.dumps([losses, dtypes])]
        same_hashes = {**os.environ, "PYTHONHASHSEED": "0"}
        said = ""  # at last the instruction set
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
        Count(name, dtype, phase, said, per_element(f"{name} {dtype} {phase}"))
        for name in losses
        for dtype in dtypes
        for phase in PHASES
    ]


def _totals(folder: Path) -> Iterator[tuple[str, int]]:
    """What each dump is called, and how many instructions it holds."""
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
