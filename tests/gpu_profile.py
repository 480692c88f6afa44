"""One launch of a kernel of each kind: what ``gpu_check.py profile`` runs under a profiler."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

from fastdiv._bench.losses import LOSSES

NAMES = ["cross_entropy", "kl_div", "js_div", "entropy"]
FIRST = (4096, 32768)
# Of short rows and of rows off alignment, cross entropy is enough.
OTHERS = [(131072, 1024), (2671, 50257)]


def calls(device: str) -> Iterator[tuple[str, tuple[int, int], torch.dtype]]:
    """Every loss, shape and dtype that is profiled."""
    if device == "cpu":
        yield NAMES[0], (4, 1024), torch.float32
        return
    for dtype in (torch.bfloat16, torch.float32):
        for name in NAMES:
            yield name, FIRST, dtype
    for shape in OTHERS:
        yield NAMES[0], shape, torch.bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    device = parser.parse_args().device
    for name, shape, dtype in calls(device):
        loss = LOSSES[name]
        x, *target = loss.make_inputs(shape, dtype, device)
        x.requires_grad_()
        torch.autograd.grad(loss.fused(x, *target), x)
        with torch.no_grad():
            loss.forward_grad(x, *target)
        print(name, *shape, dtype, flush=True)


if __name__ == "__main__":
    main()
