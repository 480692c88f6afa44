"""How files refer to each other: includes, imports, and names of files in text."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path, PurePath
from types import ModuleType

import pytest

import fastdiv
import fastdiv.distributed
from helpers.checkout import ROOT, git_files

pytestmark = pytest.mark.cpu_only("nothing is computed")

# --- includes point downward ----------------------------------------------------------------------

CSRC = ROOT / "csrc"
# What each folder may include besides itself.  The two devices do not include each other, and only
# ops includes torch.
BELOW = {
    "common": set[str](),
    "losses": {"common"},
    "cpu": {"common", "losses"},
    "cuda": {"common", "losses"},
    "ops": {"common", "losses", "cpu", "cuda"},
}
THE_SHIM = {"cuda_on_cpu.h", "instructions.h"}  # of the tests


def native_sources() -> list[str]:
    return sorted(p.relative_to(CSRC).as_posix() for p in CSRC.rglob("*.*") if p.is_file())


@pytest.mark.parametrize("file", native_sources())
def test_includes_point_downward(file: str) -> None:
    folder = str(PurePath(file).parent)
    for included in re.findall(r'^\s*#\s*include\s+"([^"]+)"', (CSRC / file).read_text(), re.M):
        if included in THE_SHIM:
            continue
        assert (CSRC / included).is_file(), f"{included}: paths begin in csrc"
        assert str(PurePath(included).parent) in BELOW[folder] | {folder}, included


# --- imports point downward -----------------------------------------------------------------------


def test_rooms_import_downward() -> None:
    """The contract stands in ``pyproject.toml``."""
    pytest.importorskip("importlinter")
    command = (
        "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(cache_dir=None))"
    )
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "1 kept, 0 broken" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("room", [fastdiv, fastdiv.distributed, fastdiv.nn, fastdiv.stats])
def test_no_function_has_the_name_of_a_file_beside_it(room: ModuleType) -> None:
    """``from . import entropy`` would be the file or the function, as imports are ordered."""
    files = {path.stem for path in Path(room.__file__ or "").parent.iterdir()}
    functions = {name for name in room.__all__ if not isinstance(getattr(room, name), ModuleType)}
    assert not files & functions


# --- files that are named exist -------------------------------------------------------------------

MENTION = re.compile(
    r"(?<![\w./*<{-])((?:\.\./)*\w[\w./-]*\.(?:md|py|pyi|h|cuh|cu|cpp|inl))\b(?![\w(*{])"
)
# Files of other projects that could be ours by their path.
OTHERS = {
    "cuda_runtime.h",
    "espnet_model.py",
    "export_jit.py",
    "sensevoice_small_model.py",
    "test_distance.py",
    "test_marray.py",
    "transducer.py",
    "trl/experimental/gkd/gkd_trainer.py",
    "trl/trainer/utils.py",
}
MADE_BY_TESTS = {"_C.py", "fastdiv/_C.py"}
NO_TEXT = {"Makefile"}  # puts the names of files together


def test_files_that_are_named_exist() -> None:
    files = git_files() | git_files("--others", "--exclude-standard")
    folders = {part for name in files for part in PurePath(name).parts[:-1]}
    tails = {"/".join(PurePath(f).parts[i:]) for f in files for i in range(len(PurePath(f).parts))}

    def exists(mention: str) -> bool:
        name = re.sub(r"^(\.\./)+", "", mention)
        first, slash, _ = name.partition("/")
        # A path that begins in a folder which we do not have is one of another project.
        known = tails | OTHERS | MADE_BY_TESTS
        return name in known or (bool(slash) and first not in folders)

    missing = []
    for name in sorted(files - NO_TEXT):
        try:
            lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(lines, 1):
            missing += [f"{name}:{number}: {m}" for m in MENTION.findall(line) if not exists(m)]
    assert not missing
