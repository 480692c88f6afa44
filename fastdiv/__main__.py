"""The command line: ``python -m fastdiv info | check | bench``."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence

import numpy

from ._bench import command
from ._engine.info import build_info

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
    """Print what was built, and which of it runs here."""
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
    """Compare every loss with the reference."""
    from ._cli.check import check as run_check

    return 0 if run_check(options.losses, options.quick, options.verbose) else 1


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = argparse.ArgumentParser(prog="python -m fastdiv", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print what was built, and which of it runs here")
    checking = commands.add_parser("check", help="compare every loss with the reference")
    checking.add_argument("losses", nargs="*", metavar="LOSS", help="only these")
    checking.add_argument("--quick", action="store_true", help="short rows only")
    checking.add_argument("--verbose", action="store_true", help="a line for each combination")
    timing = commands.add_parser("bench", help="time every loss against torch")
    command.add_options(timing)
    return top


def wrong_options(options: argparse.Namespace) -> str:
    """Return what is wrong with the options, or an empty text."""
    if options.command == "bench":
        return command.wrong_options(options)
    if options.command == "check":
        from ._cli.check_cases import checked_losses

        known = [loss.name for loss in checked_losses()]
        for name in options.losses:
            if name not in known:
                return f"there is no loss {name!r} among {', '.join(dict.fromkeys(known))}"
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    top = parser()
    options = top.parse_args(arguments)
    if wrong := wrong_options(options):
        top.error(wrong)
    if options.command == "info":
        return info()
    return check(options) if options.command == "check" else command.bench(options)


if __name__ == "__main__":
    sys.exit(main())
