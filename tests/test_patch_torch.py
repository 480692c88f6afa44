"""patch_torch: how torch's cross entropy is replaced, and put back."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fastdiv
from fastdiv._engine import backend
from fastdiv.integrations.torch import cross_entropy as replacement
from fastdiv.integrations.torch.patch import TorchPatch
from helpers.torch_patched import TORCHS, calls_of_ours, patched, torch_has_its_own
from helpers.values import uneven, value_and_gradients

gradients = partial(value_and_gradients, upstream=uneven)


@pytest.fixture(autouse=True)
def reversed_by_all() -> Iterator[None]:
    yield from torch_has_its_own()


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return calls_of_ours(monkeypatch)


def ops(function: Callable[[], Any]) -> set[str]:
    """The operations that really ran."""
    with torch.profiler.profile() as profile:
        function()
    return {event.key for event in profile.key_averages()}


def test_overrides_see_torchs_function(ours: list[Any]) -> None:
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    class Subclass(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return 42

    x, y = torch.randn(3, 9), torch.tensor([0, 8, 3])
    with Mode():
        assert patched(x, y).equal(TORCHS(x, y))
    assert patched(x.as_subclass(Subclass), y) == 42 and patched(x, y.as_subclass(Subclass)) == 42
    assert seen.count(TORCHS) == 4 and not ours
    with torch.device(x.device):  # a mode, too, but of no concern
        patched(x, y)
    assert len(ours) == 1


def test_the_kernel_runs() -> None:
    x, y = torch.randn(3, 9, requires_grad=True), torch.tensor([0, 8, 3])
    module = nn.CrossEntropyLoss(torch.rand(9), label_smoothing=0.1)
    ours, theirs = "fastdiv::_row_forward", "aten::cross_entropy_loss"
    assert theirs in ops(lambda: module(x, y))
    with fastdiv.patch_torch():
        ran = ops(lambda: module(x, y).backward())
        assert {ours, "fastdiv::_row_backward"} <= ran and theirs not in ran
        with fastdiv.backend("reference"):
            ran = ops(lambda: module(x, y))
            assert theirs in ran and ours not in ran
    assert theirs in ops(lambda: module(x, y))


def test_module(ours: list[Any]) -> None:
    x, y = torch.randn(3, 9), torch.tensor([0, 8, 3])
    for given in ({}, {"weight": torch.rand(9)}, {"ignore_index": 8, "reduction": "sum"}):
        module = nn.CrossEntropyLoss(**given)
        expected = gradients(lambda x, module=module: module(x, y), x)
        with fastdiv.patch_torch():
            got = gradients(lambda x, module=module: module(x, y), x)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
    assert len(ours) == 3


def test_train() -> None:
    """A small model learns the same, step for step."""
    x, y = torch.randn(64, 8), torch.randint(5, (64,))

    def losses() -> list[float]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5))
        step, loss, values = torch.optim.SGD(model.parameters(), 0.5), nn.CrossEntropyLoss(), []
        for _ in range(30):
            step.zero_grad()
            value = loss(model(x), y)
            value.backward()
            step.step()
            values.append(value.item())
        return values

    expected = losses()
    with fastdiv.patch_torch():
        got = losses()
    assert got == pytest.approx(expected, rel=1e-4) and got[-1] < got[0]


def test_reversal() -> None:
    first = fastdiv.patch_torch()
    function = F.cross_entropy
    second = fastdiv.patch_torch()
    assert F.cross_entropy is function is not TORCHS  # patched twice is wrapped once
    first.undo()
    first.undo()
    assert F.cross_entropy is function
    with second as entered:  # stands already
        assert entered is second and F.cross_entropy is function
    assert F.cross_entropy is TORCHS
    second.undo()
    with second:  # once more
        assert F.cross_entropy is not TORCHS
    with pytest.raises(ZeroDivisionError), fastdiv.patch_torch(), fastdiv.patch_torch():
        raise ZeroDivisionError
    assert F.cross_entropy is TORCHS


def test_who_kept_ours_gets_torchs_after_the_end(ours: list[Any]) -> None:
    x, y = torch.randn(3, 9), torch.tensor([0, 8, 3])
    with fastdiv.patch_torch():
        kept = F.cross_entropy
        kept(x, y)
    assert kept(x, y).equal(TORCHS(x, y)) and len(ours) == 1
    with fastdiv.patch_torch():
        kept(x, y)
    assert len(ours) == 2


def test_who_replaced_ours_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    patch = fastdiv.patch_torch()
    within = F.cross_entropy

    def another(*args: Any) -> Tensor:
        return within(*args)

    x, y = torch.randn(3, 9), torch.tensor([0, 8, 3])
    with monkeypatch.context() as m:
        m.setattr(F, "cross_entropy", another)
        patch.undo()
        assert F.cross_entropy is another and another(x, y).equal(TORCHS(x, y))
        with pytest.raises(RuntimeError, match="is not torch's.*another.*undo"):
            fastdiv.patch_torch()
    F.cross_entropy = TORCHS


def test_an_unknown_version(monkeypatch: pytest.MonkeyPatch) -> None:
    exec(compile("def later(input, target, *, gamma=1): ...", "later", "exec"), vars(F))
    monkeypatch.setattr(F, "cross_entropy", F.later)
    try:
        with pytest.raises(RuntimeError, match=r"know .*\(input, target, \*, gamma=1\) of torch 2"):
            fastdiv.patch_torch()
        assert F.cross_entropy is F.later and not replacement.on
    finally:
        del F.later
        monkeypatch.undo()


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_C", None)
    with pytest.raises(RuntimeError, match="change nothing.*_C could not be loaded"):
        fastdiv.patch_torch()


def test_it_looks_like_torchs() -> None:
    with fastdiv.patch_torch():
        assert inspect.signature(F.cross_entropy) == inspect.signature(TORCHS)
        assert F.cross_entropy.__doc__ == TORCHS.__doc__
        data = pickle.dumps(F.cross_entropy)
    assert pickle.loads(data) is TORCHS


@pytest.mark.parametrize("first", ["torch", "fastdiv"])
def test_compile(first: str) -> None:
    """In one graph, whichever of the two is compiled first; the other makes a graph anew."""
    module = nn.CrossEntropyLoss(label_smoothing=0.1)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, y = torch.randn(3, 9), torch.tensor([0, 8, 3])
    expected = gradients(lambda x: module(x, y), x)

    def check(kernel: bool) -> None:
        got = gradients(lambda x: compiled(x, y), x)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
        assert ("fastdiv::_row_forward" in ops(lambda: compiled(x, y))) == kernel

    if first == "torch":
        check(False)
    with fastdiv.patch_torch():
        check(True)
        half = compiled(x.bfloat16(), y)
        assert half.dtype is torch.bfloat16
    check(False)


@pytest.mark.cpu_only("a process of its own")
def test_compile_in_a_program_that_starts_with_the_patch() -> None:
    """The compiler, imported later, must not take ours for torch's, which it does not trace."""
    program = """
import torch, fastdiv
fastdiv.patch_torch()
loss = torch.compile(torch.nn.CrossEntropyLoss(), fullgraph=True, backend="aot_eager")
with torch.profiler.profile() as profile:
    loss(torch.randn(3, 9), torch.tensor([0, 8, 3]))
assert "fastdiv::_row_forward" in {event.key for event in profile.key_averages()}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_scripts_traces_and_exports_hold_torchs() -> None:
    x, y, module = torch.randn(3, 9), torch.tensor([0, 8, 3]), nn.CrossEntropyLoss()
    with fastdiv.patch_torch():
        made = [
            torch.jit.script(module),
            torch.jit.trace(module, (x, y)),
            torch.export.export(module, (x, y)).module(),
            torch.export.export(module, (x, y), strict=True).module(),
        ]
        for call in made:
            ran = ops(lambda call=call: call(x, y))
            assert "aten::cross_entropy_loss" in ran and "fastdiv::_row_forward" not in ran


def test_an_early_import_keeps_torchs(ours: list[Any]) -> None:
    from torch.nn.functional import cross_entropy

    with fastdiv.patch_torch():
        cross_entropy(torch.randn(3, 9), torch.tensor([0, 8, 3]))
    assert not ours


def test_handles_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    handles = [fastdiv.patch_torch() for _ in range(4)]
    assert TorchPatch.standing == handles
    for i in (2, 0, 3, 1):
        assert F.cross_entropy is not TORCHS
        handles[i].undo()
    assert F.cross_entropy is TORCHS and not TorchPatch.standing
