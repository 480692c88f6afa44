"""All parts of a run on the terminal, and the table of the README."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from .._cli.console import print_table
from .instructions import Count
from .linear_report import print_linear
from .measurements import Measurements
from .report import machine_line, print_bandwidths, print_overhead, print_results
from .result import Result

README_LOSSES = ("cross_entropy", "kl_div", "js_div", "entropy")


def print_all(found: Measurements, by_phase: bool) -> None:
    """A table for each part that ran."""
    machine = found.machine
    if found.results:
        (print_bandwidths if by_phase else print_results)(found.results, machine)
    _print_scan("Cost of an element over the number of classes", found.by_classes)
    _print_scan("Cost of an element over the number of rows", found.by_rows)
    _print_threads(found.threads)
    if found.overhead:
        print_overhead(found.overhead, machine)
    _print_instructions(found.instructions)
    if found.linear:
        print_linear(found.linear, machine)


def _print_scan(title: str, results: Sequence[Result]) -> None:
    if results:
        print_table(
            title,
            ["shape", *(f"{loss}\n{dtype}" for loss, dtype in _columns(results))],
            _grid(results, lambda r: r.size, lambda r: f"{r.nanoseconds():.2f}"),
            caption="Nanoseconds of forward and backward for an element of the logits.",
        )


def _print_threads(results: Sequence[Result]) -> None:
    if not results:
        return
    fewest = min(r.threads for r in results)
    first = {(r.loss, r.dtype, r.shape): r for r in results if r.threads == fewest}

    def cell(result: Result) -> str:
        one = first[result.loss, result.dtype, result.shape].training["fused"].median
        ours = result.training["fused"].median
        return f"{1e3 * ours:.1f} {fewest * one / ours:5.2f}×"

    print_table(
        "Threads",
        ["", *(f"{loss}\n{dtype}" for loss, dtype in _columns(results))],
        _grid(results, lambda r: f"{r.size}, {r.threads} threads", cell),
        caption="Milliseconds of forward and backward, and how many threads' worth that is.",
    )


def _columns(results: Sequence[Result]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((r.loss, r.dtype) for r in results))


def _grid(
    results: Sequence[Result], row: Callable[[Result], str], cell: Callable[[Result], str]
) -> list[list[str]]:
    """A row for every size, a column for every loss and dtype."""
    found = {(row(r), (r.loss, r.dtype)): cell(r) for r in results}
    names = list(dict.fromkeys(name for name, _ in found))
    return [[name, *(found.get((name, c), "–") for c in _columns(results))] for name in names]


def _print_instructions(counts: Sequence[Count]) -> None:
    if not counts:
        return
    found = {(c.loss, (c.dtype, c.phase)): c for c in counts}
    columns = list(dict.fromkeys((c.dtype, c.phase) for c in counts))
    names = list(dict.fromkeys(c.loss for c in counts))
    print_table(
        f"Instructions for an element, {counts[0].isa}",
        ["loss", *(f"{dtype}\n{phase}" for dtype, phase in columns)],
        [[name, *(f"{found[name, c].per_element:.2f}" for c in columns)] for name in names],
        caption="Counted by valgrind. Training: forward and backward.",
    )


def markdown(found: Measurements) -> Iterator[str]:
    """The lines of the README's table: forward and backward of the first shape."""
    shown = [r for r in found.results if r.shape == found.results[0].shape]
    shown = [r for r in shown if r.loss in README_LOSSES]
    header = ["eager torch", "`torch.compile`", "fastdiv", "in place"]
    memory = "memory beyond logits and gradient, eager → fastdiv"
    yield f"| {shown[0].size}, forward + backward | {' | '.join(header)} | {memory} |"
    yield "|---" * (len(header) + 2) + "|"
    for r in shown:
        others = [v for v in ("eager", "compile") if v in r.training]
        faster = ", ".join(f"{r.speedup(other):.1f}×" for other in others)
        cells = [
            f"`{r.loss}`, {r.dtype}",
            _milliseconds(r, "eager"),
            _milliseconds(r, "compile"),
            f"**{_milliseconds(r, 'fused')}** ({faster})",
            _milliseconds(r, "in_place"),
            " → ".join(_megabytes(r.extra_bytes.get(v)) for v in ("eager", "fused")) + " MB",
        ]
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield f"{machine_line(found.machine)}; medians of interleaved rounds."


def _milliseconds(result: Result, variant: str) -> str:
    timing = result.training.get(variant)
    return f"{1e3 * timing.median:.0f} ms" if timing else "–"


def _megabytes(count: int | None) -> str:
    return "?" if count is None else f"{count / 1e6:.0f}" if count > 2e6 else f"{count / 1e6:.1f}"
