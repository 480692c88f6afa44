"""The steps of ``gpu_check.py``: the command of each, and how long it may take."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SMALL = "tests/test_gpu_small.py"
# A benchmark is cut off rather than late, so the classes that are asked for most come first.
CLASSES = [32768, 131072, 8192, 50257, 1024, 262144, 4096, 65536, 16384, 2048, 512, 256]
ASKED_MOST = ["cross_entropy", "kl_div", "js_div", "entropy"]  # a kernel of each kind
TOOLKIT = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
# Whole sections of Nsight Compute, because the names of single metrics change with its versions.
SECTIONS = ["SpeedOfLight", "Occupancy", "WarpStateStats", "LaunchStats", "ComputeWorkloadAnalysis"]
# A sanitizer is slow.  These read, write and share memory as the others do.
SANITIZED = "(float32 or bfloat16 or reductions) and not (reverse or skew or tv_ or log_probs)"
NEEDS_RICH = "rich is not installed, which the benchmark needs"
INFO = """
import sys, fastdiv.__main__, fastdiv._C as native
fastdiv.__main__.main(["info"])
"""
# Without kernels for the GPU, every later step would test the reference and pass.
HAS_KERNELS = "sys.exit(native.gpu_trouble(0) or 0)"


@dataclass(frozen=True)
class Check:
    """The options of a run, and the time that the step in question has."""

    out: Path
    tree: Path
    kit: Path
    dry_run: bool
    select: str
    seconds: float = 0

    @property
    def device(self) -> str:
        return "cpu" if self.dry_run else "cuda"

    def python(self, *arguments: str) -> list[str]:
        return [sys.executable, *arguments]

    def pytest(self, *arguments: str, timeout: int = 150) -> list[str]:
        options = [
            "-q",
            "--tb=short",
            "--maxfail=50",
            "-p",
            "no:cacheprovider",
            "-o",
            f"timeout={timeout}",
        ]
        return self.python("-m", "pytest", *options, f"--device={self.device}", *arguments)

    # --- The commands.  One that returns a text cannot run here, and the text says why.

    def build(self) -> list[str]:
        return self.python("tests/gpu_build.py", str(self.kit))

    def info(self) -> list[str]:
        return self.python("-c", INFO if self.dry_run else INFO + HAS_KERNELS)

    def small(self) -> list[str]:
        """All kernels on small rows.  One that never ends is named, for it ends its process."""
        timeout = 150 if self.dry_run else 30
        return self.pytest(*self._processes(8), SMALL, *self._selected(), timeout=timeout)

    def gpu(self) -> list[str]:
        """Graphs, streams, labels, more than 2^31 elements, memory."""
        return self.pytest(*self._processes(4), "tests/test_gpu.py", *self._selected())

    def check(self) -> list[str]:
        return self.python("-m", "fastdiv", "check", *(["--quick"] if self.dry_run else []))

    def suite(self) -> list[str]:
        elsewhere = [f"--ignore={name}" for name in ("tests/test_gpu.py", SMALL)]
        return self.pytest(*self._processes(12), *elsewhere, *self._selected())

    def sanitizer(self, tool: str) -> list[str] | str:
        """The small rows again, in one process."""
        small = self.pytest(SMALL, "-k", self.select or SANITIZED)
        if self.dry_run:
            return small
        program = _tool("compute-sanitizer")
        if program is None:
            return "there is no compute-sanitizer in CUDA_HOME or on PATH"
        # What torch's kernels write counts as written only where they are watched, too.
        watched = (
            "--check-api-memory-access=no" if tool == "initcheck" else "--kernel-name=kns=fastdiv"
        )
        # torch asks the driver what it may not, and goes by the error.
        options = [f"--tool={tool}", watched, "--report-api-errors=no", "--error-exitcode=9"]
        return [program, *options, *small]

    def profile(self) -> list[str] | str:
        """Hardware counters of a kernel of each kind."""
        script = self.python("tests/gpu_profile.py", f"--device={self.device}")
        if self.dry_run:
            return script
        program = _tool("ncu")
        if program is None:
            return "there is no ncu in CUDA_HOME or on PATH"
        options = ["--kernel-name-base=mangled", "--kernel-name=regex:fastdiv"]
        options += ["--clock-control=none", "--csv", "--page=details"]
        options += [f"--log-file={self.out / 'profile.csv'}"]
        options += [word for name in SECTIONS for word in ("--section", name)]
        return [program, *options, *script]

    def variants(self) -> list[str] | str:
        """The kernel variants of the kit side by side, and a linear layer."""
        if not _has_rich():
            return NEEDS_RICH
        command = self.python("tests/gpu_compare.py", f"--kit={self.kit}")
        command += [f"--json={self.out / 'variants.json'}", "--stop-after", self._stop_after()]
        return [*command, *(["--dry-run"] if self.dry_run else [])]

    def bench(self) -> list[str] | str:
        """The losses that are asked for most at every number of classes, without torch.compile."""
        if self.dry_run:
            sizes = ["--shapes", "64x1024", "32x4096", "--seconds", "0", "--rounds", "2"]
            return self._bench("bench", "cross_entropy", "js_div", "--phases", *sizes)
        shapes = [f"{2**27 // c}x{c}" for c in CLASSES]
        limits = ["--seconds", "0.15", "--stop-after", self._stop_after()]
        return self._bench("bench", *ASKED_MOST, "--shapes", *shapes, *limits)

    def every(self) -> list[str] | str:
        """Every loss at one shape."""
        if self.dry_run:
            sizes = ["--shapes", "64x1024", "--seconds", "0", "--rounds", "2"]
            return self._bench("every", "kl_div", *sizes)
        limits = ["--seconds", "0.1", "--stop-after", self._stop_after()]
        return self._bench("every", "--shapes", "4096x32768", *limits)

    def compiled(self) -> list[str] | str:
        """Beside torch.compile, which takes some eight seconds for each loss and dtype."""
        if self.dry_run:
            return "torch.compile is measured on a GPU only"
        limits = ["--seconds", "0.15", "--stop-after", self._stop_after()]
        return self._bench("compiled", *ASKED_MOST, "--shapes", "4096x32768", *limits)

    def _bench(self, name: str, *arguments: str) -> list[str] | str:
        if not _has_rich():
            return NEEDS_RICH
        written = ["--json", str(self.out / f"{name}.json")]
        dtypes = [] if self.dry_run else ["--dtypes", "bf16", "f32"]
        compiled = [] if name == "compiled" else ["--no-compile"]
        bench = self.python("-m", "fastdiv", "bench", f"--device={self.device}", *arguments)
        return [*bench, *dtypes, *compiled, *written]

    def _stop_after(self) -> str:
        """Seconds that leave time to begin and to write what there is."""
        return f"{max(1, self.seconds - 15):.0f}"

    def _processes(self, most: int) -> list[str]:
        """Each process needs a core for its references, and a context on the GPU."""
        if self.dry_run or importlib.util.find_spec("xdist") is None:
            return []
        return ["-n", str(min(most, os.cpu_count() or 1))]

    def _selected(self) -> list[str]:
        return ["-k", self.select] if self.select else []


def _has_rich() -> bool:
    return importlib.util.find_spec("rich") is not None


def _tool(name: str) -> str | None:
    """The path of a program of the toolkit."""
    return shutil.which(name, path=os.pathsep.join([str(TOOLKIT / "bin"), os.environ["PATH"]]))


@dataclass(frozen=True)
class Step:
    """A command and how long it may take."""

    seconds: int
    command: Callable[[Check], list[str] | str]
    environment: tuple[tuple[str, str], ...] = ()


def sanitized(seconds: int, tool: str) -> Step:
    # Without torch's cache every tensor is an allocation of its own, and the sanitizer knows where
    # it ends.
    no_cache = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    return Step(seconds, lambda check: check.sanitizer(tool), no_cache)


# After three minutes one knows whether the kernels are right and how fast they are, and then why.
STEPS = {
    "build": Step(180, Check.build),
    "info": Step(30, Check.info),
    "small": Step(80, Check.small),
    "bench": Step(75, Check.bench),
    "memcheck": sanitized(80, "memcheck"),
    "profile": Step(60, Check.profile),
    "variants": Step(80, Check.variants),
    "gpu": Step(90, Check.gpu),
    "check": Step(60, Check.check),
    "every": Step(45, Check.every),
    "racecheck": sanitized(60, "racecheck"),
    "tests": Step(150, Check.suite),
    "compiled": Step(75, Check.compiled),
    "synccheck": sanitized(40, "synccheck"),
    "initcheck": sanitized(40, "initcheck"),
}
# Where one of these fails, the others would say nothing.
NEEDED = ("build", "info")
