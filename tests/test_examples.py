"""The examples run, and the curves that they compare agree: else they exit with 1."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    command = [sys.executable, "-W", "error", EXAMPLES / arguments[0], *arguments[1:]]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_identities() -> None:
    done = run("identities.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "29 of 29 lines show the same digits" in done.stdout


@pytest.mark.nightly
@pytest.mark.slow
def test_label_smoothing(tmp_path: Path) -> None:
    picture = tmp_path / "asr.png"
    done = run("asr_label_smoothing.py", "--steps", "5", "--output", picture)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "same curve" in done.stdout and picture.stat().st_size > 10_000


@pytest.mark.nightly
@pytest.mark.slow
def test_distillation(tmp_path: Path) -> None:
    picture = tmp_path / "distill.png"
    steps = ("--steps", "3", "--teacher-steps", "3", "--vocab", "5000")
    done = run("distill.py", *steps, "--output", picture)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("same curve") == 2 and picture.stat().st_size > 10_000


@pytest.mark.slow
def test_fused_linear(tmp_path: Path) -> None:
    """The same curve as torch's from hidden states, and no logits."""
    picture = tmp_path / "lm.png"
    steps = ("--steps", "3", "--distil-steps", "1", "--vocab", "2000")
    done = run("train_lm.py", "--fused-linear", *steps, "--output", picture)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "linear_cross_entropy" in done.stdout and done.stdout.count("same curve") == 2


@pytest.mark.nightly
@pytest.mark.slow
def test_patch_torch(tmp_path: Path) -> None:
    picture = tmp_path / "lm.png"
    done = run("patch_torch.py", "--steps", "4", "--vocab", "5000", "--output", picture)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "same curve" in done.stdout and picture.stat().st_size > 10_000


@pytest.mark.nightly
@pytest.mark.slow
def test_gkd_of_trl(tmp_path: Path) -> None:
    pytest.importorskip("trl", exc_type=ImportError)
    picture = tmp_path / "gkd.png"
    steps = ("--steps", "3", "--teacher-steps", "2", "--vocab", "3000")
    done = run("gkd_trl.py", *steps, "--output", picture)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "same curve" in done.stdout and picture.stat().st_size > 10_000


@pytest.mark.nightly
@pytest.mark.slow
def test_grpo_of_trl() -> None:
    """The same completions as without the one line, hence the same rewards."""
    pytest.importorskip("trl", exc_type=ImportError)
    done = run("grpo_trl.py", "--steps", "3", "--vocab", "200")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "same curve" in done.stdout and "NOT" not in done.stdout


@pytest.mark.slow
def test_sharded_vocabulary() -> None:
    """Two processes, with an odd number of classes."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launch, EXAMPLES / "sharded_vocabulary.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "same curve" in done.stdout


@pytest.mark.nightly
@pytest.mark.slow
def test_transformers(tmp_path: Path) -> None:
    """The same curve with the one line as without."""
    pytest.importorskip("transformers")
    picture = tmp_path / "llama.png"
    done = run("finetune_transformers.py", "--steps", "3", "--vocab", "4000", "--output", picture)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "same curve" in done.stdout and "NOT" not in done.stdout
    assert picture.stat().st_size > 10_000
