"""Builds and tests fastdiv with other versions of Python and torch, each pair in an environment.

``make matrix`` runs it: four pairs that have each Python and each torch at least once.
``make matrix PAIRS=all`` runs all twelve, ``make matrix PAIRS="py3.12-torch2.11"`` those named.
``make gpu-kit`` builds in the environment of one pair, for a machine with a GPU that has the same.
Each pair takes about 6 GB below ``.nox``, for torch brings the CUDA libraries along.
"""

import re
import shutil
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import nox

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# The oldest that is supported, the one that requirements-dev.txt pins, and the newest.
TORCHES = {"2.11": "2.11.0", "2.13": "2.13.0", "2.14": "2.14.1"}
DEFAULT = ("py3.10-torch2.13", "py3.11-torch2.14", "py3.12-torch2.11", "py3.13-torch2.14")

# The fast part of the suite has all that may depend on the versions, on one instruction set only;
# the check before it compares all of them.  New files of tests belong to it unless named here.
FAST = ("-m", "not slow and not nightly", "-k", "not avx")
LEFT_OUT = (
    # the kernels, which the versions do not change
    *("cuda_kernels", "cuda_machine_code", "cuda_on_cpu", "build_contract", "sanitizers"),
    *("dead_rows", "determinism", "gpu", "gpu_small", "layout"),
    # the same calls as others, with more values
    *("patch_torch_values", "meaning"),
    # what needs other packages, or git
    *("bench", "docs", "docstrings", "examples", "gpu_check", "packaging", "source_tree"),
)
WORKERS = ("--numprocesses=2", "--dist=worksteal")

TEST_PACKAGES = (
    "hypothesis",
    "numpy",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "rich",
    "scipy",
    "sybil",
)
NOT_COPIED = shutil.ignore_patterns(
    *(".git", ".venv", ".nox", ".*_cache", ".hypothesis", "__pycache__"),
    *("build", "dist", "*.so", "*.o", "*.egg-info"),
)
ENVIRONMENT = {
    "FASTDIV_CUDA_ARCHS": "none",
    # As in the Makefile: waiting threads must leave the cores to the other process.
    "OMP_WAIT_POLICY": "PASSIVE",
}

nox.options.error_on_missing_interpreters = True  # not skipped in silence
nox.options.download_python = "never"
nox.options.reuse_venv = "yes"


def pinned(without: tuple[str, ...]) -> list[str]:
    """Return the requirements of the development environment without some packages."""
    lines = Path("requirements-dev.txt").read_text().splitlines()
    names = (re.match(r"[\w.-]+", line) for line in lines)
    return [
        line for line, name in zip(lines, names, strict=True) if name and name[0] not in without
    ]


def install(session: nox.Session, torch: str, packages: Sequence[str]) -> Path:
    """Installs torch, what a build needs and these packages; returns a folder for other files."""
    folder = Path(session.create_tmp()).resolve()
    constraints = folder / "constraints.txt"
    # Each torch has limits of its own for setuptools.
    constraints.write_text("\n".join(pinned(without=("torch", "setuptools"))))
    session.install(
        *(f"torch=={torch}", "setuptools>=77", "ninja", *packages),
        f"--constraint={constraints}",
        silent=True,
    )
    return folder


def kit(session: nox.Session, torch: str, architectures: str) -> None:
    """Build what a machine with a GPU and these versions takes along: ``make gpu-kit``."""
    install(session, torch, ("numpy",))
    session.run("python", "tests/gpu_check.py", "--prebuild", architectures)


def test(session: nox.Session, torch: str) -> None:
    """Installs, builds, compares every loss with its reference, and runs the tests."""
    folder = install(session, torch, TEST_PACKAGES)
    # Everything is built in a copy, so that no pair meets the objects of another, or yours.
    tree = folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(Path.cwd(), tree, ignore=NOT_COPIED)
    session.chdir(tree)
    session.install(
        *("--no-build-isolation", "--no-deps", "--force-reinstall", "."), env=ENVIRONMENT
    )
    # The tests must find the package that was installed.
    shutil.rmtree(tree / "fastdiv")
    session.run("python", "-c", "import sys, torch; print(sys.version, torch.__version__)")
    session.run("python", "-m", "fastdiv", "check", env=ENVIRONMENT)
    left_out = (f"--ignore=tests/test_{name}.py" for name in LEFT_OUT)
    tests = session.posargs or ("--pyargs", "fastdiv", "tests", *FAST, *left_out)
    session.run("python", "-m", "pytest", *WORKERS, *tests, env=ENVIRONMENT)


def add(python: str, torch: str) -> None:
    """Add the session of one pair."""
    name = f"py{python}-torch{torch}"

    def session(session: nox.Session) -> None:
        if session.posargs[:1] == ["kit"]:
            kit(session, TORCHES[torch], *session.posargs[1:])
        else:
            test(session, TORCHES[torch])

    session.__doc__ = f"Python {python} with torch {TORCHES[torch]}"
    nox.session(session, name=name, python=python, default=name in DEFAULT, tags=["all"])


for pair in product(PYTHONS, TORCHES):
    add(*pair)
