"""`python -m fastdiv bench` measures, writes, prints, draws, compares.  No figure is asserted."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiv.__main__ import main
from fastdiv._bench import linear, machine, parts, run
from fastdiv._bench.compare import compare
from fastdiv._bench.limit.build import why_not
from fastdiv._bench.losses import LOSSES, BenchmarkedLoss, as_computed
from fastdiv._bench.memory import Job, extra_memory
from fastdiv._bench.results import COPY, Measurements, make_result
from fastdiv._bench.timing import After, Budget, Timing, interleave
from helpers.cases import PUBLIC_LOSSES

pytest.importorskip("rich")
pytestmark = pytest.mark.cpu_only("the command chooses its device itself")

NAN = float("nan")
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"  # not in an sdist
QUICKLY = ["--quick", "--seconds", "0", "--rounds", "2"]


def pictures(stem: Path) -> set[str]:
    """Return the names of the pictures, and check that they hold more than empty axes."""
    found = list(stem.parent.glob(f"{stem.name}-*.png"))
    assert all(file.stat().st_size > 10_000 for file in found)
    return {file.stem.removeprefix(f"{stem.name}-") for file in found}


def test_bench_writes_what_it_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "new" / "results.json"
    command = [sys.executable, "-m", "fastdiv", "bench", *QUICKLY]
    command += ["cross_entropy", "log_prob_and_entropy", "js_div"]
    command += ["--shapes", "8x64", "--dtypes", "f32", "--json", str(file), "--plot"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert pictures(file.with_suffix("")) >= {"times"}
    written = json.loads(file.read_text())
    assert {
        "cpu",
        "threads",
        "cpu_isa",
        "torch_cpu_isa",
        "torch",
        "fastdiv",
        "load_average",
    } <= set(written["machine"])
    assert [r["loss"] for r in written["results"]] == [
        "cross_entropy",
        "log_prob_and_entropy",
        "js_div",
    ]
    cross_entropy, policy, js = written["results"]
    limit = set() if why_not(torch.float32) else {"limit"}
    assert set(cross_entropy["training_ms"]) == {"fused", "in_place", "eager"} | limit
    assert set(policy["training_ms"]) == {"fused", "eager"} | limit
    assert set(cross_entropy["forward_ms"]) == {"fused", "eager"} | limit
    assert cross_entropy["training_ms"]["fused"]["rounds"] == 2
    logits = 8 * 64 * 4
    least = {"forward": 1, "backward": 2, "training": 3}
    assert cross_entropy["minimum_bytes"] == {k: v * logits for k, v in least.items()}
    least = {"forward": 2, "backward": 3, "training": 5}
    assert js["minimum_bytes"] == {k: v * logits for k, v in least.items()}
    assert set(js["extra_bytes"]) == {"fused", "in_place", "eager"}
    for name in ("cross_entropy", "log_prob_and_entropy", "js_div"):
        assert name in done.stdout


def test_each_instruction_set_has_a_compiler_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = set()
    for isa in ("avx2", "avx512"):
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        monkeypatch.setattr(machine, "torch_cpu_isa", lambda isa=isa: isa)
        machine.give_each_isa_a_compiler_cache()
        folders.add(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert len(folders) == 2
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "chosen")
    machine.give_each_isa_a_compiler_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "chosen"


@pytest.mark.parametrize(
    ("eager", "value", "works"), [(1, 1.01, True), (1, 2, False), (1, NAN, False), (NAN, 2, True)]
)
def test_another_implementation_is_compared_with_eager_torch(
    eager: float, value: float, works: bool
) -> None:
    """It is left out if it computes something else; a NaN of eager torch does not count."""
    loss = dataclasses.replace(LOSSES["entropy"], eager=lambda x: torch.tensor(float(eager)))
    found = run._works("another", lambda x: torch.tensor(float(value)), loss, torch.zeros(1), [])
    assert found == works


def test_bench_by_phase(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A GPU is measured so: every phase, over the number of classes."""
    pytest.importorskip("matplotlib")
    file = tmp_path / "results.json"
    options = ["--dtypes", "bf16", *QUICKLY, "--phases", "--json", str(file), "--plot"]
    options += ["--shapes", "8x64", "4x128", "2x256"]
    assert main(["bench", "js_div", "log_prob_and_entropy", *options]) == 0
    assert pictures(file.with_suffix("")) >= {"times", "bandwidth"}
    results = json.loads(file.read_text())["results"]
    assert [r["classes"] for r in results] == [64, 64, 128, 128, 256, 256]
    logits = 8 * 64 * 2
    least = {"forward": 2, "backward": 3, "training": 5, "forward_grad": 3}
    assert results[0]["minimum_bytes"] == {k: v * logits for k, v in least.items()}
    for phase in least:
        assert "fused" in results[1][f"{phase}_gb_per_s"]
    assert "forward_grad" in capsys.readouterr().out


def test_every_loss_of_rows_is_benchmarked() -> None:
    rows = {name for name in PUBLIC_LOSSES if not name.startswith("linear_")}
    assert {loss.function for loss in LOSSES.values()} == rows


@pytest.mark.parametrize("name", LOSSES)
def test_the_benchmarked_loss_is_what_stands_beside_it(name: str) -> None:
    loss = LOSSES[name]
    x, *target = loss.make_inputs((8, 300), torch.float64)
    results = []
    for variant in (loss.fused, loss.eager, *filter(None, [loss.in_place])):  # which overwrites x
        logits = as_computed(x)
        value = variant(logits, *target)
        results.append((value, *torch.autograd.grad(value, logits)))
    for result in results:
        torch.testing.assert_close(result, results[0])


def test_bench_of_scale_and_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    for name, value in {
        "SCALE_ELEMENTS": 1024 << 6,
        "SCALE_CLASSES": [64, 128],
        "SCALE_ROWS": [1, 4, 256],
        "CLASSES_OF_ROWS": 64,
    }.items():
        monkeypatch.setattr(parts, name, value)
    file, threads = tmp_path / "scale.json", torch.get_num_threads()
    options = ["--scale", "--threads", "1", "2", "--shapes", "8x64", "--dtypes", "f32", *QUICKLY]
    assert main(["bench", "entropy", *options, "--json", str(file), "--plot"]) == 0
    written = json.loads(file.read_text())
    assert [(r["rows"], r["classes"]) for r in written["by_classes"]] == [(16, 64), (8, 128)]
    assert [(r["rows"], r["classes"]) for r in written["by_rows"]] == [(1, 64), (4, 64)]
    assert [r["threads"] for r in written["threads"]] == [1, 2]
    assert not written["results"]
    assert torch.get_num_threads() == threads
    assert pictures(tmp_path / "scale") == {"bandwidth", "scale", "threads"}
    assert "8×64, 2 threads" in capsys.readouterr().out


def test_a_file_is_shown_and_drawn_as_it_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.json"
    options = ["--shapes", "8x64", "--dtypes", "f32", *QUICKLY]
    assert main(["bench", "kl_div", *options, "--json", str(file)]) == 0
    printed = capsys.readouterr().out.split("written to")[0]
    assert main(["bench", "--show", str(file)]) == 0
    digits = re.compile(r"[\d.\s]+")  # of which the file holds six
    assert digits.sub(" ", capsys.readouterr().out) == digits.sub(" ", printed)
    assert main(["bench", "--show", str(file), "--markdown"]) == 0
    assert "| `kl_div`, f32 |" in capsys.readouterr().out


# --- comparing ------------------------------------------------------------------------------------


def measured(ms: float, eager_ms: float = 9.0, copy_ms: float = 1.0, **more: Any) -> Measurements:
    """Return a run of one loss, with two per cent between the quartiles."""
    by_variant = {COPY: copy_ms, ("training", "fused"): ms, ("training", "eager"): eager_ms}
    times = {k: Timing(v, 0.99 * v, 1.01 * v, 5) for k, v in by_variant.items()}
    result = make_result("kl_div", "f32", (8, 64), 1, times, more)
    machine = {"fastdiv": "0", "date": "today", "load_average": None, "cpu_count": 1}
    return Measurements(
        {**machine, "cpu": "a processor", "threads": 1, "torch": "2"}, results=[result]
    )


@pytest.mark.parametrize(
    ("after", "worse"),
    [
        (measured(3.0), 0),
        (measured(3.6), 1),
        (measured(3.2), 0),  # less than a tenth
        (measured(2.0), 0),
        (measured(6.0, 18.0, 2.0), 0),  # a machine half as fast
        (measured(3.6, copy_ms=1.2), 0),  # only beside eager torch: eager torch was fast
        (measured(3.0, fused=9_000_000), 1),
    ],
)
def test_compare(after: Measurements, worse: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(measured(3.0, fused=2_000_000), after, tolerance=0.1) == worse
    assert f"{worse} worse" in capsys.readouterr().out


def test_compare_counts_instructions(tmp_path: Path) -> None:
    files = [tmp_path / "before.json", tmp_path / "after.json"]
    for file, count in zip(files, (10.0, 11.5), strict=True):
        run = measured(3.0)
        where = {"loss": "kl_div", "dtype": "f32", "phase": "forward", "isa": "avx2"}
        run.instructions.append({**where, "per_element": count})
        run.write(file)
    before, after = map(str, files)
    assert main(["bench", "--compare", before, after]) == 1
    assert main(["bench", "--compare", after, before]) == 0
    assert main(["bench", "--compare", before, after, "--tolerance", "0.2"]) == 0


def test_what_was_measured_is_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that never ends is killed, with the process that started it."""
    time_loss = run.time_loss

    def time_or_stop(loss: BenchmarkedLoss, *plan: Any) -> dict[str, Any]:
        if loss.name == "entropy":
            raise KeyboardInterrupt
        return time_loss(loss, *plan)

    monkeypatch.setattr(parts, "time_loss", time_or_stop)
    file = tmp_path / "results.json"
    options = ["--dtypes", "f32", "--shapes", "8x64", *QUICKLY, "--json", str(file)]
    with pytest.raises(KeyboardInterrupt):
        main(["bench", "cross_entropy", "entropy", *options])
    assert [r["loss"] for r in Measurements.read(file).results] == ["cross_entropy"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bench_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--device", "cuda"])
    assert "torch finds no GPU" in capsys.readouterr().err


def test_bench_measures_the_overhead_of_calls(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, threads = tmp_path / "overhead.json", torch.get_num_threads()
    options = ["--overhead", "--seconds", "0", "--rounds", "1", "--json", str(file)]
    assert main(["bench", "entropy", *options]) == 0
    (entry,) = json.loads(file.read_text())["overhead"]
    assert entry["loss"] == "entropy"
    assert {"fused_ms", "eager_ms"} <= set(entry)
    assert "entropy" in capsys.readouterr().out
    assert torch.get_num_threads() == threads


def test_extra_memory_counts_what_a_call_allocates() -> None:
    """Eager KL holds two matrices beyond its gradient at least; the kernels none."""
    jobs = [Job("kl_div", variant, "f32", 64, 32000) for variant in ("eager", "fused", "in_place")]
    eager, fused, in_place = extra_memory(jobs)
    if eager is None:
        pytest.skip("the system does not tell")
    logits = 64 * 32000 * 4
    assert eager > 2 * logits - (1 << 20)
    assert max(fused, in_place) < logits / 4


@pytest.mark.nightly
def test_extra_memory_of_compiled_code() -> None:
    """Compiling takes memory that does not count, however large it is beside the logits."""
    eager, compiled = extra_memory(
        [Job("kl_div", v, "f32", 64, 32000) for v in ("eager", "compile")]
    )
    if eager is None:
        pytest.skip("the system does not tell")
    assert compiled is not None and compiled < eager


@pytest.mark.parametrize("name", ["cross_entropy", "kl_div", "topk_kl_div"])
def test_in_place_makes_no_second_matrix(name: str) -> None:
    """So many rows that what was freed before does not hide one."""
    (extra,) = extra_memory([Job(name, "in_place", "bf16", 512, 32000)])
    if extra is None:
        pytest.skip("the system does not tell")
    assert extra < 0.5 * (512 * 32000 * 2)


def test_rounds_interleave_and_begin_with_another_call_each_time() -> None:
    log: list[str] = []
    calls = {name: lambda name=name: log.append(name) for name in "abc"}
    times = interleave(calls, lambda: log.append("."), Budget(0.0, min_rounds=3))
    assert "".join(log).replace(".", "") == "abc" + "abc" + "bca" + "cab"
    assert log[::2] == ["."] * 12
    assert [timing.rounds for timing in times.values()] == [3, 3, 3]


def test_only_the_second_of_two_calls_is_timed() -> None:
    log: list[str] = []
    call = After(lambda: log.append("first") or 7, lambda made: log.append(f"then {made}"))

    def clock(call: Callable[[], object], repeats: int) -> float:
        log.append("clock")
        call()
        return 1.0

    interleave({"call": call}, lambda: None, Budget(0.0, min_rounds=1), clock=clock)
    assert log == ["first", "then 7"] + ["first", "clock", "then 7"]


def test_bench_of_linear_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(linear, "measured_apart", lambda _, jobs: (10**6 * j.rows for j in jobs))
    file = tmp_path / "linear.json"
    options = ("--shapes", "64x512", "--hidden", "16", "--seconds", "0", "--rounds", "1")
    options += ("--no-compile", "--dtypes", "f32", "--json", str(file), "--plot")
    assert main(["bench", "--linear", *options]) == 0
    out = capsys.readouterr().out
    assert "three products" in out and "fastdiv" in out
    written = json.loads(file.read_text())
    (result,) = written["linear"]
    assert {"products", "four_products", "eager", "fused", "per_row"} <= result["ms"].keys()
    assert {"log_prob", "log_prob_many", "log_prob_mask", "log_prob_bits"} <= result["ms"].keys()
    assert {"topk_ignore", "topk_tail"} <= result["ms"].keys()
    assert result["extra_bytes"]["fused"] == 64 * 10**6
    assert [point["rows"] for point in written["linear_memory"]] == [16, 32, 64, 128, 256, 512]
    assert "linear" in pictures(tmp_path / "linear")


def test_memory_of_linear_losses() -> None:
    """A small call, which says nothing of the logits: the kernels are counted, and answer."""
    (extra,) = linear.measured_apart(
        linear.measure, [linear.LinearJob("fused", "f32", 64, 16, 512)]
    )
    assert extra is None or 0 <= extra < 1 << 28


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_a_committed_file(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is printed, drawn, compared, and written as it was."""
    pytest.importorskip("matplotlib")
    copy = tmp_path / file.name
    assert main(["bench", "--show", str(file), "--json", str(copy), "--plot", str(copy)]) == 0
    assert main(["bench", "--show", str(file), "--phases"]) == 0
    assert pictures(copy.with_suffix("")) >= {"times", "memory"}
    before, after = (json.loads(f.read_text()) for f in (file, copy))
    before["machine"]["load_average_after"] = after["machine"]["load_average_after"]
    assert after == before
    assert main(["bench", "--compare", str(file), str(copy)]) == 0
    assert "0 worse, 0 better" in capsys.readouterr().out
