"""The yardsticks of the benchmark compute the losses; the benchmark times and prints them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastdiv.__main__ import main
from fastdiv._bench import machine
from fastdiv._bench.limit import build
from fastdiv._bench.limit.yardstick import Yardstick
from fastdiv._bench.losses import DTYPES, LOSSES
from fastdiv._bench.results import COPY, Measurements, make_result
from fastdiv._bench.timing import Timing

pytest.importorskip("rich")
pytestmark = pytest.mark.cpu_only("yardsticks are for the CPU")

QUICKLY = ["--quick", "--seconds", "0", "--rounds", "1", "--shapes", "4x100"]


@pytest.fixture
def compiler() -> None:
    try:
        build.compiler()
    except build.NoYardstickError as error:
        pytest.skip(str(error))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Forget what was compiled, and compile into a new folder of temporary files."""
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path))
    build._library.cache_clear()
    yield tmp_path
    build._library.cache_clear()


@pytest.mark.usefixtures("compiler", "isa")
@pytest.mark.parametrize("shape", [(3, 5003), (2, 39)])  # tiles, vectors, single columns
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_yardstick_computes_the_loss(name: str, dtype: str, shape: tuple[int, int]) -> None:
    if dtype == "f16" and build.build_info()["cpu_isa"] == "baseline":
        assert "no yardstick in torch.float16" in build.why_not(torch.float16)
        return
    loss = LOSSES[name]
    x, *target = loss.make_inputs(shape, DTYPES[dtype])
    yardstick = Yardstick(name, x.dtype)
    mean, kept = yardstick.forward(x, *target)
    grad = yardstick.backward(kept, x, *target)

    exact = x.double().requires_grad_()
    expected = loss.eager(exact, *(t.double() if t.is_floating_point() else t for t in target))
    (slope,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(mean.double(), expected.detach(), rtol=1e-5, atol=0)
    numbers = torch.finfo(x.dtype)
    atol = 1e-5 * slope.abs().max().item() + numbers.tiny * numbers.eps  # the smallest number
    torch.testing.assert_close(grad.double(), slope, rtol=max(1e-5, 0.51 * numbers.eps), atol=atol)


@pytest.mark.usefixtures("compiler")
def test_threads_share_the_rows() -> None:
    x, t = LOSSES["js_div"].make_inputs((5, 100), torch.float32)
    yardstick, before, found = Yardstick("js_div", x.dtype), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            mean, kept = yardstick.forward(x, t)
            found.append((mean, yardstick.backward(kept, x, t)))
    finally:
        torch.set_num_threads(before)
    for result in found[1:]:
        torch.testing.assert_close(result, found[0], rtol=0, atol=0)


@pytest.mark.usefixtures("compiler")
def test_bench_times_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    options = [*QUICKLY, "--dtypes", "f32", "f64", "--json", str(file)]
    assert main(["bench", "kl_div", *options]) == 0
    out, err = capsys.readouterr()
    assert "no limit: there is no yardstick in torch.float64" in err
    assert out.count("/ limit") == 3  # two columns and the caption
    found = Measurements.read(file)
    f32, f64 = found.results
    for phase in ("forward", "backward", "training"):
        assert f32[f"{phase}_ms"]["limit"].rounds == 1
        assert "limit" not in f64[f"{phase}_ms"]
    assert found.machine["limit_compiler"]


def test_it_is_printed_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside a record without it, as older files have them."""
    milliseconds = {"forward": 3, "backward": 5, "training": 9}
    times = {(phase, "fused"): Timing(ms, ms, ms, 2) for phase, ms in milliseconds.items()}
    times[COPY] = Timing(1, 1, 1, 2)
    limits = {(phase, "limit"): Timing(2, 2, 2, 2) for phase in milliseconds}
    found = Measurements(machine.describe_machine())
    for dtype, timed in (("f32", times | limits), ("bf16", times)):
        found.results.append(make_result("kl_div", dtype, (8, 64), 1, timed, {}))
    file = tmp_path / "results.json"
    found.write(file)

    def row(*options: str) -> list[str]:
        assert main(["bench", "--show", str(file), *options]) == 0
        (f32,) = (
            line
            for line in capsys.readouterr().out.splitlines()
            if line.startswith("kl_div") and " f32 " in line
        )
        return f32.split()

    first, after = row().index("1.50"), row("--phases").index("1.50")
    assert row()[first : first + 2] == ["1.50", "4.50"]
    assert row("--phases")[after : after + 3] == ["1.50", "2.50", "4.50"]
    for options in (["--markdown", "--show", str(file)], ["--compare", str(file), str(file)]):
        assert main(["bench", *options]) == 0
        assert "limit" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "command, why", [("no-such-compiler", "no C++ compiler"), ("false", "failed")]
)
def test_bench_without_a_compiler(
    command: str,
    why: str,
    fresh: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CXX", command)
    assert main(["bench", "entropy", *QUICKLY, "--dtypes", "f32"]) == 0
    out, err = capsys.readouterr()
    assert "no limit: " in err and why in err and err.count("no limit") == 1
    assert "entropy" in out and "limit" not in out


def test_no_code_is_loaded_that_others_could_write(fresh: Path) -> None:
    folder = build._own_folder()
    folder.chmod(0o777)
    with pytest.raises(build.NoYardstickError, match="others can write"):
        build._own_folder()


@pytest.mark.usefixtures("compiler")
def test_it_is_compiled_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Yardstick("entropy", torch.float32)
    (folder,) = fresh.iterdir()
    (file,) = folder.iterdir()
    build._library.cache_clear()  # as in another process
    monkeypatch.setattr(build.subprocess, "run", None)
    Yardstick("kl_div", torch.float32)
    assert list(folder.iterdir()) == [file]
