"""TRL's functions of hidden states on ours: values, gradients, and the calls that stay TRL's."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiv
import fastdiv.integrations.trl.patch as integration
from fastdiv.integrations.trl import hidden as ours
from fastdiv.integrations.trl.original import DIVERGENCE, LOG_PROB
from fastdiv.integrations.trl.patch import CHUNKED, ON_CPU
from helpers.trl_functions import utils
from helpers.values import uneven, value_and_gradients

gradients = partial(value_and_gradients, upstream=uneven)

ROWS, WIDTH, CLASSES = 7, 5, 11
OURS = ("linear_log_prob", "linear_log_prob_and_entropy", "linear_cross_entropy", "linear_js_div")
EVERY = ("log_probs", "entropy", "mean_logits", "is_top1")
ASKED = {  # by TRL's trainers, and what then runs
    "reference": (EVERY[:1], "linear_log_prob"),
    "GRPO": (EVERY[:2], "linear_log_prob_and_entropy"),
    "KTO": (EVERY[:3], "linear_log_prob_and_entropy"),
    "SFT": (EVERY[::3] + EVERY[1:2], "linear_cross_entropy"),
    "DPO": (EVERY, "linear_cross_entropy"),
}

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    try:
        kernels = importlib.import_module(CHUNKED)
    except ImportError:
        pytest.skip("this version of TRL streams nothing", allow_module_level=True)
    if not hasattr(kernels, ON_CPU):
        pytest.skip("this version of TRL streams on a GPU only", allow_module_level=True)
    distillation = importlib.import_module("trl.trainer.distillation_trainer")
THEIRS = getattr(kernels, LOG_PROB)
DIVERGE = getattr(distillation, DIVERGENCE)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The functions of fastdiv that are called, under the patch."""
    called: list[str] = []

    def spy(name: str) -> Callable[..., Any]:
        function = getattr(ours, name)
        return lambda *args, **given: called.append(name) or function(*args, **given)

    for name in OURS:
        monkeypatch.setattr(ours, name, spy(name))
    with integration.apply():
        called.clear()
        yield called


def layer(dtype: torch.dtype, bias: bool = True) -> list[Tensor]:
    shapes = ((ROWS, WIDTH), (CLASSES, WIDTH), (CLASSES,))
    return [torch.randn(shape).to(dtype) for shape in shapes[: 2 + bias]]


def log_probs(
    outputs: tuple[str, ...], targets: Tensor, temperature: float = 1.0, **options: Any
) -> Callable[..., Any]:
    """The differentiable outputs of the function that TRL has now."""

    def function(x: Tensor, w: Tensor, b: Tensor | None = None) -> Any:
        call = utils._ChunkedLogProbFunction.apply
        rest = [options.get("final_logit_softcapping"), options.get("logit_scale", 1.0), outputs]
        got = call(x, w, b, targets, temperature, 4, *rest)
        return tuple(v for v in got[:2] if v is not None)

    return function


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("asked", ASKED)
def test_log_probs(calls: list[str], asked: str, bias: bool, dtype: torch.dtype) -> None:
    """Values and gradients, of the entropy too, beside TRL's own of the same numbers in float32."""
    outputs, runs_on = ASKED[asked]
    targets, leaves = torch.randint(CLASSES, (ROWS,)), layer(dtype, bias)
    options: list[dict[str, Any]] = [{}, {"temperature": 0.7, "logit_scale": 0.25}]
    if "mean_logits" not in outputs:
        options.append({"final_logit_softcapping": 2.0, "logit_scale": 0.5, "temperature": 2.0})
    for given in options:
        function = log_probs(outputs, targets, **given)
        calls.clear()
        got = gradients(function, *leaves)
        assert calls[0] == runs_on
        with fastdiv.backend("reference"):
            plain = gradients(function, *leaves)
            expected = gradients(function, *(v.float() for v in leaves))
        assert [v.dtype for v in got] == [v.dtype for v in plain]
        for a, b in zip(got, expected, strict=True):
            rtol = 2e-2 if dtype is torch.bfloat16 else 2e-5
            torch.testing.assert_close(a.float(), b.float(), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("asked", ASKED)
def test_outputs_without_gradient(calls: list[str], asked: str) -> None:
    """Mean logits and the most likely class; what is not asked for is None."""
    outputs, _ = ASKED[asked]
    x, w, b = layer(torch.float32)
    w[3] = w[2]  # ties: the first class counts
    b[3] = b[2]
    targets = (x @ w.t() + b).argmax(-1)
    targets[::2] = 3
    arguments = (x, w, b, targets, 1.5, 4, None, 0.5, outputs)
    got, expected = (f.apply(*arguments) for f in (utils._ChunkedLogProbFunction, THEIRS))
    assert calls
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert [v is None for v in got] == [v is None for v in expected]


def test_frozen_parts_get_no_gradient(calls: list[str]) -> None:
    x, w, b = layer(torch.float32)
    for outputs, _ in ASKED.values():
        x.requires_grad_()
        got = utils._ChunkedLogProbFunction.apply(
            x, w, b, torch.zeros(ROWS, dtype=torch.int64), 1.0, 4, None, 1.0, outputs
        )
        sum(v.sum() for v in got[:2] if v is not None).backward()
        assert x.grad is not None and w.grad is None and b.grad is None
        assert not any(v.requires_grad for v in got[2:] if v is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(calls: list[str], dtype: torch.dtype) -> None:
    """The layer is cast as TRL casts it; gradients have the dtypes of the leaves."""
    x, w, b = layer(torch.float32)
    x, targets = x.to(dtype), torch.randint(CLASSES, (ROWS,))
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(log_probs(EVERY[:2], targets), x, w, b)
        with fastdiv.backend("reference"):
            expected = gradients(log_probs(EVERY[:2], targets), x, w, b)
    assert calls
    for a, e in zip(got, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=5e-2, atol=5e-2)


class Tagged(Tensor):
    pass


X, W, B = layer(torch.float32)
Y = torch.zeros(ROWS, dtype=torch.int64)
GATHERED = W.clone()
GATHERED.ds_status = "AVAILABLE"  # type: ignore[attr-defined]  # as ZeRO-3 marks a weight
STAY: dict[str, tuple[Any, ...]] = {
    "log Σ p²": (X, W, B, Y, 1.0, 4, None, 1.0, ("log_probs", "log_sum_sq_probs")),
    "a capped mean": (X, W, B, Y, 1.0, 4, 2.0, 1.0, ("log_probs", "mean_logits")),
    "every output": (X, W, B, Y, 1.0, 4),
    "no rows": (X[:0], W, B, Y[:0], 1.0, 4, None, 1.0, EVERY),
    "a target out of range": (X, W, B, Y + CLASSES, 1.0, 4, None, 1.0, EVERY),
    "int32 targets": (X, W, B, Y.int(), 1.0, 4, None, 1.0, EVERY[:1]),
    "targets of fewer rows": (X, W, B, Y[1:], 1.0, 4, None, 1.0, EVERY),
    "another width": (X[:, 1:], W, B, Y, 1.0, 4, None, 1.0, EVERY),
    "a short bias": (X, W, B[1:], Y, 1.0, 4, None, 1.0, EVERY),
    "a cube": (X[None], W, B, Y, 1.0, 4, None, 1.0, EVERY),
    "a negative scale": (X, W, B, Y, 1.0, 4, None, -1.0, EVERY),
    "scale 0": (X, W, B, Y, 1.0, 4, None, 0.0, EVERY),
    "temperature 0": (X, W, B, Y, 0.0, 4, None, 1.0, EVERY),
    "no chunk": (X, W, B, Y, 1.0, 0, None, 1.0, EVERY),
    "a subclass": (X.as_subclass(Tagged), W, B, Y, 1.0, 4, None, 1.0, EVERY),
    "a weight of ZeRO-3": (X, GATHERED, B, Y, 1.0, 4, None, 1.0, EVERY),
    "too few arguments": (X, W),
}


def outcome(function: Callable[..., Any], *args: Any) -> Any:
    try:
        values = function(*args)
    except Exception as error:
        return type(error), str(error)
    return [None if v is None else (v.dtype, v.tolist()) for v in values]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", STAY)
def test_other_calls_are_trls(calls: list[str], name: str) -> None:
    got = outcome(utils._ChunkedLogProbFunction.apply, *STAY[name])
    assert str(got) == str(outcome(THEIRS.apply, *STAY[name]))
    assert not calls or "target" in name


def divergence(
    teacher: list[Tensor], mask: Tensor, beta: float, **options: Any
) -> Callable[..., Any]:
    """The loss that TRL's DistillationTrainer has now, of a student's layer."""

    def function(x: Tensor, w: Tensor, b: Tensor) -> Any:
        given = {"student_lm_head_bias": b, **options}
        loss, *others = getattr(distillation, DIVERGENCE)(
            x, teacher[0], w, teacher[1], mask, beta, **given
        )
        assert not any(v.requires_grad for v in others)
        (of_teacher,) = torch.autograd.grad(loss, teacher[1], retain_graph=True, allow_unused=True)
        assert of_teacher is None
        return loss

    return function


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("beta", [0, 0.3, 1.0])
def test_distillation(calls: list[str], beta: float, dtype: torch.dtype) -> None:
    """A student and a wider teacher, whose weight gets no gradient; padding may hold NaN."""
    student = [v.reshape(1, *v.shape) if i == 0 else v for i, v in enumerate(layer(dtype))]
    teacher = [torch.randn(1, ROWS, 8).to(dtype), torch.randn(CLASSES, 8).to(dtype)]
    teacher[1].requires_grad_()
    mask = torch.tensor([[1, 1, 0, 1, 0, 0, 1]])
    for options in (
        {},
        {"temperature": 2.0, "student_logit_scale": 0.5, "teacher_logit_scale": 0.5},
        {"num_items_in_batch": torch.tensor(9), "teacher_lm_head_bias": torch.randn(CLASSES)},
        {"num_items_in_batch": 9},
    ):
        given = {k: v.to(dtype) if "bias" in k else v for k, v in options.items()}
        calls.clear()
        got = gradients(divergence(teacher, mask, beta, **given), *student)
        assert calls == ["linear_js_div", "linear_log_prob_and_entropy"]
        with fastdiv.backend("reference"):
            expected = gradients(divergence(teacher, mask, beta, **given), *student)
        for a, e in zip(got, expected, strict=True):
            rtol = 2e-2 if dtype is torch.bfloat16 else 1e-5
            torch.testing.assert_close(a, e, rtol=rtol, atol=rtol / 10)
    x, w, b = student
    three = [
        f(x, teacher[0], w, teacher[1], mask, beta, student_lm_head_bias=b)
        for f in (getattr(distillation, DIVERGENCE), DIVERGE)
    ]
    torch.testing.assert_close(*three, rtol=1e-2, atol=1e-2)
    broken = x.masked_fill(mask[..., None] == 0, torch.nan)
    got = getattr(distillation, DIVERGENCE)(broken, teacher[0], w, teacher[1], mask, beta)
    assert not any(v.isnan() for v in got)


@pytest.mark.filterwarnings("ignore")
def test_distillation_that_stays_trls(calls: list[str]) -> None:
    x, t, mask = X[None], X[None].flip(1), torch.ones(1, ROWS)
    for options in (
        {"student_final_logit_softcapping": 2.0},
        {"student_logit_scale": 0.5},
        {"temperature": 0.0},
        {"beta": 1.5},
        {"completion_mask": mask[:, 1:]},
        {"completion_mask": torch.zeros(1, 0), "student_hidden_states": x[:, :0]},
        {"teacher_hidden_states": t[:, :0]},
    ):
        given = {"student_hidden_states": x, "teacher_hidden_states": t, "beta": 0.5}
        given |= {"completion_mask": mask, "student_lm_head_weight": W}
        given |= {"teacher_lm_head_weight": W.flip(0), **options}
        got = outcome(lambda g=given: getattr(distillation, DIVERGENCE)(**g))
        assert str(got) == str(outcome(lambda g=given: DIVERGE(**g))), options
    assert not calls


def test_replaced_and_put_back() -> None:
    """In every module of TRL, the names of what is replaced, and a class that looks like TRL's."""
    holders = [m for m in list(sys.modules.values()) if getattr(m, LOG_PROB, None) is THEIRS]
    assert len(holders) >= 2
    assert utils._ChunkedLogProbFunction is THEIRS
    with integration.apply() as patch:
        replaced = utils._ChunkedLogProbFunction
        assert replaced is not THEIRS and replaced.__wrapped__ is THEIRS
        assert (replaced.__name__, replaced.__module__) == (LOG_PROB, CHUNKED)
        assert all(getattr(m, LOG_PROB) is replaced for m in holders)
        assert getattr(distillation, DIVERGENCE).__wrapped__ is DIVERGE
        assert f"{CHUNKED}.{LOG_PROB}" in patch.functions
        assert f"{distillation.__name__}.{DIVERGENCE}" in patch.functions
    assert utils._ChunkedLogProbFunction is THEIRS and patch.functions == ()
    assert all(getattr(m, LOG_PROB) is THEIRS for m in holders)
    assert getattr(distillation, DIVERGENCE) is DIVERGE
    arguments = (X, W, B, Y, 1.0, 4, None, 1.0, EVERY)  # of one who kept the replacement
    for a, b in zip(replaced.apply(*arguments), THEIRS.apply(*arguments), strict=True):
        assert (a is None and b is None) or a.equal(b)


def test_a_version_with_another_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused, and nothing is changed."""
    fold = getattr(kernels, ON_CPU)
    monkeypatch.setattr(integration, "_replacements", {})  # each version is checked once
    monkeypatch.setattr(kernels, ON_CPU, lambda tile, *a, **k: fold(2 * tile, *a, **k))
    with pytest.raises(RuntimeError, match=f"another formula in {CHUNKED}.{LOG_PROB}"):
        integration.apply()
    assert utils._ChunkedLogProbFunction is THEIRS and not integration.TrlPatch.standing


def test_a_version_with_other_arguments() -> None:
    source = f"""
class {LOG_PROB}(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels): ...
"""
    exec(compile(source, "trl", "exec"), vars(kernels))
    try:
        with pytest.raises(
            RuntimeError, match=rf"has {CHUNKED}.{LOG_PROB}\(hidden, weight, labels"
        ):
            integration.apply()
    finally:
        setattr(kernels, LOG_PROB, THEIRS)
    assert not integration.TrlPatch.standing


@pytest.mark.filterwarnings("ignore")
def test_in_one_graph() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        total = x.new_zeros(())
        for outputs in (EVERY[:1], EVERY[:2], EVERY[:3]):
            got = utils._ChunkedLogProbFunction.apply(x, w, None, Y, 0.7, 4, None, 1.0, outputs)
            total = total + got[0].sum() + (0 if got[1] is None else got[1].sum())
        return total

    with integration.apply():
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        got, expected = (gradients(f, X, W) for f in (compiled, function))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
