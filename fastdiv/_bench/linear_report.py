"""The table of linear losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .._cli.console import print_table
from .linear import LinearResult
from .report import busy_line, machine_line

CAPTION = """\
Cross entropy of a linear layer, forward and backward. Products: time over that of the three matrix
products alone. Extra: peak memory beyond arguments and gradients, as the system counts it, and that
over the logits' size. Medians of interleaved rounds; ±: half the interquartile range.\
"""
STYLES = {
    "eager": ("eager torch", "#bdbdbd"),
    "compile": ("torch.compile", "#9970ab"),
    "chunked": ("torch's chunks", "#d6604d"),
    "fused": ("fastdiv", "#1b7837"),
    "per_row": ("fastdiv, reduction='none'", "#7fbf7b"),
}


def print_linear(results: Sequence[LinearResult], machine: Mapping[str, Any]) -> None:
    """A row for every size and variant."""
    rows = []
    for result in results:
        job = result.job
        for name, timing in result.times.items():
            extra = result.extra_bytes.get(name)
            rows.append(
                [
                    STYLES[name][0] if name in STYLES else "three products",
                    job.dtype,
                    f"{job.rows}×{job.hidden}×{job.classes}",
                    f"{timing.median * 1e3:.0f}",
                    f"{100 * timing.spread / timing.median:.0f}",
                    f"{result.products(name):.2f}",
                    "" if extra is None else f"{extra / 1e6:.1f}",
                    "" if extra is None else f"{100 * extra / job.logits_bytes:.1f}",
                ]
            )
    print_table(
        f"fastdiv {machine['fastdiv']} on {machine_line(machine)}",
        ["", "dtype", "rows×hidden×classes", "f+b\nms", "±\n%", "products", "extra\nMB",
         "of logits\n%"],
        rows,
        names=3,
        caption=CAPTION + busy_line(machine),
    )  # fmt: skip
