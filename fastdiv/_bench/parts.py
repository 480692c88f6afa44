"""The parts of the benchmark: which sizes and losses each of them consists of."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .._cli.console import progress
from . import linear
from .instructions import count_instructions, why_not
from .losses import LOSSES
from .measurements import Measurements
from .overhead import run_overhead
from .result import PHASES, VARIANTS, Result, Shape
from .run import Plan, run
from .timing import Budget

# Language models with three vocabularies, a speech recogniser, many short rows, few long ones.
SHAPES = [(512, 32000), (128, 128256), (64, 256000), (4096, 4233), (65536, 100), (2, 256000)]
QUICK_SHAPES = [(64, 32000)]
COMPILED_CLASSES = [32000]  # torch.compile takes eight seconds for every loss, dtype and shape

# More than caches hold: 268 MB of half logits.  Powers of two, and the vocabulary of GPT-2.
GPU_ELEMENTS = 2**27
GPU_CLASSES = sorted([2**n for n in range(8, 19)] + [50257])

SCALED = ("cross_entropy", "kl_div", "js_div", "entropy")  # a kernel of each kind
SCALE_ELEMENTS = 2**24
SCALE_CLASSES = [2**n for n in range(10, 19)]
SCALE_ROWS = [4**n for n in range(9)]
CLASSES_OF_ROWS = 4096

LINEAR_SIZES = [(1024, 32000)]


def default_shapes(options: Namespace) -> Sequence[Shape]:
    """The shapes of a run that names none."""
    if options.device == "cuda":
        classes = [1024, 8192, 50257, 131072] if options.quick else GPU_CLASSES
        return [(GPU_ELEMENTS // c, c) for c in classes]
    return QUICK_SHAPES if options.quick else SHAPES


def thread_counts() -> list[int]:
    """Powers of two up to what torch uses, and that."""
    most = torch.get_num_threads()
    return sorted({2**n for n in range(most.bit_length())} | {most})


def names_of(options: Namespace, usual: Sequence[str]) -> Sequence[str]:
    """The losses that were named, or the usual ones."""
    return options.losses or usual


def losses(options: Namespace, found: Measurements) -> None:
    """Every loss, phase, dtype and shape."""
    on_gpu = options.device == "cuda"
    compiled = options.compile_classes
    if compiled is None:
        compiled = [] if on_gpu or options.shapes else COMPILED_CLASSES
    compile = options.compile and not options.quick
    plan = _plan(
        options,
        names_of(options, list(LOSSES)),
        options.shapes or default_shapes(options),
        options.dtypes,
        compiled_classes=compiled,
        variants=[v for v in VARIANTS if compile or v != "compile"],
        phases=PHASES if options.phases or on_gpu else PHASES[:3],
        memory=True,
    )
    found.results += _run("losses", plan)


def scale(options: Namespace, found: Measurements) -> None:
    """A few losses over the number of classes and over that of rows."""
    names = names_of(options, SCALED)
    small = 6 if options.quick else 0  # binary digits less
    elements, most_rows = SCALE_ELEMENTS >> small, max(SCALE_ROWS) >> small
    shapes = [(max(1, elements // c), c) for c in SCALE_CLASSES]
    phases = ("forward", "training")
    plan = _plan(options, names, shapes, phases=phases, variants=("fused", "in_place", "eager"))
    found.by_classes += _run("classes", plan)
    shapes = [(r, CLASSES_OF_ROWS) for r in SCALE_ROWS if r <= most_rows]
    # Eager torch needs several times the memory of the most rows, and is as flat.
    plan = _plan(options, names, shapes, phases=phases, variants=("fused",))
    found.by_rows += _run("rows", plan)


def threads(options: Namespace, found: Measurements) -> None:
    """A few losses with one thread and more."""
    shapes = options.shapes or (QUICK_SHAPES if options.quick else SHAPES[:1])
    for count in options.threads or thread_counts():
        plan = _plan(
            options,
            names_of(options, SCALED),
            shapes,
            variants=("fused", "in_place", "eager"),
            phases=("training",),
            threads=count,
        )
        found.threads += _run(f"{count} threads", plan)


def overhead(options: Namespace, found: Measurements) -> None:
    """Calls on tiny inputs."""
    names = names_of(options, list(LOSSES))
    with progress("overhead", len(names)) as advance:
        found.overhead += run_overhead(names, _budget(options), advance, options.device)


def instructions(options: Namespace, found: Measurements) -> None:
    """Instructions for an element, where valgrind is there."""
    names = names_of(options, SCALED if options.quick else list(LOSSES))
    dtypes = _dtypes_of_curves(options)
    if why := why_not():
        print(f"No instructions counted: {why}")
        return
    with progress("instructions", len(names) * len(dtypes) + 1) as advance:
        found.instructions += count_instructions(names, dtypes, advance)


def linear_losses(options: Namespace, found: Measurements) -> None:
    """Cross entropy of a linear layer; shapes are of the logits."""
    sizes = [
        linear.LinearJob("fused", dtype, rows, options.hidden, classes, options.device)
        for rows, classes in options.shapes or LINEAR_SIZES
        for dtype in _dtypes_of_curves(options)
    ]
    curve = [] if options.quick else [s for s in sizes if s[2:] == sizes[0][2:]]
    with progress("linear", 2 * len(sizes) + len(linear.FACTORS) * len(curve)) as step:
        compiled = options.compile and not options.quick
        found.linear += linear.run_linear(sizes, _budget(options), compiled, step)
        for size in curve:
            found.linear_memory += linear.memory_by_rows(size, step)


def _budget(options: Namespace) -> Budget:
    usual = 0.3 if options.quick else 1.0
    return Budget(usual if options.seconds is None else options.seconds, options.rounds)


def _dtypes_of_curves(options: Namespace) -> Sequence[str]:
    """All but f16, which costs what bf16 does, where there is another."""
    return [d for d in options.dtypes if d != "f16"] or options.dtypes


def _plan(
    options: Namespace,
    names: Sequence[str],
    shapes: Sequence[Shape],
    dtypes: Sequence[str] | None = None,
    **more: Any,
) -> Plan:
    return Plan(
        names,
        dtypes or _dtypes_of_curves(options),
        shapes,
        _budget(options),
        device=options.device,
        stop_at=options.started + options.stop_after,
        **more,
    )


def _run(title: str, plan: Plan) -> list[Result]:
    with progress(title, plan.steps) as advance:
        return run(plan, advance)


PARTS: dict[str, Callable[[Namespace, Measurements], None]] = {
    "losses": losses,
    "scale": scale,
    "threads": threads,
    "overhead": overhead,
    "instructions": instructions,
    "linear": linear_losses,
}
