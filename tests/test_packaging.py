"""What an sdist and a wheel hold, and what building one asks for; nothing is compiled."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType

import pytest

import fastdiv
from helpers.checkout import ROOT, git_files

pytestmark = pytest.mark.cpu_only("the package")

# What an sdist leaves out: of use in a git checkout only, or large.
LEFT_OUT = [".ci/*", ".git*", ".editorconfig", ".pre-commit-config.yaml", "benchmarks/results/*"]
LEFT_OUT += ["*.png"]


def assert_same_files(packed: set[str], wanted: Callable[[str], bool]) -> None:
    """All that is committed, and nothing that git ignores; new files may be packed."""
    committed = set(filter(wanted, git_files()))
    new = git_files("--others", "--exclude-standard")
    assert packed - new == committed


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what setuptools lists for an sdist, and copies for a wheel but the binary."""
    git_files()  # or skip
    folder = tmp_path_factory.mktemp("packed")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder]
    command += ["build_py", "--build-lib", folder / "wheel"]
    environment = os.environ | {"FASTDIV_CUDA_ARCHS": "none"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return folder


def test_an_sdist_holds_all_that_git_does(packed: Path) -> None:
    listed = set((packed / "fastdiv.egg-info/SOURCES.txt").read_text().splitlines())
    listed = {name for name in listed if not name.startswith(str(packed))}  # of the list itself
    assert_same_files(listed, lambda name: not any(fnmatch(name, p) for p in LEFT_OUT))


def test_a_wheel_holds_the_package_and_nothing_else(packed: Path) -> None:
    wheel = packed / "wheel"
    copied = {p.relative_to(wheel).as_posix() for p in wheel.rglob("*") if p.is_file()}
    assert_same_files(copied, lambda name: name.startswith("fastdiv/"))


def test_one_version() -> None:
    """pyproject.toml has it; the changelog has a section of it."""
    (version,) = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert fastdiv.__version__ == fastdiv.build_info()["fastdiv"] == version
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.fixture
def build_backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_backend", ROOT / "build_backend.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.build_meta, "get_requires_for_build_wheel", lambda _: ["wheel"])
    return module


@pytest.mark.parametrize("torch, there", [("2.11.0+cpu", True), ("3.0", True), ("2.9.1", False)])
def test_a_build_takes_the_torch_that_is_there(
    build_backend: ModuleType, monkeypatch: pytest.MonkeyPatch, torch: str, there: bool
) -> None:
    monkeypatch.setattr(build_backend, "version", lambda _: torch)
    wanted = build_backend.get_requires_for_build_wheel()
    assert wanted == (["wheel"] if there else ["wheel", "torch>=2.11", "numpy"])


def test_a_build_asks_for_torch_where_there_is_none(
    build_backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(build_backend, "version", missing)
    assert "torch>=2.11" in build_backend.get_requires_for_build_editable()
    assert build_backend.get_requires_for_build_sdist.__module__ == "setuptools.build_meta"


def test_no_wheel_without_kernels(tmp_path: Path) -> None:
    """It would install anywhere, and be slow."""
    code = "import build_backend, runpy; build_backend.torch_is_installed = lambda: False; "
    code += "runpy.run_path('setup.py')"
    command = [sys.executable, "-c", code, "-q", "egg_info", "--egg-base", tmp_path]
    command += ["build", "--build-base", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "compiled against torch 2.11 or newer" in done.stderr


def test_the_matrix_has_all_supported_versions() -> None:
    """Every Python of the classifiers, the oldest torch that compiles, and the pinned one."""
    pytest.importorskip("nox")
    spec = importlib.util.spec_from_file_location("noxfile", ROOT / "noxfile.py")
    assert spec and spec.loader
    matrix = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(matrix)
    project = (ROOT / "pyproject.toml").read_text()
    assert list(matrix.PYTHONS) == re.findall(r"Python :: (3\.\d+)", project)
    oldest, *_ = matrix.TORCHES
    assert f'"torch>={oldest}"' in project
    pinned = (ROOT / "requirements-dev.txt").read_text()
    assert any(f"\ntorch=={torch}\n" in pinned for torch in matrix.TORCHES.values())
    pairs = [name.removeprefix("py").split("-torch") for name in matrix.DEFAULT]
    assert {python for python, _ in pairs} == set(matrix.PYTHONS)
    assert {torch for _, torch in pairs} == set(matrix.TORCHES)
    assert all((ROOT / f"tests/test_{name}.py").exists() for name in matrix.LEFT_OUT)
    assert f'make matrix PAIRS="py$python-torch{oldest}"' in (ROOT / ".ci/run").read_text()
