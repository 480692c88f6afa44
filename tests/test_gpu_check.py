"""What gpu_check.py does with its steps, where no GPU is needed to tell."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

import gpu_build
import gpu_check
import gpu_compare
import gpu_kit
import gpu_steps
import gpu_variants
import gpu_worker
from fastdiv._bench import losses as benchmarked
from gpu_steps import Check, Step
from helpers.processes import wait_until_ended

pytestmark = pytest.mark.cpu_only("no GPU is used")


@pytest.fixture
def check(tmp_path: Path) -> Check:
    return Check(tmp_path, tmp_path, tmp_path / "kit", False, "")


def outcome(
    monkeypatch: pytest.MonkeyPatch, check: Check, code: str, seconds: int = 100
) -> gpu_check.Outcome:
    """That of a step which runs this Python code."""
    step = Step(seconds, lambda check: check.python("-u", "-c", code))
    monkeypatch.setitem(gpu_check.STEPS, "step", step)
    return gpu_check.run_step("step", check, {}, 1000)


@pytest.mark.parametrize(
    ("code", "result", "note"),
    [
        ("print('first'); print('last')", "PASS", "last"),
        ("print('said'); raise SystemExit(3)", "FAIL", "said"),
        ("raise SystemExit('a reason')", "FAIL", "a reason"),
    ],
)
def test_outcome(
    monkeypatch: pytest.MonkeyPatch, check: Check, code: str, result: str, note: str
) -> None:
    found = outcome(monkeypatch, check, code)
    assert (found.result, found.note) == (result, note)
    assert note in (check.out / "log.txt").read_text()


def test_a_late_step_says_what_it_has_found(monkeypatch: pytest.MonkeyPatch, check: Check) -> None:
    code = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    time.sleep(500)
except KeyboardInterrupt:
    print("2 failed, 3 passed")
"""
    found = outcome(monkeypatch, check, code, seconds=5)
    assert found.result == "LATE"
    assert found.note == "stopped after 5 s; 2 failed, 3 passed"


def test_a_late_step_that_does_not_listen_is_killed(
    monkeypatch: pytest.MonkeyPatch, check: Check
) -> None:
    """So is what it has started."""
    ignore = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(500)"
    code = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "{ignore}"])
print("child", child.pid)
{ignore}
"""
    monkeypatch.setattr(gpu_check, "PATIENCE", 1)
    assert outcome(monkeypatch, check, code, seconds=5).result == "LATE"
    (child,) = re.findall(r"^child (\d+)$", (check.out / "log.txt").read_text(), re.MULTILINE)
    wait_until_ended([int(child)])


def test_steps_that_cannot_run_are_skipped(monkeypatch: pytest.MonkeyPatch, check: Check) -> None:
    monkeypatch.setitem(gpu_check.STEPS, "step", Step(9, lambda _: "no profiler"))
    found = gpu_check.run_step("step", check, {}, 1000)
    assert (found.result, found.note) == ("SKIP", "no profiler")
    monkeypatch.setitem(gpu_check.STEPS, "step", Step(9, lambda check: check.python("-V")))
    found = gpu_check.run_step("step", check, {}, 1)
    assert (found.result, found.note) == ("SKIP", "no time left")


@pytest.mark.parametrize("dry_run", [False, True], ids=["GPU", "dry run"])
@pytest.mark.parametrize("name", gpu_steps.STEPS)
def test_commands(monkeypatch: pytest.MonkeyPatch, check: Check, name: str, dry_run: bool) -> None:
    """Files that a command names exist, and a benchmark stops within the time of its step."""
    monkeypatch.setattr(gpu_steps, "_tool", lambda name: f"/usr/bin/{name}")
    check = Check(**{**vars(check), "dry_run": dry_run, "seconds": 40})
    command = gpu_steps.STEPS[name].command(check)
    if isinstance(command, str):
        assert dry_run and name == "compiled"
        return
    for word in command:
        path = word.removeprefix("--ignore=")
        assert not path.startswith("tests/") or (gpu_check.ROOT / path).is_file()
    if not dry_run and "--stop-after" in command:
        assert command[command.index("--stop-after") + 1] == "25"
    assert ("--device=cpu" in command) == (
        dry_run and name not in ("build", "info", "check", "variants")
    )


# --- a binary that was built elsewhere ------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree whose extension is a module of Python, which any machine can load."""
    for module in (gpu_build, gpu_kit, gpu_compare):
        monkeypatch.setattr(module, "BINARY", "_C.py")
    tree = tmp_path / "tree"
    (tree / "csrc/cuda").mkdir(parents=True)
    (tree / "fastdiv").mkdir()
    (tree / "setup.py").write_text("1")
    (tree / "csrc/cuda/reduce.cu").write_text("2")
    (tree / "fastdiv/__init__.py").write_text("")
    return tree


def test_prebuilt(tmp_path: Path, tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kit, binary = tmp_path / "kit", tree / "fastdiv/_C.py"
    assert not gpu_build.take(kit, tree)
    assert "does not exist" in capsys.readouterr().out

    binary.write_text("def gpu_trouble(index): return ''\n")
    gpu_kit.save(kit, tree, gpu_build.sources(tree), "90")
    binary.unlink()
    assert gpu_build.take(kit, tree) and binary.is_file()
    binary.unlink()

    (tree / "csrc/cuda/reduce.cu").write_text("3")
    assert not gpu_build.take(kit, tree) and not binary.exists()
    assert "of other sources" in capsys.readouterr().out


def test_a_prebuilt_binary_that_does_not_load(
    tmp_path: Path, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    binary = tree / "fastdiv/_C.py"
    binary.write_text("raise ImportError('needs another libc')\n")
    gpu_kit.save(tmp_path / "kit", tree, gpu_build.sources(tree), "90")
    assert not gpu_build.take(tmp_path / "kit", tree) and not binary.exists()
    assert "needs another libc" in capsys.readouterr().out


# --- the kit --------------------------------------------------------------------------------------


@pytest.fixture
def kit(tmp_path: Path, tree: Path) -> Path:
    """A kit whose binaries have 100 bytes each."""
    kit, binary = tmp_path / "kit", tree / "fastdiv/_C.py"
    binary.write_text("#" * 100)
    for name in (gpu_variants.BASE, *gpu_variants.VARIANTS):
        gpu_kit.save(gpu_kit.folder_of(kit, name), tree, "0" * 64, "90")
    return kit


def test_a_kit_has_the_extension_and_all_variants(kit: Path) -> None:
    assert gpu_kit.trouble(kit) == ""
    binaries = {p.relative_to(kit).as_posix() for p in kit.rglob("*_C.py")}
    variants = {f"variants/{name}/_C.py" for name in gpu_variants.VARIANTS}
    assert binaries == {"_C.py", *variants}
    name = min(gpu_variants.VARIANTS)
    (kit / f"variants/{name}/_C.py").unlink()
    assert gpu_kit.trouble(kit) == f"{kit} should have other files: variants/{name}/_C.py"


def test_a_kit_has_nothing_else(kit: Path) -> None:
    (kit / "variants/former").mkdir()
    (kit / "variants/former/_C.py").write_text("")
    assert "variants/former/_C.py" in gpu_kit.trouble(kit)
    gpu_kit.remove_others(kit)
    assert gpu_kit.trouble(kit) == ""


def test_a_kit_that_is_too_large_is_refused(kit: Path) -> None:
    count = 1 + len(gpu_variants.VARIANTS)
    size = count * (100 + len("0" * 64 + " 90"))
    assert gpu_kit.trouble(kit, limit=size) == ""
    assert "_C.py: 0.0 MB" in gpu_kit.trouble(kit, limit=size - 1)
    assert gpu_kit.LIMIT <= 60e6


def test_a_binary_is_kept_while_its_sources_and_macros_are_the_same(tree: Path, kit: Path) -> None:
    (tree / "tests").mkdir()
    (tree / "tests/gpu_variants.h").write_text("4")
    digest = gpu_build.sources(tree, "-DFD_A=1")
    gpu_kit.save(kit, tree, digest, "90")
    assert gpu_build.is_current(kit, digest) and gpu_build.is_current(kit, digest, "90")
    assert not gpu_build.is_current(kit, digest, "100")
    assert not gpu_build.is_current(kit, gpu_build.sources(tree, "-DFD_A=2"))
    (tree / "tests/gpu_variants.h").write_text("5")
    assert not gpu_build.is_current(kit, gpu_build.sources(tree, "-DFD_A=1"))


# --- the variants ---------------------------------------------------------------------------------

CSRC = gpu_check.ROOT / "csrc"


@pytest.mark.parametrize("name", gpu_variants.VARIANTS)
def test_a_variant_says_what_it_changes(name: str) -> None:
    variant = gpu_variants.VARIANTS[name]
    assert variant.changes.endswith(".") and variant.predicted.endswith(".")
    assert variant.macros
    for macro in variant.macros.split():
        assert re.fullmatch(r"FD_\w+=\d+", macro)


@pytest.mark.parametrize("name", gpu_variants.VARIANTS)
def test_the_kernels_know_the_macros_of_a_variant(name: str) -> None:
    """A macro without effect would make a variant that is equal to the extension."""
    sources = "".join(p.read_text() for p in CSRC.rglob("*.*") if p.suffix != ".md")
    for macro in gpu_variants.VARIANTS[name].macros.split():
        assert re.search(rf"\b{macro.partition('=')[0]}\b", sources), macro


def test_kernels_that_no_variant_needs_are_taken_out(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CFLAGS", "")
    gpu_kit.reduce(tree)
    declared = (CSRC / "cuda/kernels.h").read_text()
    for dtype in gpu_kit.WITHOUT:
        assert (CSRC / f"cuda/rows_{dtype}.cu").is_file()
        defined = (tree / f"csrc/cuda/rows_{dtype}.cu").read_text()
        assert f"find_{dtype}(LossId, Target)" in defined
        assert f"const RowKernels* find_{dtype}(LossId loss, Target target);" in declared


def test_few_losses_are_left_in_a_variant() -> None:
    """They are those that are timed, with names and policies of the registry."""
    left = (gpu_check.ROOT / "tests/gpu_variants.h").read_text()
    entries = re.findall(r"X\((\w+), (\w+?)(?:OfLogits|<real>)\)", left)
    assert {name for name, _ in entries} == set(gpu_variants.LOSSES)
    registry = re.findall(
        r"X\((\w+), (\w+?)(?:<real>)?\)", (CSRC / "losses/registry.h").read_text()
    )
    assert set(entries) <= set(registry)


def test_predictions() -> None:
    """Memory limits some kernels and instructions others; H200: 132 multiprocessors, 4300 GB/s."""
    for loss in gpu_variants.LOSSES:
        for phase in gpu_compare.TABLED:
            share = gpu_variants.predicted_share(loss, "bf16", phase, 132, 4300)
            assert share and 0.2 < share <= gpu_variants.BANDWIDTH
    assert gpu_variants.predicted_share("kl_div", "f32", "backward", 132, 4300) == 0.92
    assert gpu_variants.predicted_share("kl_div", "f16", "forward", 132, 4300) is None


def test_variants_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU and without a kit, so that the extension is alone."""
    pytest.importorskip("rich")
    monkeypatch.chdir(gpu_check.ROOT)
    file = tmp_path / "variants.json"
    found = gpu_compare.measure(tmp_path / "kit", file, dry_run=True, stop_after=1000)
    assert not found["left_out"]
    said = capsys.readouterr().out
    for name in gpu_variants.VARIANTS:
        assert f"{name} left out: " in said
    found = json.loads(file.read_text())
    base = found["variants"][gpu_variants.BASE]
    assert [r["loss"] for r in base["results"]] == list(gpu_variants.LOSSES)
    assert "products" in found["linear"]["ms"]

    # A variant that takes twice as long.
    name = min(gpu_variants.VARIANTS)
    slow = json.loads(json.dumps(base))
    for record in slow["results"]:
        for phase in gpu_compare.TABLED:
            record[f"{phase}_gb_per_s"]["fused"] /= 2
    found["variants"][name] = slow
    base["machine"]["gpu"] = {"multiprocessors": 132}
    for record in base["results"]:
        record["dtype"] = "bf16"
    gpu_compare.add_predictions(found)
    assert base["results"][0]["predicted_share_of_a_copy"]["forward"] == 0.92
    for record in base["results"]:
        record["dtype"] = "f32"
    gpu_compare.print_tables(found)
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"forward, times of base: {name} 2.00"
    assert any(gpu_variants.VARIANTS[name].predicted in line for line in said)
    del base["machine"]["gpu"]
    gpu_compare.moved(found, name)
    assert "figures compared" in capsys.readouterr().out


def test_other_packages_stay_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    separator = os.pathsep
    monkeypatch.setenv("PYTHONPATH", separator.join(["/elsewhere", str(tmp_path)]))
    assert gpu_compare.extended(tmp_path) == separator.join([str(tmp_path), "/elsewhere"])
    monkeypatch.delenv("PYTHONPATH")
    assert gpu_compare.extended(tmp_path) == str(tmp_path)


def package_that(does: str, folder: Path) -> Path:
    """A folder for PYTHONPATH whose package runs this code when it is imported."""
    (folder / "fastdiv").mkdir(parents=True)
    (folder / "fastdiv/__init__.py").write_text(does)
    return folder


def test_a_variant_that_fails_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others go on."""
    root = gpu_check.ROOT
    broken = package_that("raise SystemExit(3)", tmp_path / "broken")
    pairs = [("broken", broken), (gpu_variants.BASE, root)]
    monkeypatch.setattr(gpu_compare, "packages", lambda *_: pairs)
    monkeypatch.chdir(root)
    found = gpu_compare.measure(tmp_path, tmp_path / "variants.json", True, 1000)
    assert found["left_out"] == {"broken": "ended with 3"}
    assert len(found["variants"][gpu_variants.BASE]["results"]) == len(gpu_variants.LOSSES)


def test_nothing_waits_for_a_variant_that_is_stuck(tmp_path: Path) -> None:
    stuck = package_that("import time; time.sleep(1000)", tmp_path)
    worker = gpu_compare.Worker("stuck", stuck, tmp_path, dry_run=True)
    assert worker.ask(None, at_most=0.2) == {"error": "no answer in 0 s"}
    assert worker.ask("linear", at_most=1) == {"error": "no answer in 1 s"}
    worker.end()
    assert worker.process.returncode < 0


def test_wrong_results_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = ("kl_div", "f32", (3, 300), "cpu")
    assert gpu_worker.wrong(*case) == ""
    right = benchmarked.BenchmarkedLoss.fused
    monkeypatch.setattr(
        benchmarked.BenchmarkedLoss, "fused", lambda *tensors: right(*tensors) * (1 + 1e-3)
    )
    why = gpu_worker.wrong(*case)
    assert "value: 1.0e-03" in why and "gradient: 1.0e-03" in why
    assert "in one pass" not in why


# --- the order ------------------------------------------------------------------------------------


def test_what_is_asked_first_fits_the_time() -> None:
    """The steps up to the variants end within 8.5 minutes, when the binary was built elsewhere."""
    names = list(gpu_steps.STEPS)
    first = names[: names.index("variants") + 1]
    assert first == ["build", "info", "small", "bench", "memcheck", "profile", "variants"]
    seconds = sum(gpu_steps.STEPS[name].seconds for name in first if name != "build")
    assert seconds + 10 < 60 * gpu_check.parse([]).minutes


def test_an_unknown_step_is_refused() -> None:
    options = gpu_check.parse(["build", "tests", "--dry-run"])
    assert options.steps == ["build", "tests"] and options.dry_run
    with pytest.raises(SystemExit):
        gpu_check.parse(["biuld"])
