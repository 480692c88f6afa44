"""How files refer to each other: includes, imports, and names of files in text."""

from __future__ import annotations

import ast
import re
from pathlib import Path, PurePath

import pytest

import fastdiv
from programs import ROOT
from test_packaging import git_files

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
THE_SHIM = "cuda_on_cpu.h"  # of the tests


def native_sources() -> list[str]:
    return sorted(p.relative_to(CSRC).as_posix() for p in CSRC.rglob("*.*") if p.is_file())


@pytest.mark.parametrize("file", native_sources())
def test_includes_point_downward(file: str) -> None:
    folder = str(PurePath(file).parent)
    for included in re.findall(r'^\s*#\s*include\s+"([^"]+)"', (CSRC / file).read_text(), re.M):
        if included == THE_SHIM:
            continue
        assert (CSRC / included).is_file(), f"{included}: paths begin in csrc"
        assert str(PurePath(included).parent) in BELOW[folder] | {folder}, included


# --- imports do not depend on their order ---------------------------------------------------------


def test_no_import_of_a_module_whose_name_is_that_of_a_function() -> None:
    """``from . import entropy`` is the module before the package has bound the function, and then
    the function."""
    package = Path(fastdiv.__file__).parent
    modules = {p.stem for p in package.iterdir()}
    both = {n for n in fastdiv.__all__ if n in modules and callable(getattr(fastdiv, n))}
    assert {"cross_entropy", "entropy"} <= both
    found = []
    for file in package.rglob("*.py"):
        depth = len(file.relative_to(package).parts)  # dots that lead to the package
        for statement in ast.parse(file.read_text()).body:  # in a function all is bound
            if isinstance(statement, ast.ImportFrom) and not statement.module:
                names = {alias.name for alias in statement.names}
                if statement.level == depth and names & both:
                    found.append(f"{file.relative_to(package)}:{statement.lineno}")
    assert not found, "import the function from its module"


# --- files that are named exist -------------------------------------------------------------------

MENTION = re.compile(
    r"(?<![\w./*<{-])((?:\.\./)*\w[\w./-]*\.(?:md|py|pyi|h|cuh|cu|cpp|inl))\b(?![\w(*{])"
)
# Of other projects, named without their folder.
OTHERS = {
    "cuda_runtime.h",
    "espnet_model.py",
    "export_jit.py",
    "sensevoice_small_model.py",
    "test_distance.py",
    "test_marray.py",
    "transducer.py",
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
