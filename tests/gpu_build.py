"""Builds the extension of a tree, or takes a binary that was built of the same sources elsewhere.

``gpu_check.py`` runs this in its copy of the tree.  To compile the CUDA kernels takes minutes, and
a machine with a GPU is often lent for a few.  ``gpu_check.py --prebuild 90`` compiles them
beforehand, on any machine with nvcc, the same version of Python and torch 2.11 or newer.
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


def sources(tree: Path) -> str:
    """A digest of everything that the binary is made of."""
    digest = hashlib.sha256()
    files = [tree / "setup.py", *(p for p in (tree / "csrc").rglob("*") if p.is_file())]
    for file in sorted(files):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(tree).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def note_of(binary: Path) -> Path:
    """The file beside a prebuilt binary that holds the digest of its sources."""
    return binary.with_name(f"{binary.name}.sources")


def take(folder: Path, tree: Path) -> bool:
    """Copies the prebuilt binary of this Python into the tree; False if it cannot be used."""
    binary = folder / BINARY
    if not binary.is_file():
        print(f"{binary} does not exist, so the extension is built here")
        return False
    note = note_of(binary)
    if not note.is_file() or note.read_text() != sources(tree):
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


def save(folder: Path, tree: Path) -> None:
    """Copies the binary of the tree into the folder, for ``take`` on another machine."""
    folder.mkdir(parents=True, exist_ok=True)
    binary = folder / BINARY
    note_of(binary).unlink(missing_ok=True)
    shutil.copy(tree / "fastdiv" / BINARY, binary)
    note_of(binary).write_text(sources(tree))
    print(f"saved {binary}, {binary.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="of prebuilt binaries")
    parser.add_argument("--save", action="store_true", help="build, and put the binary there")
    options, tree = parser.parse_args(), Path.cwd()
    setup = [sys.executable, "setup.py"]
    subprocess.run([*setup, "egg_info"], check=True)  # the package reads its version there
    sys.stdout.flush()
    if options.save or not take(options.folder, tree):
        sys.stdout.flush()
        subprocess.run([*setup, "build_ext", "--inplace"], check=True)
    if options.save:
        save(options.folder, tree)


if __name__ == "__main__":
    main()
