"""Where tests compute (a device, an instruction set), and what is restored after each."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch
import torch.distributed as dist

import fastdiv
import fastdiv._C as native
from fastdiv._bench.machine import give_each_isa_a_compiler_cache
from helpers.ranks import Ranks

# pytest would leave a helper that skips, for lack of a library, half imported.
collect_ignore = ["helpers"]

hypothesis.settings.register_profile("fastdiv", deadline=None, derandomize=True)
hypothesis.settings.load_profile("fastdiv")

# What torch says on GPUs, and what has nothing to do with us.
GPU_WARNINGS = [
    "ignore:TensorFloat32 tensor cores",
    "ignore:Synchronization debug mode",
    "ignore:The CUDA Graph is empty",
    "ignore:Not enough SMs to use max_autotune_gemm",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the tests compute: cpu, cuda, cuda:1")
    if importlib.util.find_spec("pytest_timeout") is None:  # on a machine that has only torch
        for name in ("timeout", "timeout_method"):
            parser.addini(name, "ignored: pytest-timeout is not installed")


def pytest_configure(config: pytest.Config) -> None:
    """Tensors that do not say where, those that modules make when imported too, go to --device."""
    config.addinivalue_line("markers", "cpu_only(why): says nothing about another --device")
    config.addinivalue_line("markers", "beside_cpu: compares another --device with the CPU")
    give_each_isa_a_compiler_cache()
    device = torch.device(config.getoption("device"))
    if device != torch.device("cpu"):
        torch.set_default_device(device)
    if torch.cuda.is_available():
        for line in GPU_WARNINGS:
            config.addinivalue_line("filterwarnings", line)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # The slow ones first, so that several processes end together.
    if config.getoption("numprocesses", None) or hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            # doctest finds no line where a function is defined in another file than its module;
            # pytest cannot report a skip without one.
            item.dtest.lineno = item.dtest.lineno or 0
            item.add_marker(pytest.mark.cpu_only("tensors print their device"))
            library = item.name.partition("fastdiv.integrations.")[2].split(".")[0]
            if library and importlib.util.find_spec(library) is None:
                item.add_marker(pytest.mark.skip(f"{library} is not installed"))
    # Of a test that is skipped here, one case stands for all.
    cases: dict[tuple[str, str], list[pytest.Item]] = {}
    for item in items:
        if why_skipped(item):
            name = getattr(item, "originalname", item.name)
            cases.setdefault((str(item.path), name), []).append(item)
    dropped = {item for same in cases.values() for item in same[1:]}
    items[:] = [item for item in items if item not in dropped]
    config.hook.pytest_deselected(items=list(dropped))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marks = metafunc.definition.iter_markers("parametrize")
    if "isa" in metafunc.fixturenames and not any("isa" in mark.args[0] for mark in marks):
        device = torch.get_default_device().type
        isas = native.cpu_isas() if device == "cpu" else [device]
        metafunc.parametrize("isa", isas, indirect=True)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this machine runs, forced; on a GPU just "cuda"."""
    before = native.cpu_isa()
    if torch.get_default_device().type == "cpu":
        assert native.set_cpu_isa(request.param)
    yield request.param
    native.set_cpu_isa(before)


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Compute with the kernels, and again with the reference.

    A module names others by parametrize("backend", [...], indirect=True).
    """
    with fastdiv.backend(request.param):
        yield request.param


@pytest.fixture
def checked_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels out of range raise on a GPU, too, as they always do on the CPU."""
    monkeypatch.setenv("FASTDIV_CHECK", "1")


@pytest.fixture(scope="module")
def gloo() -> Iterator[None]:
    """Make a group of this process alone, for what asks for one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Processes of a Gloo group, started by the first test that runs something on them."""
    started = Ranks(tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()


@pytest.fixture(autouse=True)
def fixed_seed_and_threads() -> Iterator[None]:
    """The same random numbers for every test; a changed thread count does not leak."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread(fixed_seed_and_threads: None) -> None:
    """Small matrix products are not shared out well, on a machine that others use."""
    torch.set_num_threads(1)


def why_skipped(item: pytest.Item) -> str | None:
    """Return why the test cannot run where these tests compute."""
    on_cpu = torch.get_default_device().type == "cpu"
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        return "needs a CUDA device"
    if item.get_closest_marker("beside_cpu") and on_cpu and "FASTDIV_DRY_RUN" not in os.environ:
        return "compares --device with the CPU"
    cpu_only = item.get_closest_marker("cpu_only")
    return f"about the CPU: {cpu_only.args[0]}" if cpu_only and not on_cpu else None


def pytest_runtest_setup(item: pytest.Item) -> None:
    if reason := why_skipped(item):
        pytest.skip(reason)
