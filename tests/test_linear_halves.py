"""Linear losses whose layer is multiplied in half precision, as a GPU and some CPUs can."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiv
from fastdiv._linear.tiles import product_dtype
from helpers.linear_cases import OF_CLASSES, TARGETS, LinearCase, make_case, named_gradients

pytestmark = pytest.mark.usefixtures("one_thread")
EVERY_TARGET = pytest.mark.parametrize(("name", "target"), TARGETS)
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "none"])


@pytest.fixture
def products_of_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves are multiplied as they are, also where the processor has no instruction for it."""
    monkeypatch.setattr("fastdiv._linear.tiles.multiplies", lambda half: True)


def half_case(name: str, target: str, reduction: str, *rows: int, **options: Any) -> LinearCase:
    if name not in OF_CLASSES:
        options["reduction"] = reduction
    return make_case(name, rows, target=target, dtype=torch.bfloat16, **options)


@pytest.mark.usefixtures("products_of_halves")
def test_products_of_halves() -> None:
    """Where the processor has them, as a GPU does, logits are rounded to halves, as eager's are."""
    for name, target in TARGETS:
        for reduction in ("mean", "none"):
            options = {} if name in OF_CLASSES else {"reduction": reduction}
            case = make_case(
                name, (33,), target=target, dtype=torch.bfloat16, chunk_size=8, **options
            )
            value, gradients = named_gradients(case.call, case.leaves)
            truth, expected = case.truth()
            torch.testing.assert_close(value.double(), truth, rtol=3e-2, atol=3e-2)
            for key, g in gradients.items():
                largest = float(expected[key].abs().max())
                torch.testing.assert_close(g.double(), expected[key], rtol=0, atol=0.05 * largest)


def gradients_rounded_once(case: LinearCase) -> dict[str, Tensor]:
    """Of tensors whose logits float32 holds exactly: all that eager torch rounds, and no more.

    Logits and their gradient are rounded to the dtype of the leaves, and all else is in float64.
    The products that give the layers' gradients come as they are, in float64.
    """
    dtype, v = case.leaves["input"].dtype, case.double().leaves

    def rounded(t: Tensor) -> Tensor:
        return t.to(dtype).double()

    layers = [("input", "linear_weight", "linear_bias")]
    if "target_linear_weight" in v:
        layers.append(("target", "target_linear_weight", "target_linear_bias"))
    logits = [rounded(F.linear(*(v[k] for k in layer))).requires_grad_() for layer in layers]
    second = case.second_of(dict(v)) if len(layers) == 1 else [logits[1]]
    options = dict(case.options)
    if len(layers) == 2:
        options["target_type"] = "logits"
    with fastdiv.backend("reference"):
        value = getattr(fastdiv, case.name)(logits[0], *second, **options)
    value = torch.stack(value) if isinstance(value, tuple) else value
    upstream = torch.linspace(1, 2, value.numel()).view_as(value)
    found = {}
    for layer, d in zip(
        layers, torch.autograd.grad(value, logits, upstream.to(value)), strict=True
    ):
        d, (h, w) = rounded(d), (v[k] for k in layer[:2])
        found.update(zip(layer, (d @ w, d.t() @ h, d.sum(0)), strict=True))
    return found


@EVERY_TARGET
@REDUCTIONS
@pytest.mark.usefixtures("products_of_halves")
def test_a_gradient_is_rounded_once(name: str, target: str, reduction: str) -> None:
    """However many tiles it is added up of: its error is that of the last rounding alone.

    Hidden states and weights are small integers, so that every logit is exact in float32 and has
    one rounding to a half, in whatever order a processor adds.
    """
    case = half_case(name, target, reduction, 300, hidden=16, classes=600, teacher_hidden=9)
    layers = [k for k in case.leaves if k not in ("target", "values") or target == "hidden"]
    for k in layers:
        case.leaves[k] = (case.leaves[k].clamp(-2, 2) * 2).round() / 2
    _, gradients = named_gradients(case.call, case.leaves)
    for key, exact in gradients_rounded_once(case).items():
        error, of_rounding = (
            (g.double() - exact).norm().item() for g in (gradients[key], exact.bfloat16())
        )
        assert error <= 1.05 * of_rounding, f"{key}: {error / of_rounding:.2f} times"


@EVERY_TARGET
@REDUCTIONS
@pytest.mark.usefixtures("products_of_halves")
def test_no_farther_from_the_truth_than_eager_torch(name: str, target: str, reduction: str) -> None:
    """Which rounds the logits, their gradient and the results, too."""
    case = half_case(name, target, reduction, 300, hidden=32, classes=600, teacher_hidden=9)
    _, ours = named_gradients(case.call, case.leaves)
    with fastdiv.backend("reference"):
        _, theirs = named_gradients(case.unfused, case.leaves)
    _, truth = case.truth()
    for key, exact in truth.items():
        error, allowed = ((g[key].double() - exact).norm().item() for g in (ours, theirs))
        assert error <= 1.05 * allowed, f"{key}: {error / allowed:.2f} times"


@pytest.mark.usefixtures("products_of_halves")
def test_infinite_products() -> None:
    """A gradient that a half cannot hold is infinite, not NaN."""
    h = torch.full((4, 2), 3e4, dtype=torch.float16, requires_grad=True)
    w = torch.zeros(600, 2, dtype=torch.float16, requires_grad=True)
    y = torch.zeros(4, dtype=torch.int64)
    fastdiv.linear_cross_entropy(h, w, y, reduction="sum").backward()
    assert w.grad is not None
    assert w.grad[0].tolist() == [-torch.inf] * 2 and w.grad[1:].isfinite().all()


def test_the_weight_gradient_of_halves_is_summed_in_float32() -> None:
    """Each chunk adds less than half an ulp of what is there: a sum of halves would not move."""
    rows = 4096
    h = torch.ones(rows, 1, dtype=torch.bfloat16)
    w = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    y = torch.zeros(rows, dtype=torch.int64)
    fastdiv.linear_cross_entropy(h, w, y, reduction="sum", chunk_size=1).backward()
    assert w.grad is not None
    assert w.grad.flatten().tolist() == [-rows / 2, rows / 2]


def test_a_torch_without_the_private_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves are then converted, which is right on every processor."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_fp16_supported"):
        monkeypatch.delattr(torch.cpu, name)
    for half in (torch.bfloat16, torch.float16):
        x = torch.empty(0, dtype=half, device="cpu")
        assert product_dtype(x) == torch.float32
