"""patch_torch: torch's cross entropy on our kernels, beside the function that was not patched."""

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
from fastdiv import _backend, _patched
from fastdiv._patch import TorchPatch

TORCHS = F.cross_entropy


@pytest.fixture(autouse=True)
def reversed_by_all() -> Iterator[None]:
    torch._dynamo.reset()
    assert F.cross_entropy is TORCHS and not _patched.on
    yield
    assert F.cross_entropy is TORCHS and not _patched.on


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls that reached fastdiv."""
    calls = []

    def spy(*args: Any, **options: Any) -> Tensor:
        calls.append((args, options))
        return fastdiv.cross_entropy(*args, **options)

    monkeypatch.setattr(_patched, "ours", spy)
    return calls


def patched(*args: Any, **options: Any) -> Tensor:
    with fastdiv.patch_torch():
        return F.cross_entropy(*args, **options)


def ops(function: Callable[[], Any]) -> set[str]:
    """The operations that really ran."""
    with torch.profiler.profile() as profile:
        function()
    return {event.key for event in profile.key_averages()}


def with_gradients(function: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    """Value and gradients, for an upstream gradient that is not 1."""
    inputs = [v.detach().clone().requires_grad_() for v in leaves]
    value = function(*inputs)
    upstream = torch.linspace(0.5, 1.5, value.numel()).to(value).reshape(value.shape)
    return [value, *torch.autograd.grad(value, inputs, upstream)]


def agree(calls: list[Any], target: Tensor | None, *leaves: Tensor, **options: Any) -> None:
    """Value, gradients and their dtypes are torch's; of target None the second leaf is it."""
    fixed = () if target is None else (target,)
    results = []
    for function in (patched, TORCHS):
        calls.clear()
        call = partial(function, **options)
        results.append(with_gradients(lambda *v, call=call: call(*v, *fixed), *leaves))
        assert len(calls) == (function is patched)
    lowest = min((v.dtype for v in leaves), key=lambda dtype: -torch.finfo(dtype).eps)
    tolerance = {"rtol": 1e-11, "atol": 1e-12} if lowest is torch.float64 else {}
    if lowest in (torch.float16, torch.bfloat16):  # which torch computes in halves all along
        tolerance = {"rtol": 4 * torch.finfo(lowest).eps, "atol": 2 * torch.finfo(lowest).eps}
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **tolerance, equal_nan=True)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(9,), (6, 9), (4, 9, 5), (2, 9, 3, 2), (1, 9), (2, 1)]
options = pytest.mark.parametrize(
    "weighted,smoothing",
    [(False, 0.0), (True, 0.0), (False, 0.1), (True, 0.1), (True, 1)],
)


def problem(
    shape: tuple[int, ...], dtype: torch.dtype, weighted: bool, smoothing: float
) -> tuple[Tensor, dict[str, Any]]:
    classes = shape[1 if len(shape) > 1 else 0]
    weight = (torch.rand(classes) + 0.1).to(dtype) if weighted else None
    return (torch.randn(shape) * 3).to(dtype), {"weight": weight, "label_smoothing": smoothing}


def labels(shape: tuple[int, ...], ignore_index: int) -> Tensor:
    dim = 1 if len(shape) > 1 else 0
    y = torch.randint(shape[dim], shape[:dim] + shape[dim + 1 :])
    if y.numel() > 1:
        y.view(-1)[1] = ignore_index
    return y


@options
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_labels(
    ours: list[Any],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    weighted: bool,
    smoothing: float,
    reduction: str,
) -> None:
    x, given = problem(shape, dtype, weighted, smoothing)
    for ignore_index in (-100, 0, 20):
        y = labels(shape, ignore_index)
        agree(ours, y, x, **given, ignore_index=ignore_index, reduction=reduction)


@options
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_probabilities(
    ours: list[Any],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    weighted: bool,
    smoothing: float,
    reduction: str,
) -> None:
    """Fixed, and with a gradient of their own."""
    x, given = problem(shape, dtype, weighted, smoothing)
    p = torch.randn(shape).softmax(1 if len(shape) > 1 else 0).to(dtype)
    agree(ours, p, x, **given, reduction=reduction)
    agree(ours, None, x, p, **given, reduction=reduction)


@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probabilities_of_another_dtype(
    ours: list[Any], dtype: torch.dtype, target: torch.dtype
) -> None:
    x, p = torch.randn(4, 9).to(dtype), torch.randn(4, 9).softmax(1).to(target)
    got, expected = (with_gradients(function, x, p) for function in (patched, TORCHS))
    assert len(ours) == 1
    eps = max(torch.finfo(dtype).eps, torch.finfo(target).eps)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_autocast(
    ours: list[Any], dtype: torch.dtype, cast: torch.dtype, soft: bool, weighted: bool
) -> None:
    x = torch.randn(4, 9).to(dtype)
    target = torch.randn(4, 9).softmax(1).to(dtype) if soft else torch.tensor([0, 8, -100, 3])
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    given = {"weight": (torch.rand(9) + 0.1).to(wide) if weighted else None}

    def under(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            with torch.autocast(x.device.type, cast):
                return function(x, target, **given)

        return call

    got, expected = (with_gradients(under(function), x) for function in (patched, TORCHS))
    assert len(ours) == 1
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1], expected[1])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_no_rows_that_count(ours: list[Any], reduction: str, smoothing: float) -> None:
    """A mean of nothing is NaN, its gradient 0."""
    given = {"reduction": reduction, "label_smoothing": smoothing}
    for x, y in (
        (torch.randn(3, 9), torch.full((3,), -100)),
        (torch.randn(0, 9), torch.zeros(0, dtype=torch.int64)),
        (torch.randn(2, 9, 0), torch.zeros(2, 0, dtype=torch.int64)),
        (torch.randn(0, 9), torch.zeros(0, 9)),
    ):
        got, expected = (
            with_gradients(partial(f, target=y, **given), x) for f in (patched, TORCHS)
        )
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)
    assert len(ours) == 4


def test_strided_logits(ours: list[Any]) -> None:
    x, y = torch.randn(9, 12, 2)[:, ::2, 0].t(), labels((6, 9), -100)
    assert not x.is_contiguous()
    agree(ours, y, x)
    agree(ours, torch.randint(9, (2, 3, 2)), torch.randn(2, 3, 2, 9).movedim(-1, 1))


X, Y = torch.randn(4, 5), torch.tensor([0, 4, -100, 2])
P = X.softmax(1)


class Tagged(Tensor):
    pass


OTHERS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "size_average": ((X, Y), {"size_average": False}),
    "reduce": ((X, Y), {"reduce": False}),
    "int32 labels": ((X, Y.int()), {}),
    "uint8 labels": ((X, Y.clamp(0).byte()), {}),
    "integer logits": ((X.long(), Y), {}),
    "complex logits": ((X.to(torch.complex64), Y), {}),
    "a label of shape (1,)": ((X[0], Y[:1]), {}),
    "no classes": ((X[:, :0], Y), {}),
    "a scalar": ((X[0, 0], Y), {}),
    "too few labels": ((X, Y[:3]), {}),
    "labels of another shape": ((X, Y[None]), {}),
    "probabilities of another shape": ((X, P[:, :4]), {}),
    "probabilities and ignore_index": ((X, P), {"ignore_index": 2}),
    "a label too large": ((X, Y + 2), {}),
    "a negative label": ((X, Y - 1), {"ignore_index": -101, "label_smoothing": 0.1}),
    "smoothing of 2": ((X, Y), {"label_smoothing": 2.0}),
    "smoothing of NaN": ((X, Y), {"label_smoothing": float("nan")}),
    "smoothing by name": ((X, Y), {"label_smoothing": "0.1"}),
    "ignore_index by name": ((X, Y), {"ignore_index": "no"}),
    "batchmean": ((X, Y), {"reduction": "batchmean"}),
    "elementwise_mean": ((X, Y), {"reduction": "elementwise_mean"}),
    "no reduction": ((X, Y), {"reduction": None}),
    "too few weights": ((X, Y, torch.ones(4)), {}),
    "weights in a column": ((X, Y, torch.ones(5, 1)), {}),
    "double weights": ((X, Y, torch.ones(5).double()), {}),
    "double weights of probabilities": ((X, P, torch.ones(5).double()), {}),
    "integer weights": ((X, P, torch.arange(5)), {}),
    "meta": ((X.to("meta"), Y.to("meta")), {}),
    "labels elsewhere": ((X, Y.to("meta")), {}),
    "sparse": ((X.to_sparse(), Y), {}),
    "a list": (([1.0, 2.0], Y), {}),
    "a list of labels": ((X, [0, 1, 2, 3]), {}),
    "a list of weights": ((X, Y, [1.0] * 5), {}),
    "a subclass": ((X.as_subclass(Tagged), Y), {}),
    "an unknown argument": ((X, Y), {"temperature": 2.0}),
    "too many arguments": ((X, Y, None, None, -100, None, "mean", 0.0, 1.0), {}),
    "no target": ((X,), {}),
}


def outcome(function: Callable[..., Tensor], *args: Any, **given: Any) -> Any:
    try:
        value = function(*args, **given)
    except Exception as error:
        return type(error), str(error)
    return type(value), value.dtype, value.device.type, None if value.is_meta else value.tolist()


@pytest.mark.cpu_only("some of these end a GPU's context")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OTHERS)
def test_other_calls_are_torchs(ours: list[Any], name: str) -> None:
    """The same bits or the same error, in the same words."""
    args, given = OTHERS[name]
    expected = outcome(TORCHS, *args, **given)
    assert outcome(patched, *args, **given) == expected
    assert not ours or "label" in name and expected[0] is IndexError


def test_weights_with_a_derivative_are_torchs(ours: list[Any]) -> None:
    x, p, weight = torch.randn(4, 9), torch.randn(4, 9).softmax(1), torch.rand(9) + 0.1

    def by_weight(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda weight: function(x, p, weight)

    def batched(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda weight: torch.vmap(function)(torch.stack([weight, 2 * weight]))

    assert with_gradients(by_weight(patched), weight)[1].equal(
        with_gradients(by_weight(TORCHS), weight)[1]
    )
    for transform in (torch.func.grad, torch.func.jacfwd, batched):
        assert transform(by_weight(patched))(weight).equal(transform(by_weight(TORCHS))(weight))
    tangent = torch.rand(9)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(weight, tangent)
        got, expected = (by_weight(function)(dual) for function in (patched, TORCHS))
        got, expected = map(torch.autograd.forward_ad.unpack_dual, (got, expected))
        assert got.tangent.equal(expected.tangent)
    assert not ours


def test_transforms_and_second_derivatives(ours: list[Any]) -> None:
    x, y = torch.randn(4, 9, dtype=torch.float64), torch.tensor([0, 8, -100, 3])
    for transform in (torch.func.grad, torch.func.hessian, torch.func.jacfwd):
        got, expected = (transform(lambda x, f=f: f(x, y))(x) for f in (patched, TORCHS))
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    got, expected = (torch.vmap(f)(x[:2, None], y[:2, None]) for f in (patched, TORCHS))
    torch.testing.assert_close(got, expected)
    assert torch.autograd.gradgradcheck(lambda x: patched(x, y), x.requires_grad_())
    assert len(ours) > 4


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
        expected = with_gradients(lambda x, module=module: module(x, y), x)
        with fastdiv.patch_torch():
            got = with_gradients(lambda x, module=module: module(x, y), x)
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
        assert F.cross_entropy is F.later and not _patched.on
    finally:
        del F.later
        monkeypatch.undo()


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "_C", None)
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
    expected = with_gradients(lambda x: module(x, y), x)

    def check(kernel: bool) -> None:
        got = with_gradients(lambda x: compiled(x, y), x)
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
    before = TorchPatch.standing
    handles = [fastdiv.patch_torch() for _ in range(4)]
    assert TorchPatch.standing == before + 4
    for i in (2, 0, 3, 1):
        assert F.cross_entropy is not TORCHS
        handles[i].undo()
    assert F.cross_entropy is TORCHS and TorchPatch.standing == before
