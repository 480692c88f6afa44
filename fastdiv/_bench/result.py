"""What was measured of one loss at one size: figures, what follows from them, and both as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .losses import DTYPES, LOSSES
from .timing import Timing

Shape = tuple[int, int]

PHASES = ("forward", "backward", "training", "forward_grad")  # training: forward and backward
VARIANTS = ("fused", "in_place", "eager", "compile", "liger", "quack")


@dataclass(frozen=True)
class Result:
    """Times and memory of one loss; the times by phase and variant, of which not all exist."""

    loss: str
    dtype: str
    shape: Shape
    threads: int
    copy: Timing
    times: Mapping[str, Mapping[str, Timing]]
    extra_bytes: Mapping[str, int | None] = field(default_factory=dict)

    @property
    def size(self) -> str:
        """Rows and classes, to be read."""
        return f"{self.shape[0]}×{self.shape[1]}"

    @property
    def training(self) -> Mapping[str, Timing]:
        """Times of forward and backward."""
        return self.times["training"]

    @property
    def elements(self) -> int:
        """Of the logits."""
        return self.shape[0] * self.shape[1]

    @property
    def logits_bytes(self) -> int:
        """Size of one matrix."""
        return self.elements * DTYPES[self.dtype].itemsize

    @property
    def copy_bandwidth(self) -> float:
        """GB/s of a copy, which reads a matrix and writes one."""
        return 2e-9 * self.logits_bytes / self.copy.median

    def bandwidth(self, variant: str = "fused", phase: str = "training") -> float:
        """GB/s of the least traffic that a phase can do with."""
        minimum = LOSSES[self.loss].minimum_bytes(phase, self.logits_bytes)
        return 1e-9 * minimum / self.times[phase][variant].median

    def nanoseconds(self, variant: str = "fused", phase: str = "training") -> float:
        """For an element of the logits."""
        return 1e9 * self.times[phase][variant].median / self.elements

    def copies(self, variant: str = "fused") -> float:
        """Time of forward and backward in units of one copy of the logits."""
        return self.training[variant].median / self.copy.median

    def speedup(self, over: str) -> float:
        """How many times faster than a variant forward and backward are."""
        return self.training[over].median / self.training["fused"].median

    def to_json(self) -> dict[str, Any]:
        """The measurements, and what follows from them for those who read the file."""
        loss = LOSSES[self.loss]
        return {
            "loss": self.loss,
            "dtype": self.dtype,
            "rows": self.shape[0],
            "classes": self.shape[1],
            "threads": self.threads,
            "logits_bytes": self.logits_bytes,
            "minimum_bytes": {p: loss.minimum_bytes(p, self.logits_bytes) for p in self.times},
            "copy_ms": self.copy.in_milliseconds(),
            **{
                f"{phase}_ms": {k: v.in_milliseconds() for k, v in times.items()}
                for phase, times in self.times.items()
            },
            "copy_gb_per_s": round(self.copy_bandwidth, 3),
            **{
                f"{phase}_gb_per_s": {k: round(self.bandwidth(k, phase), 3) for k in times}
                for phase, times in self.times.items()
            },
            "training_copies": {k: round(self.copies(k), 3) for k in self.training},
            "extra_bytes": dict(self.extra_bytes),
        }

    @classmethod
    def from_json(cls, written: Mapping[str, Any]) -> Result:
        """The measurements; what follows is found anew."""
        return cls(
            written["loss"],
            written["dtype"],
            (written["rows"], written["classes"]),
            written["threads"],
            Timing.from_milliseconds(written["copy_ms"]),
            {
                phase: {k: Timing.from_milliseconds(v) for k, v in written[f"{phase}_ms"].items()}
                for phase in PHASES
                if f"{phase}_ms" in written
            },
            written["extra_bytes"],
        )
