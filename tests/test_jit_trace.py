"""torch.jit.trace: a trace that runs with other batches, or raises; never another batch's numbers.

Warnings are errors here, so that the tracer's own, of what it takes for constant, would be seen.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiv
import fastdiv.distributed
import fastdiv.stats
from helpers.cases import KERNELS, Case, TopKCase, make_inputs
from helpers.linear_cases import TARGETS, make_case

close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-10)
CLASSES = 9


def traced(function: Callable[..., Any], *args: Tensor) -> Any:
    """A trace, as it comes back from a file."""

    class Calling(torch.nn.Module):
        def forward(self, *given: Tensor) -> Any:
            return function(*given)

    module = function if isinstance(function, torch.nn.Module) else Calling()
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, args, check_trace=False), file)
    file.seek(0)
    return torch.jit.load(file)


def check(function: Callable[..., Any], *batches: tuple[Tensor, ...]) -> Any:
    """A trace of the first batch gives what the function does, gradients included, for all."""
    trace = traced(function, *batches[0])
    for args in batches:
        results = []
        for f in (trace, function):
            own = [v.detach().requires_grad_(v.is_floating_point()) for v in args]
            with torch.jit.optimized_execution(False):  # which takes longer than all it runs
                out = f(*own)
            value = out[0] if isinstance(out, tuple) else out
            leaves = [v for v in own if v.requires_grad]
            results.append([value, *torch.autograd.grad(value.sum(), leaves)])
        close(*results)
    return trace


def batch_of(case: Case, *shape: int) -> tuple[Tensor, ...]:
    x, t = make_inputs((*shape, CLASSES), torch.float64)
    t = case.make_target(x, t)
    if isinstance(case, TopKCase):
        assert t is not None
        return (x, *case.largest(t, -1))
    return (x,) if t is None else (x, t)


def caller(case: Case, **options: Any) -> Callable[..., Tensor]:
    if isinstance(case, TopKCase):
        options = {**case.options, **options, "values_type": case.target}
        return partial(getattr(fastdiv, case.name), **options)
    return lambda x, t=None: case.call(x, t, **options)


def reductions(case: Case) -> list[dict[str, Any]]:
    if "log_prob" in case.name:
        return [{}]
    pointwise = ["pointwise"] if case.divergence and case.name != "renyi_div" else []
    return [{"reduction": r} for r in ("none", "sum", "mean", "batchmean", *pointwise)]


@pytest.mark.parametrize("case", KERNELS, ids=str)
def test_every_loss_with_other_batches(case: Case) -> None:
    for options in reductions(case):
        function = caller(case, **options)
        check(function, batch_of(case, 2), batch_of(case, 5))
        if case.name == "cross_entropy":
            function = caller(case, dim=2, **options)
        if options.get("reduction", "none") not in ("none", "pointwise"):
            continue
        batches = [batch_of(case, *rows) for rows in ((2, 3), (3, 1))]
        trace = check(function, *batches)
        with pytest.raises(RuntimeError, match="unflatten"):  # of other classes: no other's value
            trace(*[v[..., :-1] if v.shape[-1] == CLASSES else v for v in batches[0]])


@pytest.mark.parametrize("soft", [False, True])
def test_options_of_cross_entropy(soft: bool) -> None:
    weight = torch.linspace(1, 2, CLASSES, dtype=torch.float64)

    def function(x: Tensor, t: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        loss, stats = fastdiv.cross_entropy(
            x,
            t,
            weight,
            dim=-1,
            token_weight=w.detach(),
            ignore_index=3,
            label_smoothing=0.1,
            z_loss=1e-3,
            softcap=20.0,
            temperature=1.5,
            return_stats=True,
        )
        return (loss + 0 * w.sum(), *stats)

    batches = []
    for rows in (4, 7):
        x, t = make_inputs((rows, CLASSES), torch.float64)
        w = torch.linspace(0, 1, rows, dtype=torch.float64)
        batches.append((x, t.softmax(-1) if soft else t.argmax(-1), w))
    trace = check(function, *batches)
    close(trace(*batches[1]), function(*batches[1]))


@pytest.mark.parametrize("name, target", TARGETS)
def test_linear_losses(name: str, target: str) -> None:
    """The weight may be the model's own, or an argument."""
    for reduction in ("none", "sum", "mean", "batchmean") if "log_prob" not in name else (None,):
        options: dict[str, Any] = {} if reduction is None else {"reduction": reduction}
        cases = [
            make_case(name, rows, classes=CLASSES, target=target, dtype=torch.float64, **options)
            for rows in ((2,), (7,))
        ]
        keys = list(cases[0].leaves)
        labels = [() if c.label is None else (c.label,) for c in cases]

        def function(*args: Tensor, case: Any = cases[0], keys: Any = keys) -> Tensor:
            case.label = args[len(keys)] if len(args) > len(keys) else None
            return case.call(dict(zip(keys, args, strict=False)))

        batches = [(*c.leaves.values(), *y) for c, y in zip(cases, labels, strict=True)]
        trace = check(function, *batches)
        fewer = dict(cases[0].leaves)
        for key in fewer:
            if key.endswith(("weight", "bias")):
                fewer[key] = fewer[key][:-1]
        if "hidden" != target and "target" in fewer:
            fewer["target"] = fewer["target"][..., :-1]
        with pytest.raises(RuntimeError, match="unflatten"):
            trace(*fewer.values(), *labels[0])


@pytest.mark.parametrize("normalize_length", [False, True])
def test_label_smoothing_loss(normalize_length: bool) -> None:
    loss = fastdiv.nn.LabelSmoothingLoss(CLASSES, -1, 0.1, normalize_length)
    batches = []
    for shape in ((2, 3), (5, 4)):
        x, t = make_inputs((*shape, CLASSES), torch.float64)
        y = t.argmax(-1)
        y[0, 1:] = -1
        batches.append((x, y))
    check(loss, *batches)


def modules() -> list[torch.nn.Module]:
    nn = fastdiv.nn
    return [
        nn.CrossEntropyLoss(torch.linspace(1, 2, CLASSES), dim=-1, label_smoothing=0.1),
        nn.CrossEntropyLoss(reduction="batchmean", dim=-1),
        nn.DistillationLoss("js_div", temperature=2.0, scale_by_temperature=True),
        nn.DistillationLoss("kl_div", alpha=1.0, reduction="batchmean"),
        nn.KLDivLoss(target_type="logits", temperature=2.0, scale_by_temperature=True),
        nn.EntropyLoss(base=2, reduction="batchmean"),
        nn.LinearCrossEntropyLoss(CLASSES, 6, bias=True, reduction="batchmean"),
        nn.LinearKLDivLoss(CLASSES, CLASSES, target_type="logits"),
    ]


@pytest.mark.parametrize("module", modules(), ids=lambda m: type(m).__name__)
def test_modules(module: torch.nn.Module) -> None:
    batches = []
    for rows in (2, 5):
        x, t = make_inputs((rows, CLASSES), torch.float64)
        y = t.argmax(-1) % 6
        kind = type(module).__name__
        hard = "CrossEntropy" in kind
        batches.append((x, y) if hard else (x,) if "Entropy" in kind else (x, t))
        if "Distillation" in kind:
            batches[-1] = (x, t, y)
    check(module.double(), *batches)


def test_a_trace_needs_no_library() -> None:
    """It may run in a process that never imported this one: torch's operations only."""
    x, t = make_inputs((3, CLASSES), torch.float64)
    graph = str(traced(partial(fastdiv.kl_div, target_type="logits"), x, t).inlined_graph)
    assert "aten::log_softmax" in graph
    assert "fastdiv" not in graph.replace("/fastdiv/", "/") and "Python" not in graph


def test_errors_while_tracing() -> None:
    """Bad input is refused as it is without a tracer."""
    x, t = make_inputs((3, CLASSES), torch.float64)
    with pytest.raises(ValueError, match="target must have the shape of input"):
        traced(partial(fastdiv.kl_div, target_type="logits"), x, t[:2])
    with pytest.raises(IndexError, match="out of range for 9 classes"):
        traced(fastdiv.cross_entropy, x, torch.tensor([0, 9, 1]))
    with fastdiv.backend("native"), pytest.raises(RuntimeError, match="records torch operations"):
        traced(fastdiv.entropy, x)
    graph = fastdiv.entropy(x.requires_grad_()).grad_fn
    assert "RowLoss" in type(graph).__name__  # the kernels are back


def test_collectives_are_refused(gloo: None) -> None:
    """Refuse to trace sharded losses: the trace would hold one rank's part."""
    x = torch.randn(3, CLASSES)
    for function in (
        fastdiv.distributed.entropy,
        lambda x: fastdiv.distributed.token_mean(x.sum(), 3),
    ):
        with pytest.raises(RuntimeError, match="torch.jit.trace cannot record"):
            traced(function, x)


@pytest.mark.parametrize("name", ["information_content", "entropy"])
def test_stats_of_one(name: str) -> None:
    batches = [(torch.rand(rows, CLASSES, dtype=torch.float64),) for rows in (2, 5)]
    check(partial(getattr(fastdiv.stats, name), axis=-1), *batches)


@pytest.mark.parametrize("name", ["entropy", "cross_entropy", "kl_div", "js_div", "jensenshannon"])
def test_stats_of_two(name: str) -> None:
    batches = [tuple(torch.rand(2, rows, CLASSES, dtype=torch.float64)) for rows in (2, 5)]
    check(partial(getattr(fastdiv.stats, name), axis=-1), *batches)
