"""Builds what a machine with a GPU would take minutes for: the extension, and its variants.

``gpu_check.py --prebuild 90`` runs this in its copy of the tree, and needs nvcc but no GPU.
``make gpu-kit`` does so with the Python and the torch of that machine.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from gpu_build import BINARY, build, is_current, name_the_version, note_of, sources
from gpu_variants import BASE, VARIANTS, Variant

LIMIT = 60e6  # bytes; more is not taken along everywhere
LINES = "-lineinfo"  # for the sanitizers and the profiler
# A variant has kernels of bf16 and f32 alone, which halves its size.
WITHOUT = ("f16", "f64")
NO_KERNELS = """#include "cuda/kernels.h"

const fastdiv::cuda::RowKernels* fastdiv::cuda::find_{}(LossId, Target) {{ return nullptr; }}
"""
ARCHITECTURES = "import fastdiv._C as native; print(native.cuda_architectures)"


def folder_of(kit: Path, variant: str) -> Path:
    """Where the kit has the binary of a variant."""
    return kit if variant == BASE else kit / "variants" / variant


def flags_of(variant: Variant) -> str:
    """The flags of nvcc, apart from the file that is included; they are part of the digest."""
    return shlex.join(variant.flags)


def save(folder: Path, tree: Path, digest: str, architectures: str) -> None:
    """Copies the binary of the tree into the folder, for ``take`` on another machine."""
    folder.mkdir(parents=True, exist_ok=True)
    binary = folder / BINARY
    note_of(binary).unlink(missing_ok=True)
    shutil.copy(tree / "fastdiv" / BINARY, binary)
    note_of(binary).write_text(f"{digest} {architectures}")
    print(f"saved {binary}, {binary.stat().st_size / 1e6:.1f} MB")


def files_of(variants: Mapping[str, Variant] = VARIANTS) -> set[str]:
    """The files of a kit, relative to its folder."""
    folders = [folder_of(Path(), name) for name in (BASE, *variants)]
    binaries = [folder / BINARY for folder in folders]
    return {path.as_posix() for binary in binaries for path in (binary, note_of(binary))}


def trouble(kit: Path, limit: float = LIMIT) -> str:
    """Return what keeps a kit from being used, or an empty text."""
    sizes = {p.relative_to(kit).as_posix(): p.stat().st_size for p in kit.rglob("*") if p.is_file()}
    if differing := sorted(sizes.keys() ^ files_of()):
        return f"{kit} should have other files: {', '.join(differing)}"
    if sum(sizes.values()) > limit:
        lines = [f"{name}: {size / 1e6:.1f} MB" for name, size in sizes.items()]
        return "\n".join([f"{kit} has more than {limit / 1e6:.0f} MB", *sorted(lines)])
    return ""


def remove_others(kit: Path) -> None:
    """Removes variants that are no more, and binaries of other Pythons."""
    for path in kit.rglob("*"):
        if path.is_file() and path.relative_to(kit).as_posix() not in files_of():
            path.unlink()


def reduce(tree: Path) -> None:
    """Takes out of the tree, and of what is compiled next, all that no variant needs."""
    os.environ["CFLAGS"] = included(tree)
    for dtype in WITHOUT:
        (tree / f"csrc/cuda/rows_{dtype}.cu").write_text(NO_KERNELS.format(dtype))


def included(tree: Path) -> str:
    """The flag of either compiler that leaves few losses."""
    return shlex.join(["-include", str(tree / "tests/gpu_variants.h")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kit", type=Path, help="the folder to fill")
    parser.add_argument("architectures", help="as 90, or 90;100")
    options, tree = parser.parse_args(), Path.cwd()
    kit, architectures = options.kit, options.architectures.replace(";", " ")
    os.environ["FASTDIV_CUDA_ARCHS"] = architectures
    name_the_version(tree)
    binaries = [(BASE, sources(tree), LINES)]
    for name, variant in VARIANTS.items():
        macros = flags_of(variant)
        binaries.append((name, sources(tree, macros), f"{included(tree)} {macros}"))
    for name, digest, flags in binaries:
        folder = folder_of(kit, name)
        if name != BASE:
            reduce(tree)  # the digests above are of the whole tree
        if is_current(folder, digest, architectures):
            print(f"{folder / BINARY} is that of these sources")
            continue
        os.environ["FASTDIV_NVCC_FLAGS"] = flags
        build(tree)
        probe = [sys.executable, "-c", ARCHITECTURES]
        done = subprocess.run(probe, cwd=tree, capture_output=True, text=True)
        if (built := done.stdout.strip()) != architectures:
            why = f"has kernels for {built or 'no GPU'} instead of {architectures}; is there nvcc?"
            sys.exit(f"the extension {why}\n{done.stderr}")
        save(folder, tree, digest, architectures)
    remove_others(kit)
    if why := trouble(kit):
        sys.exit(why)
    size = sum(p.stat().st_size for p in kit.rglob("*") if p.is_file())
    print(f"{kit}: the extension and {len(VARIANTS)} variants, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
