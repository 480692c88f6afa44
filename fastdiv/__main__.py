"""The command line: ``python -m fastdiv info | check | bench``."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy

from ._info import build_info

# More than caches hold: 268 MB of half logits.  Powers of two, and the vocabulary of GPT-2.
GPU_ELEMENTS = 2**27
GPU_CLASSES = sorted([2**n for n in range(8, 19)] + [50257])

INFO_LABELS = {
    "fastdiv": "fastdiv",
    "torch": "torch",
    "compiler": "compiler",
    "cpu_isas_built": "instruction sets, built",
    "cpu_isas_supported": "instruction sets, supported",
    "cpu_isa": "instruction set, in use",
    "threads": "threads",
    "backend": "backend",
    "cuda": "CUDA kernels",
    "cuda_architectures": "CUDA architectures",
    "cuda_toolkit": "CUDA toolkit",
    "native": "kernels",
    "load_error": "why there are none",
}


def info() -> int:
    """Prints what was built and what of it runs here."""
    from ._bench.machine import cpu_model

    facts = build_info()
    lines = {
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "processor": cpu_model(),
        **{label: facts[key] for key, label in INFO_LABELS.items() if key in facts},
        **{key: fact for key, fact in facts.items() if key not in INFO_LABELS},
    }
    width = max(map(len, lines))
    for label, fact in lines.items():
        print(f"{label:{width}}  {_readable(fact)}")
    return 0


def _readable(fact: object) -> str:
    if isinstance(fact, bool):
        return "yes" if fact else "no"
    if isinstance(fact, (list, tuple)):
        return ", ".join(map(str, fact)) or "none"
    return str(fact)


def check(options: argparse.Namespace) -> int:
    """Compares every loss with the reference."""
    from ._selfcheck import check as run_check

    return 0 if run_check(options.losses, options.quick, options.verbose) else 1


def bench(options: argparse.Namespace) -> int:
    """Times losses or calls, prints the table, and writes the files that were asked for."""
    from ._bench import plots, report
    from ._bench.console import progress
    from ._bench.losses import LOSSES
    from ._bench.machine import describe_machine
    from ._bench.overhead import run_overhead
    from ._bench.run import Plan, run
    from ._bench.timing import Budget

    if options.linear:
        return bench_linear(options)
    names, on_gpu = options.losses or list(LOSSES), options.device == "cuda"
    seconds = (
        (1.0 if options.quick or on_gpu else 6.0) if options.seconds is None else options.seconds
    )
    budget = Budget(seconds, options.rounds)
    machine = describe_machine(options.device)
    results, overheads = [], []
    if options.overhead:
        with progress("overhead", len(names)) as advance:
            overheads = run_overhead(names, budget, advance, options.device)
        report.print_overhead(overheads, machine)
    else:
        plan = Plan(
            names,
            options.dtypes,
            options.shapes or _default_shapes(options),
            budget,
            compile=options.compile and not options.quick,
            device=options.device,
            every_phase=options.phases or on_gpu,
            compiled_classes=options.compile_classes,
            seconds=options.stop_after,
        )
        with progress("bench", plan.steps) as advance:
            results = run(plan, advance)
        by_phase = plan.every_phase
        (report.print_bandwidths if by_phase else report.print_results)(results, machine)
    for file in filter(None, (options.json, options.plot)):
        file.parent.mkdir(parents=True, exist_ok=True)
    if options.json:
        text = json.dumps(report.to_json(machine, results, overheads), indent=1)
        options.json.write_text(text + "\n")
    if options.plot:
        (plots.plot_bandwidths if by_phase else plots.plot_copies)(results, machine, options.plot)
    return 0


def bench_linear(options: argparse.Namespace) -> int:
    """Times linear cross entropy and measures its memory; shapes are of the logits."""
    from ._bench import linear
    from ._bench.console import progress
    from ._bench.machine import describe_machine
    from ._bench.timing import Budget

    machine = describe_machine(options.device)
    budget = Budget(6.0 if options.seconds is None else options.seconds, options.rounds)
    sizes = [
        linear.LinearJob("fused", dtype, rows, options.hidden, classes, options.device)
        for rows, classes in options.shapes or [(1024, 32000)]
        for dtype in options.dtypes
    ]
    compiled, points = options.compile and not options.quick, []
    with progress(
        "bench", 2 * len(sizes) + (6 * len(options.dtypes) if options.plot else 0)
    ) as step:
        results = linear.run_linear(sizes, budget, compiled, step)
        if options.plot:
            for size in sizes[: len(options.dtypes)]:
                points += linear.memory_by_rows(size, step)
    linear.print_linear(results, machine)
    for file in filter(None, (options.json, options.plot)):
        file.parent.mkdir(parents=True, exist_ok=True)
    if options.json:
        measured = {
            "machine": machine,
            "linear": [result.to_json() for result in results],
            "memory": [{**job._asdict(), "extra_bytes": extra} for job, extra in points],
        }
        options.json.write_text(json.dumps(measured, indent=1) + "\n")
    if options.plot:
        linear.plot_memory(points, machine, options.plot)
    return 0


def _default_shapes(options: argparse.Namespace) -> list[tuple[int, int]]:
    if options.device == "cpu":
        return [(128, 32000) if options.quick else (512, 32000)]
    classes = [1024, 8192, 50257, 131072] if options.quick else GPU_CLASSES
    return [(GPU_ELEMENTS // c, c) for c in classes]


def _shape(text: str) -> tuple[int, int]:
    rows, _, classes = text.partition("x")
    if not (rows.isdecimal() and classes.isdecimal() and int(rows) and int(classes)):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form ROWSxCLASSES, as 512x32000")
    return int(rows), int(classes)


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The options of all commands."""
    top = argparse.ArgumentParser(prog="python -m fastdiv", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what was built, and what of it runs here")
    checking = commands.add_parser("check", help="compare every loss with the reference")
    checking.add_argument("losses", nargs="*", metavar="LOSS", help="only these")
    checking.add_argument("--quick", action="store_true", help="short rows only")
    checking.add_argument("--verbose", action="store_true", help="a line for every combination")
    timing = commands.add_parser("bench", help="time every loss against torch")
    timing.add_argument("losses", nargs="*", metavar="LOSS", help="only these")
    timing.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    timing.add_argument("--quick", action="store_true", help="less, without torch.compile")
    timing.add_argument("--shapes", nargs="+", type=_shape, metavar="ROWSxCLASSES")
    timing.add_argument(
        "--dtypes", nargs="+", choices=["f32", "bf16", "f16", "f64"], default=["f32", "bf16"]
    )
    timing.add_argument("--no-compile", dest="compile", action="store_false")
    timing.add_argument(
        "--compile-classes",
        nargs="+",
        type=_positive,
        default=[],
        metavar="N",
        help="torch.compile with these numbers of classes only (it takes seconds each)",
    )
    timing.add_argument(
        "--phases",
        action="store_true",
        help="GB/s of the forward, the backward, both, and both in one pass; always on a GPU",
    )
    timing.add_argument(
        "--linear", action="store_true", help="cross entropy of a linear layer instead"
    )
    timing.add_argument(
        "--hidden", type=_positive, default=512, metavar="N", help="features of that layer"
    )
    timing.add_argument("--overhead", action="store_true", help="calls on tiny inputs instead")
    timing.add_argument("--seconds", type=float, help="time for each loss, dtype and shape")
    timing.add_argument(
        "--stop-after",
        type=float,
        default=float("inf"),
        metavar="SECONDS",
        help="leave out what does not fit",
    )
    timing.add_argument("--rounds", type=_positive, default=5, help="at the least")
    timing.add_argument("--json", type=Path, metavar="FILE", help="write all measurements")
    timing.add_argument("--plot", type=Path, metavar="FILE", help="draw them (needs matplotlib)")
    return top


def check_options(options: argparse.Namespace) -> str:
    """What is wrong with the options; empty if nothing is."""
    if options.command == "info":
        return ""
    if options.command == "check":
        from ._selfcheck_cases import checked_losses

        known = [loss.name for loss in checked_losses()]
    else:
        from ._bench.losses import LOSSES

        known = list(LOSSES)
    for name in options.losses:
        if name not in known:
            return f"there is no loss {name!r} among {', '.join(dict.fromkeys(known))}"
    if options.command == "bench" and options.device == "cuda" and (why := _no_gpu()):
        return f"--device cuda: {why}"
    if options.command == "bench" and options.plot:
        if options.overhead:
            return "--plot draws no overhead"
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            return "--plot needs matplotlib: pip install 'fastdiv[bench]'"
    return ""


def _no_gpu() -> str:
    import torch

    from . import backend, entropy

    if not torch.cuda.is_available():
        return "torch finds no GPU"
    try:
        with backend("native"):
            entropy(torch.zeros(1, 1, device="cuda"))
    except RuntimeError as error:
        return str(error)
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    top = parser()
    options = top.parse_args(arguments)
    if wrong := check_options(options):
        top.error(wrong)
    if options.command == "info":
        return info()
    return check(options) if options.command == "check" else bench(options)


if __name__ == "__main__":
    sys.exit(main())
