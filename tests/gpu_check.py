"""Builds, checks and measures fastdiv on a GPU: what ``make gpu-check`` runs, without network.

Everything happens in a copy of the tree, build/gpu-check-tree, with the interpreter that runs this
script: it needs torch for CUDA, numpy, pytest, hypothesis and scipy, and nvcc.  The order is that
of what one wants to know first; a step that fails does not keep the others from running.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "build", "*.so", "*.egg-info"
)
PROBE = """
import torch
print(torch.__version__)
if torch.cuda.is_available():
    print(torch.cuda.get_device_name())
    print("{}{}".format(*torch.cuda.get_device_capability()))
"""
SMALL = "tests/test_gpu_small.py"
# The benchmark is cut off rather than late, so what is asked most comes first.
SHAPES = [32768, 131072, 8192, 50257, 1024, 262144, 4096, 65536, 16384, 2048, 512, 256]


@dataclass(frozen=True)
class Machine:
    """What there is."""

    torch: str
    gpu: str  # empty: none
    capability: str

    @classmethod
    def find(cls) -> Machine:
        done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"gpu-check: {sys.executable} has no torch that works:\n{done.stderr}")
        return cls(*(done.stdout.splitlines() + ["", ""])[:3])


@dataclass(frozen=True)
class Check:
    """The options of a run."""

    out: Path
    tree: Path
    dry_run: bool
    select: str

    @property
    def device(self) -> str:
        return "cpu" if self.dry_run else "cuda"

    def python(self, *arguments: str) -> list[str]:
        return [sys.executable, *arguments]

    def pytest(self, *arguments: str) -> list[str]:
        options = [
            "-q",
            "--tb=short",
            "--maxfail=50",
            "-p",
            "no:cacheprovider",
            "-o",
            "timeout=150",
        ]
        return self.python("-m", "pytest", *options, f"--device={self.device}", *arguments)

    # --- the steps; one that returns a text cannot be done here, for that reason ---

    def build(self) -> list[str]:
        return self.python("setup.py", "egg_info", "build_ext", "--inplace")

    def info(self) -> list[str]:
        return self.python("-m", "fastdiv", "info")

    def check(self) -> list[str]:
        return self.python("-m", "fastdiv", "check", *(["--quick"] if self.dry_run else []))

    def gpu(self) -> list[str]:
        """Graphs, streams, labels, more than 2^31 elements, memory; all kernels on small rows."""
        return self.pytest("tests/test_gpu.py", SMALL, *self._selected())

    def suite(self) -> list[str]:
        several = ["-n", "6"] if importlib.util.find_spec("xdist") and not self.dry_run else []
        ours = [f"--ignore={name}" for name in ("tests/test_gpu.py", SMALL)]
        return self.pytest(*several, *ours, *self._selected())

    def sanitizer(self, tool: str) -> list[str] | str:
        small = self.pytest(SMALL, "-k", "float32 or bfloat16 or reductions")
        if self.dry_run:
            return small
        folders = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin", os.environ["PATH"]]
        program = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
        if program is None:
            return "no compute-sanitizer in CUDA_HOME or on PATH"
        return [
            program,
            f"--tool={tool}",
            "--kernel-name=kns=fastdiv",
            "--error-exitcode=9",
            *small,
        ]

    def bench(self) -> list[str]:
        files = ["--json", str(self.out / "bench.json")]
        if importlib.util.find_spec("matplotlib"):
            files += ["--plot", str(self.out / "bench.png")]
        bench = self.python("-m", "fastdiv", "bench", f"--device={self.device}", *files)
        if self.dry_run:
            sizes = ["--shapes", "64x1024", "32x4096", "--seconds", "0", "--rounds", "2"]
            return [*bench, "cross_entropy", "js_div", "--phases", "--no-compile", *sizes]
        shapes = [f"{2**27 // c}x{c}" for c in SHAPES]
        compiled = ["--compile-classes", "32768", "131072"]
        limits = ["--seconds", "0.4", "--stop-after", str(STEPS["bench"].seconds - 40)]
        return [*bench, "--dtypes", "bf16", "f32", "--shapes", *shapes, *compiled, *limits]

    def _selected(self) -> list[str]:
        return ["-k", self.select] if self.select else []


@dataclass(frozen=True)
class Step:
    """A command and how long it may take."""

    seconds: int
    command: Callable[[Check], list[str] | str]
    environment: tuple[tuple[str, str], ...] = ()


# Without torch's cache every tensor is an allocation of its own, whose end the sanitizer knows.
NO_CACHE = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
STEPS = {
    "build": Step(240, Check.build),
    "info": Step(60, Check.info),
    "check": Step(120, Check.check),
    "gpu": Step(150, Check.gpu),
    "memcheck": Step(100, lambda check: check.sanitizer("memcheck"), NO_CACHE),
    "racecheck": Step(100, lambda check: check.sanitizer("racecheck"), NO_CACHE),
    "tests": Step(200, Check.suite),
    "bench": Step(220, Check.bench),
    "synccheck": Step(60, lambda check: check.sanitizer("synccheck"), NO_CACHE),
    "initcheck": Step(60, lambda check: check.sanitizer("initcheck"), NO_CACHE),
}


@dataclass(frozen=True)
class Outcome:
    """How a step went."""

    name: str
    result: str  # PASS, FAIL, LATE (stopped, out of time), SKIP
    seconds: float
    note: str


def run_step(name: str, check: Check, environment: dict[str, str], at_most: float) -> Outcome:
    step = STEPS[name]
    command = step.command(check)
    if isinstance(command, str):
        return Outcome(name, "SKIP", 0, command)
    seconds = min(step.seconds, at_most)
    if seconds < 5:
        return Outcome(name, "SKIP", 0, "no time left")
    log, start = check.out / "log.txt", time.monotonic()
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
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    took = time.monotonic() - start
    with log.open("rb") as file:
        file.seek(begin)
        lines = file.read().decode(errors="replace").split("\n")
    lines = [line for line in lines if line.strip()]
    if code:
        print("\n".join(f"  | {line}" for line in lines[-25:]), flush=True)
    note = f"stopped after {seconds:.0f} s; " if code is None else ""
    result = "LATE" if code is None else "FAIL" if code else "PASS"
    return Outcome(name, result, took, note + (lines[-1].strip("= ")[:90] if lines else ""))


def table(outcomes: list[Outcome]) -> str:
    rows = [f"{o.name:10} {o.result:5} {o.seconds:5.0f} s  {o.note}".rstrip() for o in outcomes]
    return "\n".join(rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT") or "build/gpu-check")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, as far as that goes")
    parser.add_argument("--minutes", type=float, default=9, help="for everything")
    parser.add_argument("--select", default="", metavar="EXPRESSION", help="tests: pytest's -k")
    options = parser.parse_args()
    if unknown := set(options.steps) - set(STEPS):
        parser.error(f"no step {', '.join(sorted(unknown))} among {', '.join(STEPS)}")
    return options


def environment_of(machine: Machine, dry_run: bool) -> dict[str, str]:
    """What the steps see: the architecture of this GPU, and no settings of the user's."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FASTDIV_")}
    default = "none" if dry_run else machine.capability
    environment["FASTDIV_CUDA_ARCHS"] = os.environ.get("FASTDIV_CUDA_ARCHS", default)
    # Lines for the sanitizers; not make's warnings as errors, which belong to make build.
    environment["FASTDIV_NVCC_FLAGS"] = "-lineinfo"
    if dry_run:
        environment["FASTDIV_DRY_RUN"] = "1"
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


def main() -> int:
    options, start = parse(), time.monotonic()
    machine = Machine.find()
    where = machine.gpu or "no GPU"
    print(f"gpu-check: {where}, torch {machine.torch}, {sys.executable}", flush=True)
    if not machine.gpu and not options.dry_run:
        print(
            f"gpu-check: torch {machine.torch} finds no GPU, so nothing was checked. As much of it "
            "as a CPU can do: make gpu-check DRY_RUN=1",
            file=sys.stderr,
        )
        return 2
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.txt").write_text(f"{where}, torch {machine.torch}, python {sys.version}\n")
    check = Check(out, copy_tree(), options.dry_run, options.select)
    environment = environment_of(machine, options.dry_run)
    outcomes = []
    for name in dict.fromkeys(["build", *(options.steps or STEPS)]):
        print(f"gpu-check: {name} ...", flush=True)
        left = 60 * options.minutes - (time.monotonic() - start)
        outcomes.append(run_step(name, check, environment, left))
        if name == "build" and outcomes[-1].result != "PASS":
            break
    dry = ", dry run on the CPU" if options.dry_run else ""
    summary = f"{where}, torch {machine.torch}{dry}\n{table(outcomes)}\n"
    (out / "summary.txt").write_text(summary)
    print(f"\n{summary}log and files: {out}")
    return int(any(o.result in ("FAIL", "LATE") for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
