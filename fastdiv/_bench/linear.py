"""Linear cross entropy: time in units of its three matrix products, and memory.

Any implementation has to compute these products: the logits, the gradient of the hidden states and
the gradient of the weight.  Here each is one torch.mm of whole matrices.  Fastdiv's loss is timed
beside the loss of whole logits, eager and compiled, and beside torch's own loss in chunks.
Losses of named classes compute the logits twice, which makes four products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiv

from .._linear.tiles import product_dtype
from ..reference.choices import KLMissing
from .losses import DTYPES
from .memory import measured_apart, peak_of
from .results import Record
from .timing import Budget, Call, GpuClock, interleave

LinearLoss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of hidden states, weight and labels

FACTORS = (1 / 4, 1 / 2, 1, 2, 4, 8)  # of the rows, for memory over rows
SLOW = ("eager", "compile", "chunked")  # take minutes on a CPU without half-precision products


class LinearJob(NamedTuple):
    """One call to measure."""

    variant: str
    dtype: str
    rows: int
    hidden: int
    classes: int
    device: str = "cpu"

    @property
    def logits_bytes(self) -> int:
        """Return the size of the whole logits."""
        return self.rows * self.classes * DTYPES[self.dtype].itemsize

    @property
    def left_out(self) -> tuple[str, ...]:
        """Return the variants that would take minutes."""
        dtype = DTYPES[self.dtype]
        products = dtype if self.device == "cuda" else product_dtype(torch.empty(0, dtype=dtype))
        return SLOW if products != dtype else ()

    def make_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Make hidden states, weight and labels, the same every time."""
        generator = torch.Generator(self.device).manual_seed(0)
        options: dict[str, Any] = {"generator": generator, "device": self.device}
        h = torch.randn(self.rows, self.hidden, **options).to(DTYPES[self.dtype])
        w = torch.randn(self.classes, self.hidden, **options).mul_(self.hidden**-0.5)
        y = torch.randint(self.classes, (self.rows,), **options)
        return h.requires_grad_(), w.to(DTYPES[self.dtype]).requires_grad_(), y

    def record(self, **measured: Any) -> Record:
        """Return the record of this size, which holds several variants."""
        return {**dict(zip(self._fields[1:], self[1:], strict=True)), **measured}


def _eager(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w), y)


def _chunked(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(h, w, y, options=options)


def _per_row(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return fastdiv.linear_cross_entropy(h, w, y, reduction="none").mean()


def losses(compiled: bool = False) -> dict[str, LinearLoss]:
    """Return all variants that this torch has."""
    found: dict[str, LinearLoss] = {"eager": _eager}
    if compiled:
        found["compile"] = torch.compile(_eager, dynamic=False)
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["chunked"] = _chunked
    return {**found, "fused": fastdiv.linear_cross_entropy, "per_row": _per_row}


NAMED = 64  # classes in each row of losses of many


def of_named_classes(job: LinearJob) -> dict[str, LinearLoss]:
    """Return losses of one or many classes in each row, with masks and a top-k teacher."""
    generator = torch.Generator(job.device).manual_seed(1)
    options: dict[str, Any] = {"generator": generator, "device": job.device}
    # A random permutation would take a sort: these are different, too.
    start = torch.randint(job.classes, (job.rows, 1), **options)
    count = min(NAMED, job.classes)
    many = (start + torch.arange(count, device=job.device)) % job.classes
    log_p = torch.full((job.rows, count), -math.log(2 * count), device=job.device)
    mask = torch.rand(job.rows, job.classes, **options) < 0.8
    bits = torch.randint(256, (job.rows, -(-job.classes // 8)), **options).to(torch.uint8)

    def log_prob(index: Tensor | None = None, class_mask: Tensor | None = None) -> LinearLoss:
        def loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
            own = y if index is None else index
            return fastdiv.linear_log_prob(h, w, own, class_mask=class_mask).sum()

        return loss

    def topk(missing: KLMissing) -> LinearLoss:
        def loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
            kinds: Any = {"values_type": "log_probs", "missing": missing}
            return fastdiv.linear_topk_kl_div(h, w, log_p, many, **kinds)

        return loss

    return {
        "log_prob": log_prob(),
        "log_prob_many": log_prob(many),
        "log_prob_mask": log_prob(class_mask=mask),
        "log_prob_bits": log_prob(class_mask=bits),
        "topk_ignore": topk("ignore"),
        "topk_tail": topk("tail"),
    }


def step(loss: LinearLoss, h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Compute the gradients of hidden states and weight."""
    return torch.autograd.grad(loss(h, w, y), (h, w))


def measure(*fields: Any) -> int | None:
    """Return the bytes of a job at its peak beyond arguments and gradients."""
    job = LinearJob(*fields)
    loss = losses()[job.variant]
    small = job._replace(rows=64, hidden=64, classes=512)
    step(loss, *small.make_inputs())  # loads what is loaded lazily, starts the threads
    inputs = job.make_inputs()
    gradients, peak = peak_of(lambda: step(loss, *inputs), job.device)
    return None if peak is None else max(0, peak - sum(g.nbytes for g in gradients))


def run_linear(job: LinearJob, budget: Budget, compiled: bool) -> Record:
    """Measure a size: memory first, since nothing else may run while a call is timed."""
    variants = [v for v in losses() if v not in job.left_out]
    extra = measured_apart(measure, [job._replace(variant=v) for v in variants])
    extra_bytes = dict(zip(variants, extra, strict=True))
    clock = GpuClock() if job.device == "cuda" else None
    times = interleave(_calls(job, compiled), lambda: None, budget, clock=clock)
    in_products = {k: round(v.median / times["products"].median, 3) for k, v in times.items()}
    return job.record(
        logits_bytes=job.logits_bytes, ms=times, products=in_products, extra_bytes=extra_bytes
    )


def memory_by_rows(job: LinearJob) -> Iterator[Record]:
    """Measure memory from a quarter of the rows to eight times as many, for the plot."""
    plan = []
    for factor in FACTORS:
        at = job._replace(rows=max(1, int(job.rows * factor)))
        slow = ("chunked",) if job.device == "cpu" and factor > 2 else ()
        plan.append((at, [v for v in losses() if v not in (*slow, *at.left_out)]))
    jobs: Sequence[LinearJob] = [at._replace(variant=v) for at, variants in plan for v in variants]
    peaks = measured_apart(measure, jobs)
    for at, variants in plan:
        yield at.record(extra_bytes={v: next(peaks) for v in variants})


def _calls(job: LinearJob, compiled: bool) -> dict[str, Call]:
    h, w, y = job.make_inputs()
    # Without half-precision products the fastest way is float32, whose sizes are the same.
    dtype = torch.float32 if job.left_out else DTYPES[job.dtype]
    x, weight = h.detach().to(dtype), w.detach().to(dtype)
    logits = x.new_empty(job.rows, job.classes)
    dx, dw = torch.empty_like(x), torch.empty_like(weight)

    def products() -> None:
        torch.mm(x, weight.t(), out=logits)
        torch.mm(logits, weight, out=dx)
        torch.mm(logits.t(), x, out=dw)

    def four_products() -> None:
        torch.mm(x, weight.t(), out=logits)
        products()

    torch.compiler.reset()
    steps = {
        name: lambda loss=loss: step(loss, h, w, y)
        for name, loss in {**losses(compiled), **of_named_classes(job)}.items()
        if name not in job.left_out
    }
    return {"products": products, "four_products": four_products, **steps}
