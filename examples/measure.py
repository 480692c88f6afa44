"""Time and memory of a loss alone: its forward, and its backward down to its tensors."""

import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

STATUS = Path("/proc/self/status")  # Linux' account of this process
ROUNDS = 5

Loss = Callable[..., Tensor]  # (*tensors, target) -> scalar
Measured = tuple[dict[str, float], dict[str, float | None]]  # seconds and bytes, by loss


def measure(losses: Mapping[str, Loss], *tensors: Tensor, target: Tensor) -> Measured:
    """Return the median seconds of each loss, and its bytes at the peak beyond its arguments.

    Each round times every loss once, so that a machine that slows down slows all of them.
    """
    timers = {name: timer(loss, tensors, target) for name, loss in losses.items()}
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(ROUNDS):
        for name in losses:
            seconds[name].append(timers[name].timeit(1).median)
    shapes, device = [v.shape for v in tensors], target.device.type
    labels = 0 if target.is_floating_point() else int(target.max()) + 1
    memory = {
        name: in_new_process(loss_peak, loss, shapes, target.shape, labels, device)
        for name, loss in losses.items()
    }
    return {name: statistics.median(values) for name, values in seconds.items()}, memory


def timer(loss: Loss, tensors: tuple[Tensor, ...], target: Tensor) -> Timer:
    """Return a timer of forward and backward.

    The copies in its setup, which is not timed, stand for the product that logits come from: they
    are not leaves of the graph, so a loss may write its gradient over them.
    """
    leaves = [v.detach().requires_grad_() for v in tensors]
    return Timer(
        "torch.autograd.grad(loss(*copies, target), copies)",
        "copies = [v.clone() for v in leaves]",
        globals={"torch": torch, "loss": loss, "leaves": leaves, "target": target},
        num_threads=torch.get_num_threads(),
    )


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process that has no freed memory to reuse."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def loss_peak(
    loss: Loss, shapes: list[torch.Size], target_shape: torch.Size, labels: int, device: str
) -> float | None:
    """Return the bytes of a loss at its peak, forward and backward, beyond its arguments.

    The tensors are random.  So is the target, or it has so many labels.
    """
    leaves = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    target = torch.randn(target_shape, device=device)
    if labels:
        target = torch.randint(labels, target_shape, device=device)

    def step(rows: int) -> None:
        copies = [leaves[0][:rows].clone(), *(v.clone() for v in leaves[1:])]
        torch.autograd.grad(loss(*copies, target[:rows]), copies)

    step(4)  # loads the libraries, starts the threads
    peak = peak_of(lambda: step(len(target)), device)
    return None if peak is None else max(0.0, peak - sum(v.nbytes for v in leaves))


def peak_of(call: Callable[[], object], device: str) -> float | None:
    """Return the bytes at the peak of a call beyond those in use before it.

    On CUDA torch counts them.  On a CPU it is Linux' high-water mark of resident memory, lowered
    before the call; None where the system has none.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        call()
        return status("VmHWM") - before
    except OSError:
        return None


def status(field: str) -> float:
    """Return a field of `STATUS` in bytes."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return float(lines[field].split()[0]) * 1024
