"""Measurements as tables on the terminal, the README's table, and the progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from .losses import LOSSES
from .results import (
    OTHERS,
    Measurements,
    Record,
    copies,
    copy_gb_per_s,
    gb_per_s,
    nanoseconds,
    over_limit,
    size_of,
    speedup,
)
from .timing import Advance, Timing

WIDTH = 400  # of any table: a narrow terminal wraps its lines, but no figure is cut off
LINEAR_NAMES = {
    "products": "three products",
    "eager": "eager torch",
    "compile": "torch.compile",
    "chunked": "torch's chunks",
    "fused": "fastdiv",
    "per_row": "fastdiv, reduction='none'",
    "four_products": "four products",
    "log_prob": "linear_log_prob",
    "log_prob_many": "linear_log_prob, 64 classes a row",
    "log_prob_mask": "linear_log_prob, class_mask",
    "log_prob_bits": "linear_log_prob, class_mask of bits",
    "topk_ignore": "linear_topk_kl_div, missing='ignore'",
    "topk_tail": "linear_topk_kl_div, missing='tail'",
}
README_LOSSES = ("cross_entropy", "kl_div", "js_div", "entropy")
CAPTION = """\
Medians of interleaved rounds; f+b: forward and backward; ±: half the interquartile range of that.
GB/s: of the least traffic, every matrix read once in the forward and again in the backward, and one
gradient written. Copies: time of f+b over that of a copy of the logits into memory in use.
Faster: time of f+b in eager torch and under torch.compile over that of fastdiv, not in place.
Extra MB: peak memory of f+b beyond the logits, the target and the gradient.
"""
PHASES_CAPTION = """\
GB/s of the least traffic: every matrix read once in the forward and again in the backward, and one
gradient written; %: of the rate of a copy in the same rounds. Medians of interleaved rounds; f+b:
forward and backward; forward_grad: the op that does both in one pass, the gradient over the logits.
Faster: time of f+b over that of fastdiv, not in place. Extra MB: peak memory of f+b beyond logits,
target and gradient.
"""
LIMIT_CAPTION = """\
/ limit: time over that of a plain loop of the same arithmetic, vectorised by hand and compiled on
the spot. It shows what the cores can do; it has no rules for infinite logits and ignored rows.
"""
LINEAR_CAPTION = """\
Cross entropy of a linear layer, forward and backward. Products: time over that of the three matrix
products alone. Extra: peak memory beyond arguments and gradients, as the system counts it, and that
over the logits' size. Medians of interleaved rounds; ±: half the interquartile range.\
"""


@contextmanager
def progress(title: str, total: int) -> Iterator[Advance]:
    """Show a bar on stderr that counts to ``total``; nothing if stderr is not a terminal."""
    console = Console(stderr=True)
    described = TextColumn("{task.description}", markup=False)
    columns = (described, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, advance=1, description=f"{title}: {done}")


def print_table(
    title: str,
    headers: Sequence[str],
    rows: Sequence[Sequence[Any]],
    names: int = 1,
    caption: str = "",
) -> None:
    """Print a table whose first ``names`` columns are names, and the others numbers."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for i, header in enumerate(headers):
        side: Any = "left" if i < names else "right"
        table.add_column(header, justify=side, vertical="bottom", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, markup=False, width=WIDTH)
    console.print(title, style="bold", soft_wrap=True)
    console.print(table)
    if caption:
        console.print(caption, soft_wrap=True)


def print_all(found: Measurements, by_phase: bool) -> None:
    """Print a table for each part that ran."""
    line, busy = machine_line(found.machine), _busy_line(found.machine)
    title = f"fastdiv {found.machine['fastdiv']} on {line}"
    if found.results:
        (_print_phases if by_phase else _print_results)(found.results, title, busy)
    _print_scan("classes", found.by_classes)
    _print_scan("rows", found.by_rows)
    if found.threads:
        _print_threads(found.threads)
    if found.overhead:
        _print_overhead(found.overhead, line, busy)
    if found.instructions:
        _print_instructions(found.instructions)
    if found.linear:
        _print_linear(found.linear, title, busy)


def machine_line(machine: Record) -> str:
    """Describe the machine in one line."""
    if gpu := machine.get("gpu"):
        return f"{gpu['name']}, driver {gpu['driver']}, torch {machine['torch']}"
    load = machine["load_average"]
    return (
        f"{machine['cpu']}, {machine['threads']} of {machine['cpu_count']} cores, "
        f"{machine.get('cpu_isa', 'no kernels')}, torch {machine['torch']}"
        + (f", load average {load[0]:.1f}" if load else "")
    )


def _busy_line(machine: Record) -> str:
    load, cores = machine["load_average"], machine["cpu_count"]
    if "gpu" in machine or not load or not cores or load[0] < cores / 2:
        return ""
    busy = f"Other programs keep this machine busy (load average {load[0]:.1f})"
    return f"\n{busy}: do not trust times."


def _print_results(results: Sequence[Record], title: str, busy: str) -> None:
    limits, limit_caption = _limits(results, {"forward": "forward", "training": "f+b"})
    headers = ["loss", "dtype", "shape", "forward\nms", "f+b\nms", "±\n%", "in place\nms"]
    headers += ["f+b\nGB/s", "f+b\ncopies", "in place\ncopies", *limits.values()]
    headers += ["faster\nthan eager", "than\ncompile", "extra\nMB", "eager's\nextra MB"]
    rows = [
        [
            *_names(r),
            f"{r['forward_ms']['fused'].median:.2f}",
            f"{r['training_ms']['fused'].median:.2f}",
            _percent(r["training_ms"]["fused"]),
            f"{r['training_ms']['in_place'].median:.2f}" if "in_place" in r["training_ms"] else "–",
            f"{gb_per_s(r):.1f}",
            f"{copies(r):.2f}",
            f"{copies(r, 'in_place'):.2f}" if "in_place" in r["training_ms"] else "–",
            *(_over_limit(r, phase) for phase in limits),
            _faster(r, "eager"),
            _faster(r, "compile"),
            *_megabytes(r),
        ]
        for r in results
    ]
    print_table(title, headers, rows, 3, CAPTION + limit_caption + _copies_line(results) + busy)


def _print_phases(results: Sequence[Record], title: str, busy: str) -> None:
    order = list(LOSSES)
    results = sorted(results, key=lambda r: (order.index(r["loss"]), r["dtype"], r["classes"]))
    names = {"forward": "forward", "backward": "backward", "training": "f+b"}
    limits, limit_caption = _limits(results, names)
    others = [v for v in OTHERS if any(v in r["training_ms"] for r in results)]
    phases = ("forward", "backward", "f+b", "f+b in place", "forward_grad")
    headers = ["loss", "dtype", "shape", "copy\nGB/s", *(f"{phase}\nGB/s, %" for phase in phases)]
    headers += [*limits.values(), *(f"faster than\n{other}" for other in others)]
    headers += ["extra\nMB", "eager's\nextra MB"]
    rows = [
        [
            *_names(r),
            f"{copy_gb_per_s(r):.0f}",
            _rate(r, "forward"),
            _rate(r, "backward"),
            _rate(r, "training"),
            _rate(r, "training", "in_place"),
            _rate(r, "forward_grad"),
            *(_over_limit(r, phase) for phase in limits),
            *(_faster(r, other) for other in others),
            *_megabytes(r),
        ]
        for r in results
    ]
    print_table(title, headers, rows, 3, (PHASES_CAPTION + limit_caption).rstrip() + busy)


def _print_scan(over: str, results: Sequence[Record]) -> None:
    if results:
        headers, rows = _grid(results, size_of, lambda r: f"{nanoseconds(r):.2f}")
        caption = "Nanoseconds of forward and backward for an element of the logits."
        title = f"Cost of an element over the number of {over}"
        print_table(title, ["shape", *headers], rows, caption=caption)


def _print_threads(results: Sequence[Record]) -> None:
    fewest = min(r["threads"] for r in results)

    def time(r: Record) -> float:
        return r["training_ms"]["fused"].median

    first = {(*_names(r),): time(r) for r in results if r["threads"] == fewest}
    headers, rows = _grid(
        results,
        lambda r: f"{size_of(r)}, {r['threads']} threads",
        lambda r: f"{time(r):.1f} {fewest * first[(*_names(r),)] / time(r):5.2f}×",
    )
    caption = "Milliseconds of forward and backward, and how many threads' worth that is."
    print_table("Threads", ["", *headers], rows, caption=caption)


def _print_overhead(records: Sequence[Record], machine: str, busy: str) -> None:
    def microseconds(time: Timing) -> str:
        return f"{time.median * 1e3:.1f} ±{time.spread * 1e3:.1f}"

    times = [(r["loss"], r["fused_ms"], r["eager_ms"]) for r in records]
    rows = [
        [loss, microseconds(fused), microseconds(eager), _ratio(eager.median / fused.median)]
        for loss, fused, eager in times
    ]
    title = f"f+b of {size_of(records[0])} f32, one thread of the host: {machine}"
    caption = f"Medians ± half the interquartile range of rounds.{busy}"
    print_table(title, ["loss", "fastdiv µs", "eager torch µs", "faster"], rows, caption=caption)


def _print_instructions(records: Sequence[Record]) -> None:
    headers, rows = _grid(
        records,
        lambda r: r["loss"],
        lambda r: f"{r['per_element']:.2f}",
        ("dtype", "phase"),
    )
    caption = "Counted by valgrind. Training: forward and backward."
    title = f"Instructions for an element, {records[0]['isa']}"
    print_table(title, ["loss", *headers], rows, caption=caption)


def _print_linear(records: Sequence[Record], title: str, busy: str) -> None:
    headers = ["", "dtype", "rows×hidden×classes", "f+b\nms", "±\n%", "products"]
    headers += ["extra\nMB", "of logits\n%"]
    rows = []
    for r in records:
        size = f"{r['rows']}×{r['hidden']}×{r['classes']}"
        for variant, time in r["ms"].items():
            extra = r["extra_bytes"].get(variant)
            memory = ["", ""]
            if extra is not None:
                memory = [f"{extra / 1e6:.1f}", f"{100 * extra / r['logits_bytes']:.1f}"]
            products = time.median / r["ms"]["products"].median
            times = [f"{time.median:.0f}", _percent(time), f"{products:.2f}"]
            rows.append([LINEAR_NAMES[variant], r["dtype"], size, *times, *memory])
    print_table(title, headers, rows, 3, LINEAR_CAPTION + busy)


def _grid(
    records: Sequence[Record],
    row: Callable[[Record], str],
    cell: Callable[[Record], str],
    column: tuple[str, str] = ("loss", "dtype"),
) -> tuple[list[str], list[list[str]]]:
    """Return the headers and rows of a grid with a column for each pair of these two fields."""

    def header(r: Record) -> str:
        return "\n".join(r[field] for field in column)

    found = {(row(r), header(r)): cell(r) for r in records}
    headers = list(dict.fromkeys(map(header, records)))
    names = dict.fromkeys(map(row, records))
    return headers, [[name, *(found.get((name, h), "–") for h in headers)] for name in names]


def _names(r: Record) -> list[str]:
    return [r["loss"], r["dtype"], size_of(r)]


def _percent(time: Timing) -> str:
    return f"{100 * time.spread / time.median:.0f}"


def _ratio(ratio: float) -> Text:
    return Text(f"{ratio:.1f}×", "green" if ratio > 1 else "red")


def _faster(r: Record, than: str) -> Text:
    return _ratio(speedup(r, than)) if than in r["training_ms"] else Text("–")


def _limits(results: Sequence[Record], names: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """Return headers by phase and a caption; nothing if no yardstick was timed."""
    if not any("limit" in r["training_ms"] for r in results):
        return {}, ""
    return {phase: f"{name}\n/ limit" for phase, name in names.items()}, LIMIT_CAPTION


def _over_limit(r: Record, phase: str) -> str:
    return f"{over_limit(r, phase):.2f}" if "limit" in r[f"{phase}_ms"] else "–"


def _rate(r: Record, phase: str, variant: str = "fused") -> str:
    if variant not in r.get(f"{phase}_ms", ()):
        return "–"
    rate = gb_per_s(r, variant, phase)
    return f"{rate:.0f} {100 * rate / copy_gb_per_s(r):3.0f}"


def _megabytes(r: Record) -> list[str]:
    extra = (r["extra_bytes"].get(variant) for variant in ("fused", "eager"))
    return ["–" if count is None else f"{count / 1e6:.1f}" for count in extra]


def _copies_line(results: Sequence[Record]) -> str:
    """List the median copy of each dtype and shape."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for r in results:
        groups.setdefault((r["dtype"], size_of(r)), []).append(r)
    texts = []
    for (dtype, size), group in groups.items():
        middle = sorted(group, key=lambda r: r["copy_ms"].median)[len(group) // 2]
        rate = f"{copy_gb_per_s(middle):.1f} GB/s"
        texts.append(f"{dtype} {size} {middle['copy_ms'].median:.2f} ms ({rate})")
    return f"One copy: {', '.join(texts)}"


def markdown(found: Measurements) -> Iterator[str]:
    """Yield the lines of the README's table: forward and backward of the first shape."""
    first = size_of(found.results[0])
    header = "eager torch | `torch.compile` | fastdiv | in place"
    yield f"| {first}, forward + backward | {header} " + (
        "| memory beyond logits and gradient, eager → fastdiv |"
    )
    yield "|---" * 6 + "|"
    for r in found.results:
        if size_of(r) != first or r["loss"] not in README_LOSSES:
            continue
        times = {variant: f"{time.median:.0f} ms" for variant, time in r["training_ms"].items()}
        eager, compiled, in_place = (times.get(v, "–") for v in ("eager", "compile", "in_place"))
        over = [v for v in ("eager", "compile") if v in times]
        faster = ", ".join(f"{speedup(r, other):.1f}×" for other in over)
        extra = (r["extra_bytes"].get(v) for v in ("eager", "fused"))
        memory = " → ".join(
            "?" if n is None else f"{n / 1e6:.0f}" if n > 2e6 else f"{n / 1e6:.1f}" for n in extra
        )
        yield (
            f"| `{r['loss']}`, {r['dtype']} | {eager} | {compiled} "
            f"| **{times['fused']}** ({faster}) | {in_place} | {memory} MB |"
        )
    yield ""
    yield f"{machine_line(found.machine)}; medians of interleaved rounds."
