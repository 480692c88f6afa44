"""All that a run measured, and the file it is kept in."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .instructions import Count
from .linear import LinearMemory, LinearResult
from .machine import describe_machine
from .overhead import Overhead
from .result import Result

FOLDER = Path("benchmarks/results")


@dataclass
class Measurements:
    """A list for each part of the benchmark, empty where it did not run."""

    machine: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    by_classes: list[Result] = field(default_factory=list)
    by_rows: list[Result] = field(default_factory=list)
    threads: list[Result] = field(default_factory=list)
    overhead: list[Overhead] = field(default_factory=list)
    instructions: list[Count] = field(default_factory=list)
    linear: list[LinearResult] = field(default_factory=list)
    linear_memory: list[LinearMemory] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """As JSON; the load average is also that of the end."""
        after = describe_machine()["load_average"]
        written: dict[str, Any] = {"machine": {**self.machine, "load_average_after": after}}
        for part in PARTS:
            written[part] = [entry.to_json() for entry in getattr(self, part)]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(written, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Measurements:
        """What ``write`` wrote."""
        written: Mapping[str, Any] = json.loads(path.read_text())
        parts = {
            part: [kind.from_json(entry) for entry in written.get(part, ())]
            for part, kind in PARTS.items()
        }
        return cls(dict(written["machine"]), **parts)


PARTS: dict[str, Any] = {
    **dict.fromkeys(("results", "by_classes", "by_rows", "threads"), Result),
    "overhead": Overhead,
    "instructions": Count,
    "linear": LinearResult,
    "linear_memory": LinearMemory,
}
assert list(PARTS) == [part.name for part in fields(Measurements)][1:]


def default_file(machine: Mapping[str, Any]) -> Path:
    """Where the figures of this machine are kept: runs on machines alike replace each other."""
    name = machine["gpu"]["name"] if "gpu" in machine else machine["cpu"]
    parts = [name]
    if "gpu" not in machine:
        parts += [machine.get("cpu_isa", "no kernels"), f"{machine['threads']} threads"]
    return FOLDER / (re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-") + ".json")
