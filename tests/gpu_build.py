"""Builds the extension of a tree, or takes a binary that was built of the same sources elsewhere.

``gpu_check.py`` runs this in its copy of the tree.  To compile the CUDA kernels takes minutes,
and ``make gpu-kit`` does it beforehand.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

BINARY = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
# Ends with the reason if the binary does not load, or has no kernels for the GPU that is there.
TRY = """
import sys, torch, fastdiv._C as native
sys.exit((torch.cuda.is_available() and native.gpu_trouble(0)) or 0)
"""


def sources(tree: Path, flags: str = "") -> str:
    """A digest of everything that the binary is made of, and of further flags of nvcc."""
    digest = hashlib.sha256(flags.encode())
    files = [tree / "setup.py", *(p for p in (tree / "csrc").rglob("*") if p.is_file())]
    files += [p for p in [tree / "tests/gpu_variants.h"] if flags]
    for file in sorted(files):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(tree).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def note_of(binary: Path) -> Path:
    """The file beside a prebuilt binary with the digest of its sources, and its architectures."""
    return binary.with_name(f"{binary.name}.sources")


def is_current(folder: Path, digest: str, architectures: str = "") -> bool:
    """Return whether the folder has a binary of this Python from sources of this digest."""
    note = note_of(folder / BINARY)
    of, _, built = note.read_text().partition(" ") if note.is_file() else ("", "", "")
    return (folder / BINARY).is_file() and of == digest and architectures in ("", built)


def take(folder: Path, tree: Path) -> bool:
    """Copies the prebuilt binary of this Python into the tree; False if it cannot be used."""
    binary = folder / BINARY
    if not binary.is_file():
        print(f"{binary} does not exist, so the extension is built here")
        return False
    if not is_current(folder, sources(tree)):
        print(f"{binary} was built of other sources, so the extension is built here")
        return False
    copy = Path(shutil.copy(binary, tree / "fastdiv"))
    done = subprocess.run([sys.executable, "-c", TRY], cwd=tree, capture_output=True, text=True)
    if done.returncode:
        copy.unlink()
        print(f"{binary} does not run, so the extension is built here: {done.stderr[-1000:]}")
        return False
    print(f"took {binary}")
    return True


def build(tree: Path) -> None:
    """Compiles what has changed, and links it."""
    sys.stdout.flush()
    (tree / "fastdiv" / BINARY).unlink(missing_ok=True)  # else other objects may not be linked
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=tree, check=True)


def name_the_version(tree: Path) -> None:
    """Writes the metadata that the package reads its version from."""
    sys.stdout.flush()
    subprocess.run([sys.executable, "setup.py", "-q", "egg_info"], cwd=tree, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="of prebuilt binaries")
    options, tree = parser.parse_args(), Path.cwd()
    name_the_version(tree)
    if not take(options.folder, tree):
        build(tree)


if __name__ == "__main__":
    main()
