"""The parts of the benchmark: the sizes and losses of each."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from . import linear
from .command import DEFAULT_FILE
from .instructions import count_instructions, why_not
from .limit import build as limit
from .losses import DTYPES, LOSSES
from .memory import Job, extra_memory
from .results import PHASES, VARIANTS, Measurements, Record, Shape
from .run import time_loss, time_overhead
from .tables import progress
from .timing import Budget, torch_threads

# Language models with three vocabularies, a speech recogniser, many short rows, few long ones.
SHAPES = [(512, 32000), (128, 128256), (64, 256000), (4096, 4233), (65536, 100), (2, 256000)]
QUICK_SHAPES = [(64, 32000)]
COMPILED_CLASSES = [32000]  # torch.compile takes eight seconds for every loss, dtype and shape

# Larger than all caches: 268 MB of half-precision logits.  Powers of two, and GPT-2's vocabulary.
GPU_ELEMENTS = 2**27
GPU_CLASSES = sorted([2**n for n in range(8, 19)] + [50257])
GPU_QUICK_CLASSES = [1024, 8192, 50257, 131072]

SCALED = ("cross_entropy", "kl_div", "js_div", "entropy")  # a kernel of each kind
SCALE_ELEMENTS = 2**24
SCALE_CLASSES = [2**n for n in range(10, 19)]
SCALE_ROWS = [4**n for n in range(9)]
CLASSES_OF_ROWS = 4096

LINEAR_SIZES = [(1024, 32000)]

USUAL = ("fused", "in_place", "eager")


def losses(options: Namespace, found: Measurements) -> None:
    """Measure every loss, phase, dtype and shape."""
    names, on_gpu = options.losses or list(LOSSES), options.device == "cuda"
    shapes = options.shapes or (QUICK_SHAPES if options.quick else SHAPES)
    if on_gpu and not options.shapes:
        classes = GPU_QUICK_CLASSES if options.quick else GPU_CLASSES
        shapes = [(GPU_ELEMENTS // c, c) for c in classes]
    # Memory first, since nothing else may run while a call is timed.  It grows like the logits, so
    # the first shape is enough.
    first: Shape = shapes[0]
    jobs = [
        Job(name, variant, dtype, *first, options.device)
        for dtype in options.dtypes
        for name in names
        for variant in ((*USUAL, "compile") if _compiles(options, first) else USUAL)
        if getattr(LOSSES[name], variant) is not None
    ]
    memory: dict[tuple[str, str, Shape], dict[str, int | None]] = {}
    with progress("memory", len(jobs)) as advance:
        for job, extra in zip(jobs, extra_memory(jobs), strict=True):
            memory.setdefault((job.loss, job.dtype, first), {})[job.variant] = extra
            advance(f"{job.loss} {job.dtype}")
    reasons = [limit.why_not(DTYPES[dtype], options.device) for dtype in options.dtypes]
    for why in dict.fromkeys(filter(None, reasons)):
        print(f"no limit: {why}", file=sys.stderr)
    if not all(reasons):
        found.machine["limit_compiler"] = limit.describe_compiler()
    phases = PHASES if options.phases or on_gpu else PHASES[:3]
    plan = (names, shapes, phases, VARIANTS, options.dtypes, memory)
    for record in _run("losses", options, *plan):
        found.results.append(record)
        # A kernel that never ends must not take the records before it along.
        if options.json not in (None, DEFAULT_FILE):
            found.write(options.json)


def scale(options: Namespace, found: Measurements) -> None:
    """Measure a few losses over the number of classes and over the number of rows."""
    small = 6 if options.quick else 0  # the number of halvings
    elements, most_rows = SCALE_ELEMENTS >> small, max(SCALE_ROWS) >> small
    phases = ("forward", "training")
    shapes = [(max(1, elements // c), c) for c in SCALE_CLASSES]
    found.by_classes += _run("classes", options, SCALED, shapes, phases)
    shapes = [(r, CLASSES_OF_ROWS) for r in SCALE_ROWS if r <= most_rows]
    # Not eager torch: its curve is as flat, and the most rows take several times the memory.
    found.by_rows += _run("rows", options, SCALED, shapes, phases, ("fused",))


def threads(options: Namespace, found: Measurements) -> None:
    """Measure a few losses with one thread and more."""
    shapes = options.shapes or (QUICK_SHAPES if options.quick else SHAPES[:1])
    most = torch.get_num_threads()
    for count in options.threads or sorted({2**n for n in range(most.bit_length())} | {most}):
        with torch_threads(count):
            found.threads += _run(f"{count} threads", options, SCALED, shapes, ("training",))


def overhead(options: Namespace, found: Measurements) -> None:
    """Measure calls on tiny inputs."""
    names = options.losses or list(LOSSES)
    with progress("overhead", len(names)) as advance:
        for name in names:
            found.overhead.append(time_overhead(name, _budget(options), options.device))
            advance(name)


def instructions(options: Namespace, found: Measurements) -> None:
    """Count instructions per element, if valgrind is installed."""
    names = options.losses or (SCALED if options.quick else list(LOSSES))
    dtypes = _without_f16(options)
    if why := why_not():
        print(f"No instructions counted: {why}")
        return
    with progress("instructions", len(names) * len(dtypes) + 1) as advance:
        found.instructions += count_instructions(names, dtypes, advance)


def linear_losses(options: Namespace, found: Measurements) -> None:
    """Measure cross entropy of a linear layer; shapes are those of the logits."""
    jobs = [
        linear.LinearJob("fused", dtype, rows, options.hidden, classes, options.device)
        for rows, classes in options.shapes or LINEAR_SIZES
        for dtype in _without_f16(options)
    ]
    curve = [] if options.quick else [j for j in jobs if j[2:] == jobs[0][2:]]
    with progress("linear", len(jobs) + len(linear.FACTORS) * len(curve)) as advance:
        for job in jobs:
            compiled = options.compile and not options.quick
            found.linear.append(linear.run_linear(job, _budget(options), compiled))
            advance(f"{job.rows} rows, {job.dtype}")
        for job in curve:
            for record in linear.memory_by_rows(job):
                found.linear_memory.append(record)
                advance(f"memory of {record['rows']} rows, {job.dtype}")


def _run(
    title: str,
    options: Namespace,
    usual_losses: Sequence[str],
    shapes: Sequence[Shape],
    phases: Sequence[str],
    variants: Sequence[str] = USUAL,
    dtypes: Sequence[str] = (),
    memory: Mapping[tuple[str, str, Shape], Mapping[str, int | None]] | None = None,
) -> Iterator[Record]:
    """Time losses at every shape and dtype."""
    names = options.losses or usual_losses
    cases = [(n, d, s) for s in shapes for d in dtypes or _without_f16(options) for n in names]
    with progress(title, len(cases)) as advance:
        for case in cases:
            name, dtype, shape = case
            if time.perf_counter() > options.started + options.stop_after:
                print(f"out of time before {name} {dtype} {shape}", file=sys.stderr)
                break
            some = [v for v in variants if v != "compile" or _compiles(options, shape)]
            extra = (memory or {}).get(case, {})
            plan = (_budget(options), some, phases, options.device, extra)
            yield time_loss(LOSSES[name], dtype, shape, *plan)
            advance(f"{name} {dtype} {shape[0]}×{shape[1]}")


def _compiles(options: Namespace, shape: Shape) -> bool:
    """Tell whether torch.compile is timed at a shape."""
    chosen = options.compile_classes
    if chosen is None:
        chosen = [] if options.device == "cuda" or options.shapes else COMPILED_CLASSES
    everywhere = not chosen
    return options.compile and not options.quick and (everywhere or shape[1] in chosen)


def _budget(options: Namespace) -> Budget:
    usual = 0.3 if options.quick else 1.0
    return Budget(usual if options.seconds is None else options.seconds, options.rounds)


def _without_f16(options: Namespace) -> Sequence[str]:
    """Return the dtypes except f16, which costs what bf16 does, unless it is the only one."""
    return [d for d in options.dtypes if d != "f16"] or options.dtypes


PARTS: dict[str, Callable[[Namespace, Measurements], None]] = {
    "losses": losses,
    "scale": scale,
    "threads": threads,
    "overhead": overhead,
    "instructions": instructions,
    "linear": linear_losses,
}
