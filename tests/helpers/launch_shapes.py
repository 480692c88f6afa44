"""How the kernels are launched, as csrc/cuda computes it: `launch_shapes.cpp` prints it."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import NamedTuple

from helpers.checkout import ROOT
from helpers.cuda_binary import Kernel, without_namespaces
from helpers.gpu_model import GPUS
from helpers.programs import CUDA_FLAGS, build, run

CLASSES = 32768


class Launch(NamedTuple):
    """The launch of one kernel of a loss; the names of the fields are those of the program."""

    loss: str
    policy: str
    target: str  # "labels", "named", "none", or what a row of the target holds
    dtype: str
    kernel: str  # "forward", "backward" or "forward_grad"
    architecture: int
    element: int  # bytes
    rows: int  # that are read together: 2 of a divergence
    passes: int  # over a row, in a forward that is not close to zero
    classes: int
    threads: int  # per block
    blocks: int  # per row
    stages: int  # in which the part of a row arrives that a block has
    dynamic_bytes: int  # of shared memory, per block

    @property
    def elements_per_thread(self) -> float:
        """Pairs, where two rows are read."""
        return self.classes / (self.blocks * self.threads)

    @property
    def bytes_moved(self) -> int:
        """Bytes per element or pair: what is read, and one gradient."""
        return self.element * (self.rows + (self.kernel != "forward"))

    @property
    def entry(self) -> Kernel:
        """The kernel that is launched, without softcapping."""
        skeleton = "backward" if self.kernel == "backward" else "forward"
        gradient = self.kernel == "forward_grad"
        return Kernel(str(self.architecture), skeleton, self.policy, self.dtype, False, gradient)


@functools.cache
def launches() -> list[Launch]:
    """Return the launches of every loss, in f32 and bf16, on every GPU of the model."""
    # Kernels are declared only, so the linker must not look for them.
    link = ["-Wl,--unresolved-symbols=ignore-all"]
    gpus = [f"{architecture}={gpu.shared_per_block}" for architecture, gpu in GPUS.items()]
    with tempfile.TemporaryDirectory() as folder:
        source = ROOT / "tests/launch_shapes.cpp"
        program = build(Path(folder, "shapes"), [source], "plain", [*CUDA_FLAGS, "-O0"], link)
        printed = run(program, str(CLASSES), *gpus)
    if printed.returncode:
        raise RuntimeError(f"launch_shapes.cpp failed: {printed.stderr}")
    listed = [
        Launch(**entry | {"policy": without_namespaces(entry["policy"])})
        for entry in json.loads(printed.stdout)
    ]
    return listed
