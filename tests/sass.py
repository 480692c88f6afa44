"""Count what the CUDA kernels cost, in the machine code of the extension: no GPU is needed.

    python tests/sass.py                  a table of all losses, as Markdown
    python tests/sass.py --json [FILE]    all figures as JSON, to a file or to the terminal
    python tests/sass.py a.o b.cubin      of these objects, cubins or libraries instead

The share is a prediction for rows of 32768 classes: how much of the bandwidth of a copy a kernel
reaches, if instructions are what limits it.  It knows nothing of latency.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

import fastdiv._C as native
from helpers.kernel_cost import Cost, costs
from helpers.launch_shapes import Launch, launches

KERNELS = ("forward", "backward", "forward_grad")


def record(launch: Launch, cost: Cost) -> dict[str, object]:
    """Return the JSON of one kernel of a loss."""
    return launch._asdict() | cost._asdict()


def count(files: list[str], selected: list[Launch]) -> dict[Launch, Cost | str]:
    """Return what ``costs`` finds in some files, in the order of the launches."""
    found = {launch: cost for file in files for launch, cost in costs(file, selected).items()}
    return {launch: found[launch] for launch in selected if launch in found}


def table(found: dict[Launch, Cost]) -> str:
    """Return the figures as Markdown, a line for each kernel; losses may share one."""
    lines = []
    for architecture in sorted({launch.architecture for launch in found}):
        for dtype in ("bf16", "f32"):
            rows: dict[object, tuple[list[str], Launch, Cost]] = {}
            for launch, cost in found.items():
                if (launch.architecture, launch.dtype) == (architecture, dtype):
                    names, *_ = rows.setdefault(launch.entry, ([], launch, cost))
                    names.append(launch.loss)
            if rows:
                lines += ["", f"**sm_{architecture}, {dtype}**", "", *HEAD]
            for kernel in KERNELS:
                lines += [line(*row) for row in rows.values() if row[1].kernel == kernel]
    return "\n".join(lines[1:])


HEAD = [
    "| kernel | losses | target | instructions | with rebase | fixed | registers | blocks "
    "| KiB in flight | loads early | share |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
]


def line(names: list[str], launch: Launch, cost: Cost) -> str:
    cells = [
        launch.kernel,
        ", ".join(names),
        launch.target,
        f"{cost.instructions_per_element:.1f}",
        f"{cost.with_rebase:.1f}",
        f"{cost.fixed_instructions}",
        f"{cost.registers}",
        f"{cost.blocks_per_sm}",
        f"{cost.bytes_in_flight_per_sm / 1024:.0f}",
        "yes" if cost.next_tile_loaded_early else "no",
        f"{cost.predicted_share_of_copy:.0%}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", default=[native.__file__], metavar="FILE")
    parser.add_argument(
        "--table", action="store_true", help="print the table, also with --json FILE"
    )
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON")
    arguments = parser.parse_args()
    try:
        counted = count(arguments.files, launches())
    except (pytest.skip.Exception, RuntimeError) as problem:  # without tools, or without kernels
        sys.exit(str(problem))
    found = {launch: cost for launch, cost in counted.items() if isinstance(cost, Cost)}
    problems = sorted({cost for cost in counted.values() if isinstance(cost, str)})
    if not counted:
        problems = [f"no kernels of bf16 or f32 in {', '.join(arguments.files)}"]
    text = json.dumps([record(launch, cost) for launch, cost in found.items()], indent=1)
    if arguments.json not in (None, "-"):
        Path(arguments.json).write_text(text + "\n")
    if arguments.table or arguments.json is None:
        print(table(found))
    elif arguments.json == "-":
        print(text)
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
