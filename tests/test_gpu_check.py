"""What gpu_check.py does with its steps, where no GPU is needed to tell."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import gpu_build
import gpu_check
import gpu_steps
from gpu_steps import Check, Step
from helpers.processes import wait_until_ended

pytestmark = pytest.mark.cpu_only("no GPU is used")


@pytest.fixture
def check(tmp_path: Path) -> Check:
    return Check(tmp_path, tmp_path, tmp_path / "prebuilt", False, "")


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
    if not dry_run and "bench" in command:
        assert command[command.index("--stop-after") + 1] == "25"
    assert ("--device=cpu" in command) == (dry_run and name not in ("build", "info", "check"))


# --- a binary that was built elsewhere ------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree whose extension is an empty module of Python."""
    tree = tmp_path / "tree"
    (tree / "csrc/cuda").mkdir(parents=True)
    (tree / "fastdiv").mkdir()
    (tree / "setup.py").write_text("1")
    (tree / "csrc/cuda/reduce.cu").write_text("2")
    (tree / "fastdiv/__init__.py").write_text("")
    return tree


def test_prebuilt(
    tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_build, "BINARY", "_C.py")  # which Python can load
    prebuilt, binary = tmp_path / "prebuilt", tree / "fastdiv/_C.py"
    assert not gpu_build.take(prebuilt, tree)
    assert "does not exist" in capsys.readouterr().out

    binary.write_text("def gpu_trouble(index): return ''\n")
    gpu_build.save(prebuilt, tree)
    binary.unlink()
    assert gpu_build.take(prebuilt, tree) and binary.is_file()
    binary.unlink()

    (tree / "csrc/cuda/reduce.cu").write_text("3")
    assert not gpu_build.take(prebuilt, tree) and not binary.exists()
    assert "of other sources" in capsys.readouterr().out


def test_a_prebuilt_binary_that_does_not_load(
    tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_build, "BINARY", "_C.py")
    binary = tree / "fastdiv/_C.py"
    binary.write_text("raise ImportError('needs another libc')\n")
    gpu_build.save(tmp_path / "prebuilt", tree)
    assert not gpu_build.take(tmp_path / "prebuilt", tree) and not binary.exists()
    assert "needs another libc" in capsys.readouterr().out


def test_an_unknown_step_is_refused() -> None:
    options = gpu_check.parse(["build", "tests", "--dry-run"])
    assert options.steps == ["build", "tests"] and options.dry_run
    with pytest.raises(SystemExit):
        gpu_check.parse(["biuld"])
