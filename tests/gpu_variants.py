"""The kernel variants that ``gpu_check.py variants`` compares, and the speed that is predicted.

A variant is the extension with other macros for nvcc and with the four losses of
``gpu_variants.h``.  ``make gpu-kit`` builds all of them.  Predictions are for rows of 32768 classes
and come from counted instructions: a difference tells which part of the count was wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

LOSSES = ("cross_entropy", "kl_div", "js_div", "entropy")  # a kernel of each kind
BASE = "base"  # the extension itself


@dataclass(frozen=True)
class Variant:
    """A variant says what it changes in the extension, and what that should do."""

    macros: str  # as NAME=VALUE, separated by blanks
    changes: str
    predicted: str

    @property
    def flags(self) -> list[str]:
        """The flags of nvcc."""
        return [f"-D{macro}" for macro in self.macros.split()]


VARIANTS = {
    "cp_async": Variant(
        "FD_BULK_COPIES=0",
        "Each thread copies its own columns by cp.async; bulk copies of whole stages are off.",
        "Forwards of bf16 are 5 to 10 % slower, those of f32 and all backwards equal.",
    ),
    "no_slack": Variant(
        "FD_REBASE_SLACK=0",
        "Sums are rebased at every new maximum, not only at one that is far higher.",
        "Forwards of JS and KL in bf16 are 7 to 10 % slower, all others equal.",
    ),
    "stage_4k": Variant(
        "FD_STAGE_BYTES=4096",
        "A stage of the ring has 4 KiB, so that a block begins earlier and waits more often.",
        "All differences are below 3 %.",
    ),
    "block_64k": Variant(
        "FD_BLOCK_BYTES=65536",
        "A block has 64 KiB of a row, so that half as many blocks exchange results.",
        "JS forwards take 7 % fewer instructions; too few threads to hide latency may cost more.",
    ),
    "threads_256": Variant(
        "FD_BLOCK_THREADS=256",
        "Twice as many threads share the bytes of a block.",
        "Forwards in bf16 are 3 (cross entropy) to 15 % (KL, JS) slower; fixed costs double.",
    ),
}

# Bytes that a multiprocessor handles in a clock at full issue, by loss and phase: bf16, f32.
FULL_ISSUE = {
    ("cross_entropy", "forward"): (20, 28),
    ("cross_entropy", "backward"): (28, 32),
    ("cross_entropy", "forward_grad"): (21, 26),
    ("kl_div", "forward"): (19, 23),
    ("kl_div", "backward"): (29, 33),
    ("kl_div", "forward_grad"): (17, 20),
    ("js_div", "forward"): (9.3, 10),
    ("js_div", "backward"): (22, 19),
    ("js_div", "forward_grad"): (9.5, 9.1),
    ("entropy", "forward"): (17, 25),
    ("entropy", "backward"): (26, 31),
    ("entropy", "forward_grad"): (18, 24),
}
ISSUED = 0.75  # the share of full issue that such loops reach
BANDWIDTH = 0.92  # the share of a copy that a kernel reaches when only memory limits it
CLOCK = 1.98e9  # Hz, of an H200 that is busy


def predicted_share(
    loss: str, dtype: str, phase: str, multiprocessors: int, copy_gb_per_s: float
) -> float | None:
    """The predicted rate over that of a copy, or None where nothing was predicted."""
    if (loss, phase) not in FULL_ISSUE or dtype not in ("bf16", "f32"):
        return None
    rate = FULL_ISSUE[loss, phase][dtype == "f32"] * multiprocessors * CLOCK * ISSUED
    return min(BANDWIDTH, 1e-9 * rate / copy_gb_per_s)
