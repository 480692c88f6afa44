"""Time and memory of a loss alone: its forward, and its backward down to the logits' gradient."""

import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from fastdiv._bench.linear import LinearJob, extra_memory

STATUS = Path("/proc/self/status")  # Linux' account of this process
Loss = Callable[[Tensor, Tensor], Tensor]  #: (logits `[rows, classes]`, target) -> scalar
LinearLoss = Callable[
    [Tensor, Tensor, Tensor], Tensor
]  #: (hidden states, weight, target) -> scalar


def measure(
    losses: Mapping[str, Loss], logits: Tensor, target: Tensor
) -> tuple[dict[str, float], dict[str, float | None]]:
    """Returns the seconds (`time_loss`) and the bytes (`peak_memory`) of each loss."""
    seconds = time_loss(losses, logits, target)
    return seconds, {name: peak_memory(loss, logits, target) for name, loss in losses.items()}


def measure_linear(
    losses: Mapping[str, LinearLoss], hidden: Tensor, weight: Tensor, target: Tensor
) -> tuple[dict[str, float], dict[str, float | None]]:
    """Returns the same of a layer with its loss; the bytes are those beyond both gradients."""
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    leaves = [v.detach().clone().requires_grad_() for v in (hidden, weight)]
    for round_ in range(8):
        for name, loss in losses.items():
            start = time.perf_counter()
            torch.autograd.grad(loss(*leaves, target), leaves)
            _synchronize(hidden.device)
            if round_ > 0:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    return (
        {name: statistics.median(values) for name, values in seconds.items()},
        {name: _linear_peak(name, leaves, target, loss) for name, loss in losses.items()},
    )


def _linear_peak(name: str, leaves: list[Tensor], target: Tensor, loss: LinearLoss) -> float | None:
    kept = sum(leaf.nbytes for leaf in leaves)
    if target.is_cuda:
        torch.cuda.reset_peak_memory_stats(target.device)
        before = torch.cuda.memory_allocated(target.device)
        torch.autograd.grad(loss(*leaves, target), leaves)
        return torch.cuda.max_memory_allocated(target.device) - before - kept
    variant = "eager" if name == "torch" else "fused"
    (rows, width), classes = leaves[0].shape, len(leaves[1])
    return next(iter(extra_memory([LinearJob(variant, "f32", rows, width, classes)])))


def forward_backward(loss: Loss, leaf: Tensor, target: Tensor) -> tuple[float, Tensor]:
    """Returns (seconds, gradient) of one call of `loss` on a copy of `leaf`.

    The copy is not timed. It stands for the matmul that logits come from: a tensor autograd made
    and nobody else reads, so that a loss may write its gradient over it.
    """
    logits = leaf.clone()
    _synchronize(leaf.device)
    start = time.perf_counter()
    (gradient,) = torch.autograd.grad(loss(logits, target), logits)
    _synchronize(leaf.device)
    return time.perf_counter() - start, gradient


def time_loss(
    losses: Mapping[str, Loss], logits: Tensor, target: Tensor, rounds: int = 7
) -> dict[str, float]:
    """Returns the median seconds of each loss, forward and backward.

    Each round runs every loss once, so that a machine that slows down slows all of them.
    """
    leaf = logits.detach().clone().requires_grad_()
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for round_ in range(rounds + 1):
        for name, loss in losses.items():
            elapsed, _ = forward_backward(loss, leaf, target)
            if round_ > 0:  # the first one warms up
                seconds[name].append(elapsed)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_memory(loss: Loss, logits: Tensor, target: Tensor) -> float | None:
    """Returns the bytes that `loss`, forward and backward, needs at its peak beyond its arguments.

    On CUDA the caching allocator counts them. On a CPU nothing does, so Linux' high-water
    mark of resident memory has to. It never falls, hence a new process for each loss, which runs
    it on random tensors of the same shapes. (`getrusage`'s `ru_maxrss` would not do: a child
    starts with its parent's peak.) None where the system does not tell.
    """
    if logits.is_cuda:
        leaf = logits.detach().clone().requires_grad_()
        return _cuda_peak(loss, leaf, target)
    if not (STATUS.exists() and "VmHWM" in STATUS.read_text()):
        return None
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh_process:
        classes = None if target.is_floating_point() else logits.shape[-1]
        return fresh_process.submit(
            _cpu_peak, loss, tuple(logits.shape), tuple(target.shape), classes
        ).result()


def _cuda_peak(loss: Loss, leaf: Tensor, target: Tensor) -> float:
    forward_backward(loss, leaf, target)
    torch.cuda.reset_peak_memory_stats(leaf.device)
    before = torch.cuda.memory_allocated(leaf.device) + leaf.nbytes  # the copy that is the argument
    forward_backward(loss, leaf, target)
    return torch.cuda.max_memory_allocated(leaf.device) - before


def _cpu_peak(
    loss: Loss, logits_shape: tuple[int, ...], target_shape: tuple[int, ...], classes: int | None
) -> float:
    def arguments(rows: int) -> tuple[Tensor, Tensor]:
        leaf = torch.randn(rows, *logits_shape[1:], requires_grad=True)
        if classes is None:
            return leaf, torch.randn(rows, *target_shape[1:])
        return leaf, torch.randint(classes, (rows, *target_shape[1:]))

    forward_backward(loss, *arguments(4))  # loads the libraries, starts the threads
    leaf, target = arguments(logits_shape[0])
    before = _status("VmRSS") + leaf.nbytes
    forward_backward(loss, leaf, target)
    return max(0.0, _status("VmHWM") - before)


def _status(field: str) -> float:
    """Returns a field of `STATUS` in bytes."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return float(line.split()[1]) * 1024
    raise KeyError(field)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
