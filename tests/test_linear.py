"""Linear losses equal loss(linear(...)): value, every gradient, options one by one and together."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastdiv
from helpers.cases import DTYPES, rand, randn
from helpers.linear_cases import OF_CLASSES, TARGETS, LinearCase, make_case, named_gradients

TOLERANCE = {  # of values, and of gradients in units of the largest
    torch.float64: (1e-12, 1e-11),
    torch.float32: (5e-6, 5e-5),
    torch.float16: (5e-6, 3e-3),
    torch.bfloat16: (5e-6, 2e-2),
}
EVERY_TARGET = pytest.mark.parametrize(("name", "target"), TARGETS)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def float32_products(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds of values are those of float32 logits; see the test of the other way."""
    monkeypatch.setattr("fastdiv._linear.tiles.multiplies", lambda half: False)


def assert_agree(case: LinearCase, upstream: Tensor | None = None) -> None:
    """Value and all gradients against the reference in float64."""
    dtype = case.leaves["input"].dtype
    of_values, of_gradients = TOLERANCE[dtype]
    with fastdiv.backend("native"):
        value, gradients = named_gradients(case.call, case.leaves, upstream)
    truth, expected = case.truth(upstream)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    size = float(truth[truth.isfinite()].abs().max()) if truth.isfinite().any() else 0.0
    torch.testing.assert_close(
        value.double(), truth, rtol=of_values, atol=of_values * (5 + size), equal_nan=True
    )
    for name, g in gradients.items():
        assert g.dtype == case.leaves[name].dtype and g.shape == case.leaves[name].shape
        largest = float(expected[name].abs().max()) if g.numel() else 0.0
        floor = torch.finfo(dtype).tiny if dtype.itemsize == 2 else 1e-7 * of_gradients
        atol = of_gradients * largest + floor
        overflows = expected[name].to(dtype).isinf() | g.isinf()
        error = torch.where(overflows, 0.0, (g.double() - expected[name]).abs())
        assert not g.isnan().any() and (error <= atol).all(), f"{name}: {error.max()} of {largest}"


@EVERY_TARGET
@EVERY_DTYPE
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_loss(name: str, target: str, dtype: torch.dtype, reduction: str) -> None:
    options = {} if name in OF_CLASSES else {"reduction": reduction}
    assert_agree(make_case(name, dtype=dtype, target=target, chunk_size=10, **options))


OPTIONS: list[dict[str, Any]] = [
    {"label_smoothing": 0.1},
    {"label_smoothing": 0.2, "smoothing": "others"},
    {"temperature": 2.5},
    {"softcap": 3.0},
    {"z_loss": 1e-2},
    {"weight": torch.linspace(0.5, 2, 300)},
    {"token_weight": (torch.arange(37) % 3).double()},
    {"reduction": "sum"},
    {"reduction": "batchmean"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(o))
@pytest.mark.parametrize("target", ["labels", "probs"])
def test_every_option(options: dict[str, Any], target: str) -> None:
    device = torch.get_default_device()
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    for reduction in ("mean", "none"):
        chosen = {"reduction": reduction, **options}
        assert_agree(make_case(target=target, chunk_size=16, **chosen))


# --- all options together -------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> LinearCase:
    name, target = draw(st.sampled_from(TARGETS))
    rows = tuple(draw(st.lists(st.integers(0, 7), min_size=0, max_size=3)))
    classes = draw(st.one_of(st.integers(2, 600), st.sampled_from([2, 7, 255, 256, 257, 513])))
    case = make_case(
        name,
        rows,
        hidden=draw(st.integers(1, 20)),
        classes=classes,
        dtype=draw(st.sampled_from(DTYPES)),
        target=target,
        bias=draw(st.booleans()),
        teacher_hidden=draw(st.integers(1, 20)),
        seed=draw(st.integers(0, 2**31)),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    options = case.options
    options["chunk_size"] = draw(st.one_of(st.none(), st.integers(1, 40)))
    if draw(st.booleans()):
        options["temperature"] = draw(st.floats(0.3, 4))
    if name not in OF_CLASSES:
        options["reduction"] = draw(st.sampled_from(["none", "sum", "mean", "batchmean"]))
        if draw(st.booleans()):
            weights = rand(rows, generator=generator)
            options["token_weight"] = torch.where(weights < 0.3, 0.0, weights)
    if name == "js_div":
        options["beta"] = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    if name == "cross_entropy":
        if draw(st.booleans()):
            options["softcap"] = draw(st.floats(2, 30))
        if draw(st.booleans()):
            options["z_loss"] = draw(st.floats(1e-4, 0.05))
        if draw(st.booleans()):
            options["weight"] = rand(classes, generator=generator) + 0.1
        options["label_smoothing"] = draw(st.sampled_from([0.0, 0.0, 0.1, 1.0]))
        options["smoothing"] = draw(st.sampled_from(["all", "others"]))
        if case.label is not None and draw(st.booleans()):
            ignored = draw(st.sampled_from([-100, 1, 2]))
            options["ignore_index"] = ignored
            drop = rand(rows, generator=generator) < draw(st.sampled_from([0.2, 0.7, 1.1]))
            case.label = torch.where(drop, ignored, case.label)
    return case


@given(problems())
@settings(max_examples=150, suppress_health_check=list(HealthCheck))
def test_options_in_combination(case: LinearCase) -> None:
    assert_agree(case)


# --- sums -----------------------------------------------------------------------------------------


# --- chunks and rows ------------------------------------------------------------------------------


@EVERY_TARGET
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_chunk_sizes_do_not_matter(name: str, target: str, reduction: str) -> None:
    options = {} if name in OF_CLASSES else {"reduction": reduction}
    case = make_case(name, (50,), target=target, dtype=torch.float64, **options)
    expected = named_gradients(case.call, case.leaves)
    for size in (1, 7, 49, 50, 51, 1000):
        case.options["chunk_size"] = size
        got = named_gradients(case.call, case.leaves)
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_do_not_count_may_hold_anything(reduction: str, dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype, reduction=reduction, chunk_size=5)
    assert case.label is not None
    case.label[[0, 7, 20]] = -100
    case.options["token_weight"] = torch.ones(37).index_fill_(0, torch.tensor([3, 36]), 0.0)
    expected = named_gradients(case.call, case.leaves)
    case.leaves["input"][[0, 3, 7, 20, 36]] = math.nan
    got = named_gradients(case.call, case.leaves)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert (got[1]["input"][[0, 3, 7, 20, 36]] == 0).all()


@pytest.mark.cpu_only("elsewhere labels are not read")
def test_rows_that_do_not_count_are_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    multiplied = []
    import fastdiv._linear.tiles as tiles

    plain = tiles.multiply
    monkeypatch.setattr(
        tiles, "multiply", lambda x, *a: (multiplied.append(len(x)), plain(x, *a))[1]
    )
    case = make_case(rows=(40,))
    assert case.label is not None
    case.label[10:] = -100
    case.call()
    assert sum(multiplied) == 10


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_row_counts(reduction: str) -> None:
    case = make_case(rows=(4,), reduction=reduction)
    case.label = torch.full((4,), -100)
    value, gradients = named_gradients(case.call, case.leaves)
    assert value.isnan().all() if reduction == "mean" else (value == 0).all()
    assert all((g == 0).all() for g in gradients.values())


def test_statistics() -> None:
    """From the same logits as the loss, of ignored rows too."""
    for dtype in DTYPES:
        case = make_case(rows=(3, 11), dtype=dtype, label_smoothing=0.1, chunk_size=4)
        assert case.label is not None
        case.label[1, 2] = -100
        leaves = {k: v.requires_grad_() for k, v in case.leaves.items()}
        h, w, b = leaves.values()
        loss, stats = fastdiv.linear_cross_entropy(
            h, w, case.label, linear_bias=b, return_stats=True, **case.options
        )
        x = F.linear(h.double(), w.double(), b.double()).detach()
        plain = {"label_smoothing": 0.1, "dim": -1}
        _, expected = fastdiv.cross_entropy(x, case.label, return_stats=True, **plain)
        for got, right in zip(stats, expected, strict=True):
            assert got.shape == (3, 11) and not got.requires_grad
            torch.testing.assert_close(got.to(right.dtype), right, rtol=1e-5, atol=1e-5)
        grads = torch.autograd.grad(loss, [h, w, b])
        again = torch.autograd.grad(case.call(leaves), [h, w, b])
        torch.testing.assert_close(grads, again, rtol=2e-2, atol=1e-5)


def test_strides_and_shapes() -> None:
    """Hidden states, weight and target as they come."""
    case = make_case("kl_div", (6, 5), target="hidden", dtype=torch.float64)
    expected = named_gradients(case.call, case.leaves)[0]
    strided = {
        k: v.movedim(0, -1).contiguous().movedim(-1, 0) if v.dim() > 1 else v
        for k, v in case.leaves.items()
    }
    torch.testing.assert_close(named_gradients(case.call, strided)[0], expected)
    one = make_case(rows=(), dtype=torch.float64, reduction="none")
    assert one.call().shape == ()
    assert_agree(one)


def test_more_than_one_block_of_classes() -> None:
    """The backward's tiles: two blocks of rows, several of classes, the last ones smaller."""
    for dtype in (torch.float32, torch.bfloat16):
        assert_agree(make_case(rows=(530,), classes=700, dtype=dtype, reduction="none"))


def test_random_numbers_are_left_alone() -> None:
    state = torch.get_rng_state()
    make_case().call()
    assert torch.equal(state, torch.get_rng_state()) and randn(1).shape == (1,)
