"""Builds, checks and measures fastdiv on a GPU: what ``make gpu-check`` runs, without network.

Everything happens in a copy of the tree, build/gpu-check-tree, with the interpreter that runs this
script.  It needs torch for CUDA, numpy, pytest, hypothesis and scipy, and rich for the benchmark.
It needs nvcc too, unless build/gpu-kit holds the extension.  What one wants to know first comes
first.  A step that fails does not keep the others from running.  A late one is asked for what it
has found, and then ended.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu_compare import extended
from gpu_steps import NEEDED, STEPS, Check

ROOT = Path(__file__).resolve().parent.parent
KIT = ROOT / "build" / "gpu-kit"
PATIENCE = 10  # seconds that a late step gets to say what it has found
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", ".nox", ".*_cache", ".hypothesis", "__pycache__", "build", "*.so", "*.egg-info"
)
PROBE = """
import torch
print(torch.__version__)
if torch.cuda.is_available():
    print(torch.cuda.get_device_name())
    print("{}{}".format(*torch.cuda.get_device_capability()))
"""


@dataclass(frozen=True)
class Machine:
    """The torch and the GPU that this interpreter finds."""

    torch: str
    gpu: str  # empty: none
    capability: str

    @classmethod
    def find(cls) -> Machine:
        done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"gpu-check: {sys.executable} has no torch that works:\n{done.stderr}")
        return cls(*(done.stdout.splitlines() + ["", ""])[:3])

    def __str__(self) -> str:
        return f"{self.gpu or 'no GPU'}, torch {self.torch}"


@dataclass(frozen=True)
class Outcome:
    """How a step went."""

    name: str
    result: str  # PASS, FAIL, LATE (stopped, out of time), SKIP
    seconds: float
    note: str

    def __str__(self) -> str:
        return f"{self.name:10} {self.result:5} {self.seconds:5.0f} s  {self.note}".rstrip()


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and all that it started; pytest first says which tests have failed."""
    for how in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:
            break
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def run_step(name: str, check: Check, environment: dict[str, str], at_most: float) -> Outcome:
    step = STEPS[name]
    slower = 4 if check.dry_run else 1  # the seconds of a step are those of a GPU
    check = dataclasses.replace(check, seconds=min(step.seconds * slower, at_most))
    command = step.command(check)
    if isinstance(command, str):
        return Outcome(name, "SKIP", 0, command)
    if check.seconds < 5:
        return Outcome(name, "SKIP", 0, "no time left")
    log, start, code = check.out / "log.txt", time.monotonic(), None
    with log.open("a") as file:
        file.write(f"\n===== {name}: {' '.join(command)}\n")
        begin = file.tell()
        file.flush()
        process = subprocess.Popen(
            command,
            cwd=check.tree,
            env={**environment, **dict(step.environment)},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(check.seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            stop(process)
    took = time.monotonic() - start
    with log.open("rb") as file:
        file.seek(begin)
        lines = file.read().decode(errors="replace").split("\n")
    lines = [line for line in lines if line.strip()]
    if code != 0:
        print("\n".join(f"  | {line}" for line in lines[-25:]), flush=True)
    note = f"stopped after {check.seconds:.0f} s; " if code is None else ""
    result = "LATE" if code is None else "FAIL" if code else "PASS"
    return Outcome(name, result, took, note + (lines[-1].strip("= ")[:120] if lines else ""))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT") or "build/gpu-check")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, as far as that goes")
    parser.add_argument("--minutes", type=float, default=8.5, help="for everything")
    parser.add_argument("--select", default="", metavar="EXPRESSION", help="tests: pytest's -k")
    only_build = "only build for these architectures (as 90), into build/gpu-kit"
    parser.add_argument("--prebuild", default="", metavar="ARCHS", help=only_build)
    options = parser.parse_args(arguments)
    if unknown := set(options.steps) - set(STEPS):
        parser.error(f"no step {', '.join(sorted(unknown))} among {', '.join(STEPS)}")
    return options


def environment_of(architectures: str) -> dict[str, str]:
    """The environment of the steps: of the settings that are the user's, only architectures."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FASTDIV_")}
    environment["FASTDIV_CUDA_ARCHS"] = os.environ.get("FASTDIV_CUDA_ARCHS", architectures)
    # Lines for the sanitizers.  make's warnings as errors stay with make build.
    environment["FASTDIV_NVCC_FLAGS"] = "-lineinfo"
    return {**environment, "PYTHONUNBUFFERED": "1"}


def copy_tree() -> Path:
    """The sources as they are now; objects of an earlier run stay, for what has not changed."""
    tree = ROOT / "build" / "gpu-check-tree"
    tree.mkdir(parents=True, exist_ok=True)
    for old in tree.iterdir():
        if old.name != "build":
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    shutil.copytree(ROOT, tree, ignore=NOT_COPIED, dirs_exist_ok=True)
    # An older pytest than the one we develop with will do.
    project = tree / "pyproject.toml"
    project.write_text(project.read_text().replace('minversion = "9.0"\n', ""))
    return tree


def prebuild(architectures: str) -> int:
    """Builds with CUDA kernels for a machine that is elsewhere; see gpu_kit.py."""
    command = [sys.executable, "tests/gpu_kit.py", str(KIT), architectures]
    return subprocess.run(command, cwd=copy_tree(), env=environment_of(architectures)).returncode


def main() -> int:
    options, start = parse(), time.monotonic()
    if options.prebuild:
        return prebuild(options.prebuild)
    machine = Machine.find()
    print(f"gpu-check: {machine}, {sys.executable}", flush=True)
    if not machine.gpu and not options.dry_run:
        print(
            f"gpu-check: torch {machine.torch} finds no GPU, so nothing was checked. As much of it "
            "as a CPU can do: make gpu-check DRY_RUN=1",
            file=sys.stderr,
        )
        return 2
    # Whoever ends this script ends the step that runs, too.
    # Where SIGINT is ignored, as in a shell's background, the steps would ignore it, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("gpu-check: ended by SIGTERM"))
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.txt").write_text(f"{machine}, python {sys.version}\n")
    check = Check(out, copy_tree(), KIT, options.dry_run, options.select)
    environment = environment_of("none" if options.dry_run else machine.capability)
    # Programs outside of the package import it, too.
    environment["PYTHONPATH"] = extended(check.tree)
    if options.dry_run:
        environment["FASTDIV_DRY_RUN"] = "1"
    outcomes: list[Outcome] = []
    summary = f"{machine}{', dry run on the CPU' if options.dry_run else ''}\n"
    for name in dict.fromkeys([*NEEDED, *(options.steps or STEPS)]):
        print(f"gpu-check: {name} ...", flush=True)
        left = 60 * options.minutes - (time.monotonic() - start)
        outcomes.append(run_step(name, check, environment, left))
        summary += f"{outcomes[-1]}\n"
        (out / "summary.txt").write_text(summary)
        if name in NEEDED and outcomes[-1].result != "PASS":
            break
    print(f"\n{summary}log and files: {out}")
    return int(any(o.result in ("FAIL", "LATE") for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
