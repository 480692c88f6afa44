"""The records of a run, and the JSON file that holds them.

A record is a dict with the keys of the file.  In ``record["training_ms"]["fused"]`` the phase is
forward and backward together, and the variant is fastdiv's loss, not in place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .losses import DTYPES, LOSSES
from .machine import describe_machine
from .timing import Timing

Record = dict[str, Any]
Shape = tuple[int, int]

FOLDER = Path("benchmarks/results")
PHASES = ("forward", "backward", "training", "forward_grad")
OTHERS = ("eager", "compile", "liger", "quack")
VARIANTS = ("fused", "in_place", "limit", *OTHERS)  # limit is the yardstick of .limit
COPY = ("copy", "")  # the copy of the logits, among the phases and variants


@dataclass
class Measurements:
    """A list of records for each part of the benchmark, empty where it did not run."""

    machine: Record
    results: list[Record] = field(default_factory=list)
    by_classes: list[Record] = field(default_factory=list)
    by_rows: list[Record] = field(default_factory=list)
    threads: list[Record] = field(default_factory=list)
    overhead: list[Record] = field(default_factory=list)
    instructions: list[Record] = field(default_factory=list)
    linear: list[Record] = field(default_factory=list)
    linear_memory: list[Record] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write the file, with the load average at the end besides that at the start."""
        after = describe_machine()["load_average"]
        written = {**vars(self), "machine": {**self.machine, "load_average_after": after}}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(written, indent=1, default=vars) + "\n")

    @classmethod
    def read(cls, path: Path) -> Measurements:
        """Read a file."""
        return cls(**json.loads(path.read_text(), object_hook=_with_timing))


def _with_timing(found: Record) -> Record | Timing:
    return Timing(**found) if "median" in found else found


def default_file(machine: Record) -> Path:
    """Return the file for this machine; runs on similar machines replace each other."""
    parts = [machine["cpu"], machine.get("cpu_isa", "no kernels"), f"{machine['threads']} threads"]
    if "gpu" in machine:
        parts = [machine["gpu"]["name"]]
    return FOLDER / (re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-") + ".json")


def make_result(
    loss: str,
    dtype: str,
    shape: Shape,
    threads: int,
    times: Mapping[tuple[str, str], Timing],
    extra_bytes: Mapping[str, int | None],
) -> Record:
    """Return the record of a loss from its times by phase and variant, of which some may lack."""
    logits_bytes = shape[0] * shape[1] * DTYPES[dtype].itemsize
    by_phase = {p: {v: times[p, v] for v in VARIANTS if (p, v) in times} for p in PHASES}
    by_phase = {phase: variants for phase, variants in by_phase.items() if variants}
    record = {
        "loss": loss,
        "dtype": dtype,
        "rows": shape[0],
        "classes": shape[1],
        "threads": threads,
        "logits_bytes": logits_bytes,
        "minimum_bytes": {p: LOSSES[loss].minimum_bytes(p, logits_bytes) for p in by_phase},
        "copy_ms": times[COPY],
        **{f"{phase}_ms": variants for phase, variants in by_phase.items()},
    }
    record["copy_gb_per_s"] = round(copy_gb_per_s(record), 3)
    for phase, variants in by_phase.items():
        rates = {v: round(gb_per_s(record, v, phase), 3) for v in variants}
        record[f"{phase}_gb_per_s"] = rates
    record["training_copies"] = {v: round(copies(record, v), 3) for v in by_phase["training"]}
    return {**record, "extra_bytes": dict(extra_bytes)}


def size_of(record: Record) -> str:
    """Return the rows and classes of a record as text."""
    return f"{record['rows']}×{record['classes']}"


def copy_gb_per_s(record: Record) -> float:
    """Return the rate of a copy, which reads one matrix and writes one."""
    return 2e-6 * record["logits_bytes"] / record["copy_ms"].median


def gb_per_s(record: Record, variant: str = "fused", phase: str = "training") -> float:
    """Return the rate of the least traffic of a phase."""
    return 1e-6 * record["minimum_bytes"][phase] / record[f"{phase}_ms"][variant].median


def copies(record: Record, variant: str = "fused") -> float:
    """Return the time of forward and backward in units of one copy of the logits."""
    return record["training_ms"][variant].median / record["copy_ms"].median


def nanoseconds(record: Record) -> float:
    """Return the time of forward and backward per element of the logits."""
    return 1e6 * record["training_ms"]["fused"].median / (record["rows"] * record["classes"])


def speedup(record: Record, over: str) -> float:
    """Return how many times faster forward and backward are than those of a variant."""
    return record["training_ms"][over].median / record["training_ms"]["fused"].median


def over_limit(record: Record, phase: str) -> float:
    """Return the time of a phase in units of its yardstick's time."""
    times = record[f"{phase}_ms"]
    return times["fused"].median / times["limit"].median
