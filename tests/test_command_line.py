"""`python -m fastdiv`: what the commands print, write and return.  No figure is asserted."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiv
from fastdiv import _backend, reference
from fastdiv.__main__ import main
from fastdiv._bench.memory import Job, extra_memory
from fastdiv._bench.timing import After, Budget, interleave

pytestmark = pytest.mark.cpu_only("the commands choose their device themselves")

PUBLIC_LOSSES = [
    name
    for name in fastdiv.__all__
    if inspect.isfunction(getattr(fastdiv, name)) and name not in ("backend", "build_info")
]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastdiv", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_info_names_versions_and_instruction_sets() -> None:
    done = run("info")
    assert done.returncode == 0, done.stderr
    facts = dict(line.split(None, 1) for line in done.stdout.splitlines() if "," not in line)
    assert facts["torch"] == torch.__version__
    assert facts["fastdiv"] == fastdiv.__version__
    for isa in fastdiv.build_info()["cpu_isas_built"]:
        assert isa in done.stdout


def test_check_mentions_every_loss_and_passes() -> None:
    done = run("check", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    first_words = {line.split()[0] for line in done.stdout.splitlines() if line.strip()}
    assert set(PUBLIC_LOSSES) | set(reference.DIVERGENCES) <= first_words
    passed, failed = done.stdout.splitlines()[-1].split(", ")
    assert int(passed.removesuffix(" passed")) > 0
    assert failed == "0 failed"


def test_check_fails_where_a_value_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = reference.DIVERGENCES["kl_div"]
    monkeypatch.setitem(
        reference.DIVERGENCES, "kl_div", lambda *arguments: 1.0001 * right(*arguments)
    )
    assert main(["check", "kl_div", "--quick"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_check_fails_where_a_gradient_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = fastdiv.entropy

    def wrong(x: Tensor, **options: Any) -> Tensor:
        error = 1e-3 if _backend._current == "native" else 0.0
        return right(x, **options) + error * (x - x.detach()).nan_to_num().sum(-1)

    monkeypatch.setattr(fastdiv, "entropy", wrong)
    assert main(["check", "entropy", "--quick"]) == 1
    line = next(s for s in capsys.readouterr().out.splitlines() if s.startswith("entropy"))
    value_error, gradient_error = map(float, line.split()[2:4])
    assert value_error < 1 < gradient_error


def test_check_fails_where_a_kernel_raises(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = fastdiv.log_prob

    def broken(*arguments: Tensor) -> Tensor:
        if _backend._current == "native":
            raise RuntimeError("no such kernel")
        return right(*arguments)

    monkeypatch.setattr(fastdiv, "log_prob", broken)
    assert main(["check", "log_prob", "--quick"]) == 1
    printed = capsys.readouterr().out
    assert "log_prob labels float32: RuntimeError: no such kernel" in printed
    assert "0 passed" in printed


def test_check_restores_the_instruction_set() -> None:
    before = fastdiv.build_info()["cpu_isa"]
    assert main(["check", "entropy", "--quick"]) == 0
    assert fastdiv.build_info()["cpu_isa"] == before


def test_without_kernels_the_reference_is_checked_and_check_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_backend, "_C", None)
    monkeypatch.setattr(_backend, "load_error", ImportError("it was not built"))
    assert main(["check", "cross_entropy", "--quick", "--verbose"]) == 1
    printed = capsys.readouterr().out
    assert "The kernels are missing" in printed and "it was not built" in printed
    assert "reference" in printed and ", 0 failed" in printed
    assert "bfloat16" in printed and "5×1021" in printed  # --verbose
    assert main(["info"]) == 0
    assert "it was not built" in capsys.readouterr().out


def test_info_and_check_work_without_rich(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["info"]) == 0
    assert main(["check", "entropy", "--quick"]) == 0
    printed = capsys.readouterr().out
    assert "entropy" in printed and "0 failed" in printed


def test_bench_writes_what_it_measured(tmp_path: Path) -> None:
    file, plot = tmp_path / "new" / "results.json", tmp_path / "results.png"
    done = run(
        *("bench", "cross_entropy", "log_prob_and_entropy", "js_div", "--quick"),
        *("--shapes", "8x64", "--dtypes", "f32", "--seconds", "0", "--rounds", "2"),
        *("--json", str(file), "--plot", str(plot)),
    )
    assert done.returncode == 0, done.stderr
    assert plot.stat().st_size > 0
    written = json.loads(file.read_text())
    assert {"cpu", "threads", "cpu_isa", "torch", "fastdiv", "load_average"} <= set(
        written["machine"]
    )
    assert [r["loss"] for r in written["results"]] == [
        "cross_entropy",
        "log_prob_and_entropy",
        "js_div",
    ]
    cross_entropy, policy, js = written["results"]
    assert set(cross_entropy["training_ms"]) == {"fused", "in_place", "eager"}
    assert set(policy["training_ms"]) == {"fused", "eager"}
    assert set(cross_entropy["forward_ms"]) == {"fused", "eager"}
    assert cross_entropy["training_ms"]["fused"]["rounds"] == 2
    logits = 8 * 64 * 4
    assert cross_entropy["minimum_bytes"] == {"forward": logits, "training": 3 * logits}
    assert js["minimum_bytes"] == {"forward": 2 * logits, "training": 5 * logits}
    assert set(js["extra_bytes"]) == {"fused", "in_place", "eager"}
    for name in ("cross_entropy", "log_prob_and_entropy", "js_div"):
        assert name in done.stdout


def test_bench_by_phase(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a GPU is measured by: every phase, over the number of classes."""
    file, plot = tmp_path / "results.json", tmp_path / "results.png"
    options = ["--dtypes", "bf16", "--quick", "--seconds", "0", "--rounds", "1", "--phases"]
    options += ["--shapes", "8x64", "4x128", "--json", str(file), "--plot", str(plot)]
    assert main(["bench", "js_div", "log_prob_and_entropy", *options]) == 0
    assert plot.stat().st_size > 0
    results = json.loads(file.read_text())["results"]
    assert [r["classes"] for r in results] == [64, 64, 128, 128]
    logits = 8 * 64 * 2
    least = {"forward": 2, "backward": 3, "training": 5, "forward_grad": 3}
    assert results[0]["minimum_bytes"] == {k: v * logits for k, v in least.items()}
    for phase in least:
        assert results[1][f"{phase}_gb_per_s"]["fused"] > 0
    assert "forward_grad" in capsys.readouterr().out


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


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["check", "kl"],
        ["bench", "kl"],
        ["bench", "--shapes", "8"],
        ["bench", "--shapes", "0x8"],
        ["bench", "--rounds", "0"],
        ["bench", "--overhead", "--plot", "x.png"],
    ],
)
def test_wrong_options_end_with_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_bench_of_linear_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "linear.json", tmp_path / "linear.png"
    options = ("--quick", "--shapes", "64x512", "--hidden", "16", "--seconds", "0", "--rounds", "1")
    files = ("--json", str(file), "--plot", str(picture))
    assert main(["bench", "--linear", *options, "--dtypes", "f32", *files]) == 0
    out = capsys.readouterr().out
    assert "three products" in out and "fastdiv" in out
    (result,) = json.loads(file.read_text())["linear"]
    assert {"products", "eager", "fused", "per_row"} <= result["ms"].keys()
    assert picture.stat().st_size > 10_000
