"""`python -m fastdiv`: the commands print and return as they should.  No figure is asserted."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiv
from fastdiv import reference
from fastdiv.__main__ import main
from fastdiv._engine import backend
from helpers.cases import PUBLIC_LOSSES

pytestmark = pytest.mark.cpu_only("the commands choose their device themselves")


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
        error = 1e-3 if backend._current == "native" else 0.0
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
        if backend._current == "native":
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
    monkeypatch.setattr(backend, "_C", None)
    monkeypatch.setattr(backend, "load_error", ImportError("it was not built"))
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
    with pytest.raises(SystemExit):
        main(["bench"])
    assert "bench needs rich: pip install 'fastdiv[bench]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["check", "kl"],
        ["bench", "kl"],
        ["bench", "--shapes", "8"],
        ["bench", "--shapes", "0x8"],
        ["bench", "--rounds", "0"],
        ["bench", "--threads", "0"],
        ["bench", "--show", "no such file"],
        ["bench", "--compare", "no such file", "nor this"],
    ],
)
def test_wrong_options_end_with_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert "error:" in capsys.readouterr().err
