"""Temperatures in tensors: one number or one for each row, learnt, compiled, in modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastdiv
from helpers.cases import DTYPES, LOSSES, Case, TopKCase, make_inputs, module_of
from helpers.masks import make_mask
from helpers.values import same, value_and_gradients

CASES = [c for c in LOSSES if not isinstance(c, TopKCase) and "temperature" not in c.options]
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=str)
KINDS = [
    next(c for c in CASES if str(c) == name)
    for name in (
        "cross_entropy-labels",
        "cross_entropy-labels[z_loss=0.001]",
        "cross_entropy-probs",
        "kl_div-logits",
        "kl_div-probs",
        "log_prob_and_entropy-labels",
    )
]


def equal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True)


def inputs(case: Case, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Any]:
    x, t = make_inputs(shape, dtype)
    return x, case.make_target(x, t)


def found(case: Case, x: Tensor, t: Any, **options: Any) -> tuple[Tensor, ...]:
    return value_and_gradients(lambda x, t: case.call(x, t, **options), x, t)


@EVERY_CASE
def test_bits_of_a_number(case: Case, isa: str) -> None:
    """One number in a tensor, and one for each row, give what a number gives."""
    for dtype in DTYPES:
        x, t = inputs(case, (4, 69), dtype)
        number = 0.7 if dtype == torch.float64 else float(torch.tensor(0.7))
        expected = found(case, x, t, temperature=number, **case.per_row)
        for kind in (torch.float32, torch.float64) if dtype != torch.float64 else (dtype,):
            one = torch.tensor(number, dtype=kind)
            for temperature in (one, one.reshape(1, 1), one.expand(4), one.repeat(8)[::2]):
                given = {"temperature": temperature, **case.per_row}
                equal(found(case, x, t, **given), expected)
        each = torch.tensor([0.5, 2.0, 1.0, 3.0])
        of_rows = found(case, x, t, temperature=each, **case.per_row)
        for i, v in enumerate(each.tolist()):
            own = slice(i, i + 1)
            alone = found(
                case, x[own], None if t is None else t[own], temperature=v, **case.per_row
            )
            equal((of_rows[0][..., own], *(g[own] for g in of_rows[1:])), alone)


@EVERY_CASE
def test_gradient(case: Case) -> None:
    """Of one number for all rows, and of one for each, beside those of logits and target."""
    x, t = inputs(case, (5, 37), torch.float64)
    x[1, 3] = -torch.inf
    if case.target == "logits":
        t[2, 5] = t[1, 3] = -torch.inf
    for temperature in (torch.tensor(1.7), torch.linspace(0.5, 3, 5)):
        results = []
        for backend in ("native", "reference"):
            with fastdiv.backend(backend):
                results.append(
                    value_and_gradients(
                        lambda x, t, T: case.call(x, t, temperature=T, **case.per_row),
                        x,
                        t,
                        temperature.double(),
                    )
                )
        for a, e in zip(*results, strict=True):
            same(a, e, 1e-9)
        assert results[0][-1].isfinite().all() and results[0][-1].ne(0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_gradient_in_few_digits(case: Case, dtype: torch.dtype) -> None:
    """Of large logits, and of a temperature in half precision."""
    x, t = inputs(case, (5, 1029), dtype)
    x = x + 20
    each = torch.linspace(0.5, 3, 5)
    of_rows = value_and_gradients(
        lambda x, t, T: case.call(x, t, temperature=T, **case.per_row), x, t, each
    )[-1]
    exact = t.double() if case.soft else t
    with fastdiv.backend("reference"):
        expected = value_and_gradients(
            lambda x, t, T: case.call(x, t, temperature=T, **case.per_row),
            x.double(),
            exact,
            each.double(),
        )[-1]
    same(of_rows, expected.float(), 2e-4)
    half = value_and_gradients(
        lambda x, T: case.call(x, t, temperature=T, **case.per_row),
        x,
        torch.tensor(2.0, dtype=dtype),
    )[-1]
    assert half.dtype == dtype and half.dim() == 0


@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
def test_reductions_dims_weights_and_masks(reduction: str) -> None:
    x, t = make_inputs((3, 9, 4), torch.float64)
    temperature = torch.rand(3, 4, dtype=torch.float64) + 0.5
    weight = torch.rand(3, 4, dtype=torch.float64)
    mask = make_mask((3, 4, 9)).movedim(-1, 1)

    def loss(x: Tensor, t: Tensor, T: Tensor) -> Tensor:
        return fastdiv.js_div(
            x, t, target_type="logits", dim=1, temperature=T, token_weight=weight,
            class_mask=mask, reduction=reduction,
        )  # fmt: skip

    def plain(x: Tensor, t: Tensor, T: Tensor) -> Tensor:
        x, t = (v.masked_fill(~mask, -torch.inf) for v in (x, t))
        x, t = (v / T.unsqueeze(1) for v in (x, t))
        return fastdiv.js_div(
            x, t, target_type="logits", dim=1, token_weight=weight, reduction=reduction
        )

    whole = value_and_gradients(loss, x, t, temperature)
    with fastdiv.backend("reference"):
        same(whole[0], plain(x, t, temperature), 1e-9)
        expected = value_and_gradients(loss, x, t, temperature)
    for a, e in zip(whole, expected, strict=True):
        same(a, e, 1e-9)


def test_rows_that_do_not_count() -> None:
    """Their gradient is 0, whatever the logits are."""
    x, y = make_inputs((3, 9), torch.float32)[0], torch.tensor([1, -100, 2])
    x[1] = torch.nan
    temperature = torch.full((3,), 2.0)
    for backend in ("native", "reference"):
        with fastdiv.backend(backend):
            value, dx, dT = value_and_gradients(
                lambda x, T: fastdiv.cross_entropy(x, y, temperature=T), x, temperature
            )
        assert value.isfinite() and dx.isfinite().all() and dT.isfinite().all()
        assert dT[1] == 0 and dx[1].eq(0).all() and dT[0] != 0


def test_bad_rows_where_values_are_not_read() -> None:
    """As on a GPU: the row is NaN, the others are as they were."""
    x, t = make_inputs((4, 9), torch.float32)
    good, bad = torch.ones(4), torch.tensor([1.0, 0.0, 1.0, torch.inf])

    def loss(x: Tensor, temperature: Tensor) -> Tensor:
        return fastdiv.entropy(x, temperature=temperature)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert compiled(x, bad).isnan().tolist() == [False, True, False, True]
    assert compiled(x, bad)[::2].equal(loss(x, good)[::2])
    values = torch.func.vmap(loss)(x[:, None], bad[:, None])
    assert values.isnan().flatten().tolist() == [False, True, False, True]


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_second_derivatives_and_transforms(case: Case) -> None:
    x, t = inputs(case, (2, 4), torch.float64)

    def loss(x: Tensor, T: Tensor) -> Tensor:
        return case.call(x, t, temperature=T, **case.per_row)

    for shape in ((), (2,)):
        temperature = torch.full(shape, 1.3, dtype=torch.float64)
        args = x.clone().requires_grad_(), temperature.requires_grad_()
        assert torch.autograd.gradcheck(loss, args, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(loss, args)
        x, temperature = x.detach(), temperature.detach()
        native = torch.func.jacrev(loss, (0, 1))(x, temperature)
        with fastdiv.backend("reference"):
            expected = torch.func.jacfwd(loss, (0, 1))(x, temperature)
        for a, e in zip(native, expected, strict=True):
            same(a, e, 1e-9)
    several = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    each = torch.stack([loss(x, v) for v in several])
    same(torch.func.vmap(lambda v: loss(x, v))(several), each, 1e-9)


CALLS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "cross_entropy": lambda x, t, T: fastdiv.cross_entropy(x, t.argmax(-1), temperature=T),
    "stats": lambda x, t, T: fastdiv.cross_entropy(
        x, t.argmax(-1), temperature=T, return_stats=True
    )[0],
    "log_prob": lambda x, t, T: fastdiv.log_prob(x, t.argmax(-1), temperature=T),
    "kl_div": lambda x, t, T: fastdiv.kl_div(x, t, target_type="logits", temperature=T),
    "pointwise": lambda x, t, T: fastdiv.kl_div(
        x, t, target_type="logits", temperature=T, reduction="pointwise"
    ),
    "entropy": lambda x, t, T: fastdiv.entropy(x, temperature=T),
    "module": lambda x, t, T: fastdiv.nn.KLDivLoss(
        target_type="logits", temperature=T, scale_by_temperature=True
    )(x, t),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("learnt", [False, True])
def test_one_graph_for_all_values(name: str, learnt: bool) -> None:
    """An annealed number compiles twice; a tensor does so once."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(CALLS[name], backend=counter, fullgraph=True)
    x, t = make_inputs((6, 17), torch.float32)
    for value in (1.0, 0.5, 2.0, 3.0):
        temperature = torch.tensor(value)
        args = (x, t, temperature)
        results = []
        for function in (compiled, CALLS[name]):
            if learnt:
                results.append(value_and_gradients(function, *args, unused=True))
            else:
                results.append((function(*args),))
        for a, e in zip(*results, strict=True):
            same(a, e, 1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("case", [c for c in CASES if c.divergence], ids=str)
def test_modules(case: Case) -> None:
    x, t = inputs(case, (4, 9), torch.float32)
    options = {**case.options, "target_type": case.target}

    def module(temperature: Any, reduction: str = "none") -> Any:
        scaled = {"scale_by_temperature": True, "reduction": reduction}
        return module_of(case.name)(temperature=temperature, **scaled, **options)

    expected = module(1.5)(x, t)
    for temperature in (torch.tensor(1.5), torch.full((4,), 1.5)):
        assert torch.equal(module(temperature)(x, t), expected)
        assert f"temperature=Tensor of shape {tuple(temperature.shape)}" in repr(
            module(temperature)
        )
    learnt = module(torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64)), "sum")
    assert [*learnt.state_dict()] == ["temperature"]
    value = learnt(x, t)
    assert torch.equal(value, module(1.5, "sum")(x, t))
    value.backward()
    step = 1e-4
    up, down = (module(1.5 + s, "sum")(x.double(), t.double()) for s in (step, -step))
    same(learnt.temperature.grad, (up - down) / (2 * step), 1e-4)
    with pytest.raises(ValueError, match=r"each row needs reduction='none', got 'sum'"):
        module(torch.full((4,), 1.5), "sum")(x, t)


def test_other_modules() -> None:
    x, t = make_inputs((4, 9), torch.float32)
    y, one = t.argmax(-1), torch.nn.Parameter(torch.tensor(1.5))
    nn = fastdiv.nn
    assert nn.CrossEntropyLoss(temperature=one)(x, y) == nn.CrossEntropyLoss(temperature=1.5)(x, y)
    assert nn.EntropyLoss(temperature=one)(x) == nn.EntropyLoss(temperature=1.5)(x)
    for options in ({"temperature": one}, {"temperature": one, "scale_by_temperature": True}):
        module = nn.DistillationLoss("js_div", **options)
        number = nn.DistillationLoss("js_div", **{**options, "temperature": 1.5})
        value = module(x, t, y)
        assert torch.equal(value, number(x, t, y)) and "Parameter of shape ()" in repr(module)
        (gradient,) = torch.autograd.grad(value, one)
        assert gradient != 0
    each = nn.DistillationLoss(temperature=torch.ones(4), scale_by_temperature=True)
    with pytest.raises(ValueError, match="each row needs reduction='none'"):
        each(x, t, y)


def test_values_are_checked_in_every_call() -> None:
    """A kind of call that is known says nothing about them."""
    x = torch.randn(3, 5)
    for value in (1.0, 2.0, 2.0):
        temperature = torch.full((3,), value)
        assert fastdiv.entropy(x, temperature=temperature).equal(
            fastdiv.entropy(x, temperature=value)
        )
    with pytest.raises(ValueError, match=r"positive finite number, got 0.0 at \[2\]"):
        fastdiv.entropy(x, temperature=torch.tensor([1.0, 1.0, 0.0]))


def test_in_place_and_trace() -> None:
    x, t = make_inputs((4, 33), torch.float32)
    results = []
    for inplace in (False, True):
        leaf, temperature = x.clone().requires_grad_(), torch.tensor(2.0, requires_grad=True)
        loss = fastdiv.kl_div(
            leaf * 1, t, target_type="logits", temperature=temperature, inplace_backward=inplace
        )
        loss.backward()
        results.append((loss.detach(), leaf.grad, temperature.grad))
    equal(*results)

    def traced(x: Tensor, temperature: Tensor) -> Tensor:
        return fastdiv.entropy(x, temperature=temperature)

    for shape in ((), (4,)):
        trace = torch.jit.trace(traced, (x, torch.full(shape, 2.0)), check_trace=False)
        other = torch.full(() if not shape else (2,), 3.0)
        same(trace(x[:2], other), traced(x[:2], other))
