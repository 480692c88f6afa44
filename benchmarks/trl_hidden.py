"""Measures TRL's functions of hidden states, and the same calls on fastdiv.

    python benchmarks/trl_hidden.py     (needs `pip install trl`, 1.16 or newer)

It prints a table in Markdown, forward and backward.  Times are processor time in one thread, and
ratios of medians of interleaved rounds.  Memory is Linux' peak beyond arguments and gradients, of a
process of its own for each figure, forked before anything is timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from measure import peak_of  # noqa: E402

ROWS, WIDTH, CLASSES, ROUNDS = 512, 512, 32_000, 5
OUTPUTS = {
    "log-probabilities": ("log_probs",),
    "with entropies, as GRPO and RLOO": ("log_probs", "entropy"),
    "with mean logits, as KTO": ("log_probs", "entropy", "mean_logits"),
    "with accuracy, as SFT": ("log_probs", "entropy", "is_top1"),
    "all of these, as DPO": ("log_probs", "entropy", "mean_logits", "is_top1"),
}
CALLS = (*OUTPUTS, "divergence of DistillationTrainer, β = 0.5")


def make_step(name: str, dtype: torch.dtype) -> tuple[Callable[[], Any], int]:
    """Return a step, forward and backward, and the bytes of its gradients."""
    import trl.trainer.distillation_trainer
    import trl.trainer.utils

    torch.set_num_threads(1)
    torch.manual_seed(0)
    # In place and in this dtype: memory that is freed here could be taken again, and not count.
    hidden, teacher = (torch.randn(ROWS, WIDTH, dtype=dtype) for _ in range(2))
    weight, teacher_weight = (torch.randn(CLASSES, WIDTH, dtype=dtype).div_(20) for _ in range(2))
    targets, mask = torch.randint(CLASSES, (ROWS,)), torch.ones(4, ROWS // 4)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]

    def loss() -> Tensor:
        if name in OUTPUTS:
            call = trl.trainer.utils._ChunkedLogProbFunction.apply
            arguments = (hidden, weight, None, targets, 1.0, 32768, None, 1.0, OUTPUTS[name])
            return call(*arguments)[0].mean()
        call = trl.trainer.distillation_trainer._chunked_divergence_loss
        states = (v.view(*mask.shape, WIDTH) for v in (hidden, teacher))
        return call(*states, weight, teacher_weight, mask, 0.5)[0]

    return lambda: torch.autograd.grad(loss(), leaves), sum(v.nbytes for v in leaves)


def peak(name: str, dtype: torch.dtype, patched: bool) -> float:
    """Return the bytes of a step at its peak, beyond arguments and gradients."""
    import fastdiv.integrations.trl

    warnings.simplefilter("ignore")
    if patched:
        fastdiv.integrations.trl.apply()
    step, gradients = make_step(name, dtype)
    small = torch.randn(8, 8, dtype=dtype, requires_grad=True)
    (small @ small).sum().backward()  # loads what torch loads once
    return (peak_of(step, "cpu") or 0.0) - gradients


def times(name: str, dtype: torch.dtype) -> list[float]:
    """Return the seconds of a step without the patch and with it."""
    import fastdiv.integrations.trl

    step, _ = make_step(name, dtype)
    patch = fastdiv.integrations.trl.apply()
    patch.undo()
    seconds: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for kind in (0, 1):
            if kind:
                patch = fastdiv.integrations.trl.apply()
            start = time.process_time()
            step()
            seconds[kind].append(time.process_time() - start)
            if kind:
                patch.undo()
    return [statistics.median(values[1:]) for values in seconds]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", nargs="+", choices=range(len(CALLS)), type=int)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import trl.trainer.distillation_trainer  # noqa: F401  # before the processes are forked

    names = [CALLS[number] for number in options.calls or range(len(CALLS))]
    dtypes = (torch.float32, torch.bfloat16)
    held = {}
    for case in product(names, dtypes, (False, True)):
        with ProcessPoolExecutor(1, mp_context=get_context("fork")) as process:
            held[case] = f"{process.submit(peak, *case).result() / 1e6:.0f}"
    print("| | float32 | memory | bfloat16 | memory |\n|---|---|---|---|---|")
    for name in names:
        cells = []
        for dtype in dtypes:
            before, after = times(name, dtype)
            memory = (held[name, dtype, patched] for patched in (False, True))
            cells += [f"{before / after:.1f}×", " → ".join(memory) + " MB"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
