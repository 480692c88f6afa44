"""What only a GPU can show: graphs, streams, that nothing waits, sizes, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiv
from helpers.bits import bits, evaluate, inputs, moved
from helpers.cases import LOSSES, Case, make_inputs

pytestmark = pytest.mark.gpu
EVERY_CASE = pytest.mark.parametrize("case", LOSSES, ids=str)
HALF_OR_FLOAT = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
IN_PLACE = [c for c in LOSSES if not c.name.startswith("log_prob") and c.target != "none"]
# One of each kind of kernel: one row of logits, two outputs, two rows, two sweeps.
FEW = [
    c
    for c in LOSSES
    if not c.options and c.target in ("labels", "none", "logits") and c.name != "log_prob"
]
MIB = 1 << 20


@pytest.fixture(autouse=True)
def on_the_gpu() -> Iterator[None]:
    with torch.device("cuda"), fastdiv.backend("native"):
        yield


def leaves_of(*tensors: Tensor | None) -> list[Tensor]:
    return [v.requires_grad_() for v in tensors if v is not None and v.is_floating_point()]


def problem(
    case: Case, shape: tuple[int, int], dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    x, logits = make_inputs(shape, dtype, seed=seed)
    return x, case.make_target(x, logits)


def same_bits(got: list[Tensor], expected: list[Tensor], where: object = "") -> None:
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.shape == b.shape and torch.equal(bits(a), bits(b)), f"tensor {i} {where}"


# --- graphs and streams -------------------------------------------------------------------------


def capture(step: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of a step, and where its results will be."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


@EVERY_CASE
@HALF_OR_FLOAT
@pytest.mark.parametrize("shape", [(33, 1031), (3, 50257)], ids=str)
def test_graph(case: Case, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Forward and backward, captured once and replayed on other numbers."""
    x, t = problem(case, shape, dtype)
    leaves = leaves_of(x, t)

    def step() -> list[Tensor]:
        value = case.call(x, t, **case.per_row)
        return [value, *torch.autograd.grad(value, leaves, torch.ones_like(value))]

    graph, captured = capture(step)
    for seed in (1, 2):
        with torch.no_grad():
            for static, new in zip((x, t), problem(case, shape, dtype, seed), strict=True):
                if static is not None:
                    static.copy_(new)
        graph.replay()
        same_bits(captured, step(), f"of replay {seed}")


@pytest.mark.parametrize("case", IN_PLACE, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_graph_in_place(case: Case, reduction: str) -> None:
    x, t = problem(case, (33, 1031), torch.bfloat16)
    x.requires_grad_()

    def step(in_place: bool = True) -> list[Tensor]:
        value = case.call(x * 1, t, reduction=reduction, inplace_backward=in_place)
        return [value, torch.autograd.grad(value, x)[0]]

    graph, captured = capture(step)
    with torch.no_grad():
        x.copy_(problem(case, (33, 1031), torch.bfloat16, seed=1)[0])
    graph.replay()
    same_bits(captured, step(in_place=False))


@EVERY_CASE
def test_the_current_stream_is_used(case: Case) -> None:
    """Else the kernel would run before the logits are there."""
    x, t = problem(case, (33, 1031), torch.float32)
    expected = evaluate(case, x, t)
    late, stream = torch.zeros_like(x), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(x)
        got = evaluate(case, late, t)
    stream.synchronize()
    same_bits(got, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@EVERY_CASE
def test_another_device(case: Case) -> None:
    x, t = problem(case, (5, 1031), torch.float32)
    expected = evaluate(case, x, t)
    with torch.cuda.device(0):
        got = evaluate(case, x.to("cuda:1"), t if t is None else t.to("cuda:1"))
    same_bits([v.to(x.device) for v in got], expected)


@EVERY_CASE
def test_nothing_waits_for_the_gpu(case: Case) -> None:
    x, t = problem(case, (33, 1031), torch.float32)
    token_weight, upstream = torch.rand(33), torch.rand(33)
    calls: list[dict[str, Any]] = [{}]
    if not case.name.startswith("log_prob"):
        calls = [{"reduction": r} for r in ("none", "sum", "mean", "batchmean")]
    if case in IN_PLACE:
        calls += [{"token_weight": token_weight}, {"inplace_backward": True}]
    if case.name == "cross_entropy":
        calls += [{"weight": torch.rand(1031)}]
    leaves = leaves_of(x, t)

    def run(options: dict[str, Any]) -> None:
        value = case.call(x * 1, t, **options)
        given = upstream.expand_as(value) if value.dim() else None
        torch.autograd.grad(value, leaves, given)
        if case.name == "cross_entropy":
            fastdiv.cross_entropy(x, t, return_stats=True, **case.options)

    for options in calls:
        run(options)  # what is done once may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(options)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# --- labels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [-1, 1031, -100, 2**31, 2**40, -(2**63)])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.1}, {"label_smoothing": 0.1, "smoothing": "others"}, {"weight": 1}],
    ids=str,
)
def test_a_label_out_of_range_makes_its_row_nan(
    label: int, in_place: bool, options: dict[str, Any]
) -> None:
    x, _ = make_inputs((4, 1031), torch.float32)
    x.requires_grad_()
    y, wrong = torch.tensor([1, 5, 7, 0]), torch.tensor([1, 5, label, 0])
    options = {**options, "ignore_index": 300, "reduction": "none"}
    if "weight" in options:
        options["weight"] = torch.rand(1031)

    def gradients(y: Tensor, in_place: bool) -> list[Tensor]:
        value = fastdiv.cross_entropy(x * 1, y, inplace_backward=in_place, **options)
        return [value, *torch.autograd.grad(value, x, torch.ones_like(value))]

    value, dx = gradients(wrong, in_place)
    assert value[2].isnan() and dx[2].isnan().all()
    others = [0, 1, 3]
    expected = gradients(y, in_place=False)
    same_bits([value[others], dx[others]], [v[others] for v in expected])
    assert fastdiv.cross_entropy(x, wrong, **{**options, "reduction": "mean"}).isnan()


@pytest.mark.parametrize("label", [-1, 1031, -100, 2**31])
def test_a_label_out_of_range_of_log_prob(label: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = make_inputs((3, 1031), torch.bfloat16)
    y = torch.tensor([1, label, 4])
    assert fastdiv.log_prob(x, y).isnan().tolist() == [False, True, False]
    assert fastdiv.log_prob_and_entropy(x, y)[0].isnan().tolist() == [False, True, False]
    monkeypatch.setenv("FASTDIV_CHECK", "1")
    with pytest.raises(IndexError, match=f"index.1. is {label}, out of range for 1031 classes"):
        fastdiv.log_prob(x, y)
    with pytest.raises(IndexError, match=str(label)):
        fastdiv.cross_entropy(x, y, ignore_index=300)


# --- rows ---------------------------------------------------------------------------------------


@EVERY_CASE
@HALF_OR_FLOAT
def test_a_row_is_the_same_in_every_batch(case: Case, dtype: torch.dtype) -> None:
    """The launch depends on the number of classes, and never on the number of rows."""
    for classes in (2, 33, 1021, 4099, 8193, 50257, 131075):
        x, t = inputs(case, (29, classes), dtype)
        expected = evaluate(case, x, t)
        for rows in (slice(0, 1), slice(13, 14), slice(27, 29), slice(1, 29, 2)):
            got = evaluate(case, x[rows], t if t is None else t[rows])
            same_bits(got, [v[rows] for v in expected], f"{rows} of {classes} classes")


@pytest.mark.parametrize("case", [c for c in LOSSES if not c.options], ids=str)
@HALF_OR_FLOAT
@pytest.mark.parametrize("classes", [4099, 50257, 131075])
def test_rows_off_alignment(case: Case, dtype: torch.dtype, classes: int) -> None:
    """Long rows of an odd number of classes, at any offset and with strides of their own."""
    x, t = inputs(case, (5, classes), dtype)
    expected = evaluate(case, x.clone(), t)
    for offset in range(1, 9):
        matrix = t is not None and t.is_floating_point()
        got = evaluate(case, moved(x, offset), moved(t, 7 * offset % 16) if matrix else t)
        same_bits(got, expected, f"{offset} elements further")


ROWS, CLASSES = 70_000, 32_000  # 2.24e9 elements, in bfloat16 4.5 GB


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties().total_memory < 30 * 2**30,
    reason="needs a GPU of 30 GiB",
)
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("name", ["cross_entropy", "kl_div", "js_div"])
def test_more_than_2_to_the_31_elements(name: str, in_place: bool) -> None:
    case = next(c for c in LOSSES if c.name == name and c.target in ("labels", "logits"))
    x = torch.randn(ROWS, CLASSES, dtype=torch.bfloat16)
    labels = torch.randint(CLASSES, (ROWS,))
    t = labels if case.target == "labels" else torch.randn_like(x)
    # The first ones, those on either side of element 2^31, the last ones.
    rows = [0, 1, 2**31 // CLASSES, 2**31 // CLASSES + 1, ROWS - 2, ROWS - 1]
    some, some_t = x[rows].requires_grad_(), t[rows]
    upstream = torch.linspace(0.5, 1.5, ROWS)

    logits = x.requires_grad_().view_as(x)
    value = case.call(logits, t, reduction="none", inplace_backward=in_place)
    (dx,) = torch.autograd.grad(value, x, upstream)
    assert (dx.data_ptr() == x.data_ptr()) == in_place

    alone = case.call(some, some_t, reduction="none")
    expected = [alone, *torch.autograd.grad(alone, some, upstream[rows])]
    same_bits([value[rows], dx[rows]], expected)
    exact = case.truth(some, some_t, reduction="none")
    torch.testing.assert_close(value[rows].double(), exact, rtol=1e-5, atol=1e-5)


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", IN_PLACE, ids=str)
def test_memory(case: Case) -> None:
    """In place nothing of the size of the logits is allocated, otherwise a gradient only."""
    rows, classes = 1024, 32_000
    x, t = torch.randn(rows, classes, dtype=torch.bfloat16), torch.randn(rows, classes)
    t = case.make_target(x, t.bfloat16())
    x.requires_grad_()
    for in_place, allowed in ((True, MIB), (False, x.nbytes + MIB)):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        value = case.call(x.view_as(x), t, inplace_backward=in_place)
        gradient = torch.autograd.grad(value, x)
        assert torch.cuda.max_memory_allocated() - before <= allowed
        del value, gradient


# --- around a loss ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FEW, ids=str)
def test_autocast(case: Case) -> None:
    layer = torch.nn.Linear(64, 1031)
    _, logits = make_inputs((32, 1031), torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        x = layer(torch.randn(32, 64))
        value = case.call(x, case.make_target(x, logits))
    assert x.dtype == torch.bfloat16 and value.dtype == torch.float32
    value.sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor(mode: str) -> None:
    """One graph with neighbours, on fresh memory, and as CUDA graphs."""
    torch._dynamo.reset()

    def everything(x: Tensor, t: Tensor) -> Tensor:
        logits = x * 1.5 + 0.25
        values = [case.call(logits, case.make_target(logits, t)).sum() for case in FEW]
        return torch.stack(values).sum()

    compiled = torch.compile(everything, mode=mode, fullgraph=True)
    for seed in range(4):  # the first ones warm up and capture
        x, t = make_inputs((64, 1031), torch.bfloat16, seed=seed)
        x.requires_grad_()
        results = []
        for function in (compiled, everything):
            value = function(x, t)
            results.append([value.detach().clone(), torch.autograd.grad(value, x)[0].clone()])
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-3)
