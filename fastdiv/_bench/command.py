"""The options of ``python -m fastdiv bench``, and what the command does with them."""

from __future__ import annotations

import argparse
import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .results import Measurements

DEFAULT_FILE = Path("-")  # the file for this machine


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = command.add_argument
    add("losses", nargs="*", metavar="LOSS", help="only these")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--quick", action="store_true", help="a smaller shape, without torch.compile")

    add = command.add_argument_group("parts, instead of every loss at every shape").add_argument
    add("--all", action="store_true", help="all of them")
    add("--scale", action="store_true", help="1 K to 256 K classes, and 1 to 64 K rows")
    counts = "with so many threads (without numbers: powers of two)"
    add("--threads", nargs="*", type=positive, metavar="N", help=counts)
    add("--overhead", action="store_true", help="calls on tiny inputs")
    add("--instructions", action="store_true", help="instructions per element, by valgrind")
    add("--linear", action="store_true", help="cross entropy of a linear layer")

    add = command.add_argument_group("what is measured").add_argument
    dtypes = ["f32", "bf16", "f16", "f64"]
    add("--dtypes", nargs="+", choices=dtypes)
    add("--shapes", nargs="+", type=shape_of, metavar="ROWSxCLASSES")
    add("--hidden", type=positive, default=512, metavar="N", help="features of the linear layer")
    add("--phases", action="store_true", help="GB/s of each phase, and of both in one pass")
    add("--no-compile", dest="compile", action="store_false")
    classes = "torch.compile with these numbers of classes only (without numbers: with all)"
    add("--compile-classes", nargs="*", type=positive, metavar="N", help=classes)
    add("--rounds", type=positive, default=3, help="at least so many (3)")
    add("--seconds", type=float, help="then more, for so long per loss, dtype and shape")
    late = "leave out what comes later"
    add("--stop-after", type=float, default=float("inf"), metavar="SECONDS", help=late)

    add = command.add_argument_group("files").add_argument
    files: dict[str, Any] = {"nargs": "?", "type": Path, "const": DEFAULT_FILE, "metavar": "FILE"}
    add("--json", help="write all measurements (to benchmarks/results/)", **files)
    add("--plot", help="draw them to FILE-*.png (beside the JSON; needs matplotlib)", **files)
    add("--show", type=Path, metavar="FILE", help="print and draw this file instead of measuring")
    add("--markdown", action="store_true", help="print the README's table")
    two = "print what moved between two files; exit with 1 if something got worse"
    add("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"), help=two)
    add("--tolerance", type=float, default=0.1, metavar="SHARE", help="allowed change (0.1)")


def shape_of(text: str) -> tuple[int, int]:
    """Read rows and classes."""
    rows, _, classes = text.partition("x")
    if not (rows.isdecimal() and classes.isdecimal() and int(rows) and int(classes)):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form ROWSxCLASSES, as 512x32000")
    return int(rows), int(classes)


def positive(text: str) -> int:
    """Read a positive number."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def wrong_options(options: argparse.Namespace) -> str:
    """Return what is wrong with the options, or an empty text."""
    from .losses import LOSSES

    for name in options.losses:
        if name not in LOSSES:
            return f"there is no loss {name!r} among {', '.join(LOSSES)}"
    if options.device == "cuda" and (why := _no_gpu()):
        return f"--device cuda: {why}"
    for file in (options.show, *(options.compare or ())):
        if file and not file.is_file():
            return f"there is no file {file}"
    for user, package in (("bench", "rich"), *([("--plot", "matplotlib")] if options.plot else [])):
        try:
            import_module(package)
        except ImportError:
            return f"{user} needs {package}: pip install 'fastdiv[bench]'"
    return ""


def _no_gpu() -> str:
    import torch

    from .. import backend, entropy

    if not torch.cuda.is_available():
        return "torch finds no GPU"
    try:
        with backend("native"):
            entropy(torch.zeros(1, 1, device="cuda"))
    except RuntimeError as error:
        return str(error)
    return ""


def bench(options: argparse.Namespace) -> int:
    """Measure, or read a file; then print, write and draw."""
    from . import plots, tables
    from .compare import compare
    from .results import Measurements, default_file

    if options.compare:
        before, after = map(Measurements.read, options.compare)
        return 1 if compare(before, after, options.tolerance) else 0
    found = Measurements.read(options.show) if options.show else _measure(options)
    if options.markdown:
        print("\n".join(tables.markdown(found)))
    else:
        tables.print_all(found, by_phase=options.phases or "gpu" in found.machine)
    usual = options.show or default_file(found.machine)
    json = usual if options.json == DEFAULT_FILE else options.json
    if json:
        found.write(json)
        print(f"written to {json}")
    if options.plot:
        drawn = (json or usual) if options.plot == DEFAULT_FILE else options.plot
        for picture in plots.draw(found, drawn.with_suffix("")):
            print(f"drawn to {picture}")
    return 0


def _measure(options: argparse.Namespace) -> Measurements:
    from .machine import describe_machine, give_each_isa_a_compiler_cache
    from .parts import PARTS
    from .results import Measurements

    give_each_isa_a_compiler_cache()
    options.started = time.perf_counter()
    # Eager torch in f16 on a CPU would take half of the time of a quick run.
    options.dtypes = options.dtypes or ["f32", "bf16", "f16"][: 2 if options.quick else 3]
    found = Measurements(describe_machine(options.device))
    chosen = {name for name in PARTS if getattr(options, name, None) not in (None, False)}
    chosen -= {"losses"}  # these are names
    for name, measure in PARTS.items():
        if options.all or name in (chosen or {"losses"}):
            measure(options, found)
    return found
