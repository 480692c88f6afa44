"""torch.compile and torch.export: one graph, the same bits as eager, no recompilation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastdiv
from helpers.cases import KERNELS, KINDS, LOSSES, Case, make_inputs
from helpers.values import uneven, value_and_gradients

EVERY_KIND = pytest.mark.parametrize("case", KINDS, ids=str)
same = partial(torch.testing.assert_close, rtol=0, atol=0)
gradients = partial(value_and_gradients, upstream=uneven)
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def problem(case: Case, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    x, t = make_inputs(shape, dtype)
    t = case.make_target(x, t)
    return [x] if t is None else [x, t]


def caller(case: Case, **options: Any) -> Callable[..., Tensor]:
    return lambda x, t=None: case.call(x * 1, t, **options)


@EVERY_KIND
def test_one_graph(case: Case) -> None:
    function, args = caller(case), problem(case, (4, 17))
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    same(gradients(compiled, *args), gradients(function, *args))


@EVERY_KIND
@pytest.mark.parametrize("grad_mode", [True, False])
def test_nothing_needs_a_gradient(case: Case, grad_mode: bool) -> None:
    function, args = caller(case), problem(case, (4, 17))
    with torch.set_grad_enabled(grad_mode):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        same(compiled(*args), function(*args))


def all_of(cases: list[Case]) -> Callable[..., tuple[Tensor, ...]]:
    """Return a function of several losses, with neighbours they could be fused with."""

    def losses(x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        logits = x * 1.5 + 0.25
        values = []
        for case in cases:
            reduced = {"reduction": "mean"} if case.per_row else {}
            value = case.call(logits, case.make_target(logits, t), **reduced)
            values.append(value.sum())
        inplace = fastdiv.cross_entropy(logits + 1, t.argmax(-1), inplace_backward=True)
        weights = torch.linspace(1, 2, len(values))
        return (torch.stack(values) @ weights + inplace.exp(), *values)

    return losses


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "cases"), [("aot_eager", KERNELS), ("inductor", KINDS)])
def test_all_in_one_graph(backend: str, cases: list[Case]) -> None:
    """A loss of each kernel; inductor would take half a minute for so many."""
    function = all_of(cases)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    graphs = []
    for rows in (6, 3):
        x, t = make_inputs((rows, 19), torch.float32)
        close(gradients(compiled, x, t), gradients(function, x, t))
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1], f"recompiled: {graphs}"


@EVERY_KIND
def test_dynamic_batch(case: Case) -> None:
    """One compilation serves every batch size; the mean divides by the batch at hand."""
    function = caller(case, **({"reduction": "batchmean"} if case.per_row else {}))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    graphs = []
    for shape in ((6, 17), (3, 17)):
        args = problem(case, shape)
        same(gradients(compiled, *args), gradients(function, *args))
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1], f"recompiled: {graphs}"


@pytest.mark.parametrize("target", ["labels", "probs"])
def test_options_of_cross_entropy(target: str) -> None:
    case = next(c for c in LOSSES if c.name == "cross_entropy" and c.target == target)
    x, t = problem(case, (4, 17, 3))
    t = t.movedim(-1, 1) if target == "probs" else x.argmax(1)
    if target == "labels":
        t[1, 2] = t[3, 0] = -100
    t = t.softmax(1) if target == "probs" else t
    x = torch.randn(4, 17, 3)
    t = x.flip(0).softmax(1) if target == "probs" else t
    token_weight, weight = torch.rand(4, 3), torch.rand(17)

    def function(x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        loss, stats = fastdiv.cross_entropy(
            x,
            t,
            weight,
            label_smoothing=0.1,
            z_loss=1e-3,
            softcap=30.0,
            temperature=1.5,
            token_weight=token_weight,
            return_stats=True,
        )
        return loss, *stats

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    same(gradients(compiled, x, t), gradients(function, x, t))


@pytest.mark.parametrize("case", [c for c in KINDS if "log_prob" not in c.name], ids=str)
def test_in_place_backward(case: Case) -> None:
    """The traced function leaves the logits alone, which the graph may still need."""

    def function(x: Tensor, t: Tensor) -> Tensor:
        logits = x * 1
        value = case.call(logits, t, inplace_backward=True)
        return value + logits.exp().mean() + case.call(logits, t)

    def plain(x: Tensor, t: Tensor) -> Tensor:
        logits = x * 1
        return case.call(logits, t) + logits.exp().mean() + case.call(logits, t)

    args = problem(case, (4, 17))
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    close(gradients(compiled, *args), gradients(plain, *args))


def test_graph_that_changes_the_logits() -> None:
    """A mutation after the loss must not reach what the backward reads."""

    def function(x: Tensor) -> Tensor:
        logits = x * 2
        value = fastdiv.entropy(logits, reduction="sum")
        return value + logits.clone().mul_(3).sum()

    x = torch.randn(3, 9)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    close(gradients(compiled, x), gradients(function, x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    for case in KINDS:
        torch._dynamo.reset()
        args = problem(case, (3, 17), dtype)
        compiled = torch.compile(caller(case), backend="aot_eager", fullgraph=True)
        same(gradients(compiled, *args), gradients(caller(case), *args))


def test_func_transforms_inside() -> None:
    """Per-sample gradients, compiled."""
    case = next(c for c in LOSSES if str(c) == "kl_div-logits")
    x, t = problem(case, (3, 4, 7))
    per_sample = torch.func.vmap(torch.func.grad(caller(case)))
    compiled = torch.compile(per_sample, backend="aot_eager", fullgraph=True)
    close(compiled(x, t), per_sample(x, t))


def test_modules_and_autocast() -> None:
    model = torch.nn.Linear(5, 11)
    kl = fastdiv.nn.KLDivLoss(target_type="logits", temperature=2.0, scale_by_temperature=True)
    ce = fastdiv.nn.CrossEntropyLoss(torch.rand(11), ignore_index=1, label_smoothing=0.1)

    def step(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            logits = model(x)
            return kl(logits, t) + ce(logits, y)

    x, t, y = torch.randn(4, 5), torch.randn(4, 11), torch.tensor([0, 1, 2, 10])
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, step):
        model.zero_grad()
        loss = function(x, t, y)
        loss.backward()
        results.append([loss.detach(), model.weight.grad.clone()])
    same(*results)


class Losses(torch.nn.Module):
    """Every loss and the statistics, for export."""

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        values = [case.call(x, case.make_target(x, t)) for case in KERNELS]
        _, stats = fastdiv.cross_entropy(x, t.argmax(-1), return_stats=True)
        return (*values, *stats)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    rows = {0: torch.export.Dim("rows", min=2)}
    args = make_inputs((4, 9), torch.float32)
    program = torch.export.export(Losses(), args, dynamic_shapes=(rows, rows), strict=strict)
    used = {str(n.target) for n in program.graph.nodes if "fastdiv" in str(n.target)}
    assert used == {"fastdiv._row_forward.default", "fastdiv._row_forward_stats.default"}
    for shape in ((4, 9), (7, 9)):
        args = make_inputs(shape, torch.float32)
        actual, expected = program.module()(*args), Losses()(*args)
        same(actual, expected)
