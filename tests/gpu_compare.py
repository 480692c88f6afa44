"""Times the kernel variants side by side: what ``gpu_check.py variants`` runs.

Each variant is a process of its own, for two binaries cannot register the same ops in one.  All of
them start together.  Then every loss, dtype and shape goes through all variants, one after the
other, each beside a copy of its logits.  So a GPU that slows down slows all of them.  A variant is
first compared with eager torch in float64, and one that is wrong is not timed.

``gpu_compare.py --show FILE`` prints the tables again, and ``--moved NAME`` what a variant moved.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpu_build import BINARY, is_current, sources
from gpu_kit import flags_of, folder_of
from gpu_variants import BASE, LOSSES, VARIANTS, predicted_share

Found = dict[str, Any]
PATIENCE = 20  # seconds for an answer; a kernel may wait for ever
TABLED = ("forward", "backward", "forward_grad")


def extended(*folders: Path) -> str:
    """PYTHONPATH with these folders first."""
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(dict.fromkeys([*map(str, folders), *filter(None, before)]))


class Worker:
    """The process of a variant."""

    def __init__(self, name: str, folder: Path, tree: Path, dry_run: bool) -> None:
        self.name, self.folder = name, folder
        # The tree comes second: the package reads its version there.
        path = extended(folder, tree)
        command = [sys.executable, str(Path(__file__).with_name("gpu_worker.py"))]
        self.process = subprocess.Popen(
            [*command, *(["--dry-run"] if dry_run else [])],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: object, at_most: float) -> Found:
        """The answer to a request; what comes at the start answers None."""
        assert self.process.stdin is not None and self.process.stdout is not None
        if request is not None:
            with suppress(BrokenPipeError):
                self.process.stdin.write(json.dumps(request) + "\n")
                self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], at_most)[0]:
            return {"error": f"no answer in {at_most:.0f} s"}
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": f"ended with {self.process.wait()}"}

    def end(self) -> None:
        """Ends the process, also one that waits for a kernel that does not end."""
        self.process.kill()
        with self.process:  # which closes the pipes
            pass


def packages(kit: Path, tree: Path, made: Path) -> Iterator[tuple[str, Path]]:
    """Folders for PYTHONPATH: the tree, and its Python files with the binary of each variant."""
    yield BASE, tree
    for name, variant in VARIANTS.items():
        binary = folder_of(kit, name) / BINARY
        if not is_current(binary.parent, sources(tree, flags_of(variant))):
            why = "was built of other sources" if binary.is_file() else "does not exist"
            print(f"{name} left out: {binary} {why}")
            continue
        package = made / name / "fastdiv"
        shutil.rmtree(package, ignore_errors=True)
        shutil.copytree(
            tree / "fastdiv", package, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
        shutil.copy(binary, package)
        yield name, package.parent


def measure(kit: Path, file: Path, dry_run: bool, stop_after: float) -> Found:
    """Times all variants, and writes the file after each case."""
    start, tree = time.perf_counter(), Path.cwd()
    found: Found = {"variants": {}, "linear": {}, "left_out": {}}
    made, patience = tree / "build/variants", PATIENCE * (10 if dry_run else 1)
    workers = [Worker(name, at, tree, dry_run) for name, at in packages(kit, tree, made)]
    try:
        from gpu_worker import DRY_RUN, FULL  # imports torch, while the processes do

        plan = DRY_RUN if dry_run else FULL
        for worker in list(workers):
            first = worker.ask(None, max(1, patience + start - time.perf_counter()))
            why = first.get("error") or "; ".join(first["wrong"])
            if not why and not Path(first["package"]).is_relative_to(worker.folder):
                why = f"imported {first['package']}"
            if why:
                leave_out(worker, why, workers, found)
                continue
            macros = vars(VARIANTS[worker.name]) if worker.name != BASE else {}
            about = {"machine": first["machine"], "results": []}
            found["variants"][worker.name] = {**macros, **about}
        print(f"{len(workers)} variants are right after {time.perf_counter() - start:.0f} s")
        requests: list[Any] = [
            (loss, dtype, shape)
            for shape in plan.shapes
            for dtype in plan.dtypes
            for loss in LOSSES
        ]
        # The layer is more than one kernel, and a difference there is not one of variants.
        requests.insert(len(plan.dtypes) * len(LOSSES), "linear")
        for request in requests:
            if time.perf_counter() - start > stop_after:
                print(f"out of time before {request}")
                break
            for worker in list(workers):
                if request == "linear" and worker.name != BASE:
                    continue
                record = worker.ask(request, patience)
                if request == "linear":
                    found["linear"] = record
                elif "error" in record:
                    leave_out(worker, f"{request}: {record['error']}", workers, found)
                else:
                    found["variants"][worker.name]["results"].append(record)
            workers = workers[1:] + workers[:1]
            write(found, file)
    except KeyboardInterrupt:  # at the end of the step's time
        print("interrupted; what follows is what was measured")
    finally:
        for worker in workers:
            worker.end()
    write(found, file)
    return found


def write(found: Found, file: Path) -> None:
    add_predictions(found)
    file.write_text(json.dumps(found, indent=1) + "\n")


def leave_out(worker: Worker, why: str, workers: list[Worker], found: Found) -> None:
    """Goes on without a variant that is wrong or that failed."""
    print(f"{worker.name} left out: {why}", flush=True)
    found["left_out"][worker.name] = why
    workers.remove(worker)
    worker.end()


# --- what is printed ------------------------------------------------------------------------------


def add_predictions(found: Found) -> None:
    """Writes the predicted share of a copy into the records of the extension itself."""
    if BASE not in found["variants"]:
        return
    base = found["variants"][BASE]
    gpu = base["machine"].get("gpu")
    for record in base["results"] if gpu else ():
        shares = {
            phase: predicted_share(
                record["loss"], record["dtype"], phase, gpu["multiprocessors"], copy_rate(record)
            )
            for phase in TABLED
        }
        record["predicted_share_of_a_copy"] = shares


def copy_rate(record: Found) -> float:
    """GB/s of the copy in the same rounds."""
    return float(record["copy_gb_per_s"])


def share(record: Found, phase: str) -> float:
    """The rate of a phase over that of a copy."""
    return float(record[f"{phase}_gb_per_s"]["fused"]) / copy_rate(record)


def by_case(found: Found) -> dict[tuple[str, str, str], dict[str, Found]]:
    """Records by loss, dtype and size, and by variant."""
    cases: dict[tuple[str, str, str], dict[str, Found]] = {}
    for name, variant in found["variants"].items():
        for r in variant["results"]:
            case = (r["loss"], r["dtype"], f"{r['rows']}x{r['classes']}")
            cases.setdefault(case, {})[name] = r
    return cases


def print_tables(found: Found) -> None:
    """The share of a copy of each variant, then the layer, then the means on one line."""
    from fastdiv._bench.tables import print_table

    names = list(found["variants"])
    rows = []
    for case, records in by_case(found).items():
        for phase in TABLED:
            first = next(iter(records.values()))
            predicted = first.get("predicted_share_of_a_copy", {}).get(phase)
            shares = [percent(share(records[n], phase) if n in records else None) for n in names]
            rows.append([*case, phase, f"{copy_rate(first):.0f}", percent(predicted), *shares])
    headers = ["loss", "dtype", "shape", "phase", "copy\nGB/s", "predicted\n%"]
    caption = "\n".join(
        f"{name}: {VARIANTS[name].macros}. {VARIANTS[name].changes} "
        f"Predicted: {VARIANTS[name].predicted}"
        for name in names
        if name in VARIANTS
    )
    title = "GB/s of the least traffic, as % of a copy in the same rounds"
    print_table(title, [*headers, *(f"{name}\n%" for name in names)], rows, 4, caption)
    if why := found["linear"].get("error"):
        print(f"linear_cross_entropy FAILED: {why}")
    elif found["linear"]:
        print_linear(found["linear"])
    for name, why in found["left_out"].items():
        print(f"{name} LEFT OUT: {why}")
    print(f"forward, times of base: {', '.join(means(found)) or 'alone'}")


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f}"


def print_linear(r: Found) -> None:
    from fastdiv._bench.tables import print_table

    products = r["ms"]["products"]["median"]
    rows = []
    for name, time_of in r["ms"].items():
        extra = r["extra_bytes"].get(name)
        memory = "–" if extra is None else f"{extra / 1e6:.0f}"
        rows.append(
            [name, f"{time_of['median']:.2f}", f"{time_of['median'] / products:.2f}", memory]
        )
    size = f"{r['rows']}x{r['hidden']}x{r['classes']} {r['dtype']}"
    headers = ["", "ms", "products", "extra\nMB"]
    title = f"linear_cross_entropy, forward and backward, {size}"
    print_table(title, headers, rows, 1, "Extra: gradients and all else that a call allocates.")


def means(found: Found) -> Iterator[str]:
    """The geometric mean of a variant's forward, in times of the extension itself."""
    for name in found["variants"]:
        ratios = [
            share(records[BASE], "forward") / share(records[name], "forward")
            for records in by_case(found).values()
            if name in records and BASE in records
        ]
        if ratios and name != BASE:
            yield f"{name} {math.exp(sum(map(math.log, ratios)) / len(ratios)):.2f}"


def moved(found: Found, name: str) -> None:
    """Prints what a variant moved beyond the noise, as ``bench --compare`` does."""
    from fastdiv._bench.compare import compare
    from fastdiv._bench.results import Measurements, _with_timing

    runs = [found["variants"][n] for n in (BASE, name)]
    texts = [json.dumps(run["results"]) for run in runs]
    results = [json.loads(text, object_hook=_with_timing) for text in texts]
    machines = [run["machine"] for run in runs]
    before, after = (Measurements(m, r) for m, r in zip(machines, results, strict=True))
    compare(before, after, tolerance=0.03)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kit", type=Path, help="the folder with binaries of variants")
    parser.add_argument("--json", type=Path, metavar="FILE", help="what is measured, to be written")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU")
    parser.add_argument("--stop-after", type=float, default=math.inf, metavar="SECONDS")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print this file instead")
    parser.add_argument("--moved", metavar="NAME", help="with --show: what this variant moved")
    options = parser.parse_args()
    if options.show:
        found = json.loads(options.show.read_text())
        if options.moved:
            moved(found, options.moved)
        else:
            print_tables(found)
        return 0
    found = measure(options.kit, options.json, options.dry_run, options.stop_after)
    print_tables(found)
    return int(bool(found["left_out"] or "error" in found["linear"]))


if __name__ == "__main__":
    sys.exit(main())
