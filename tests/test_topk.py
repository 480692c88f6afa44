"""topk_kl_div: what the table of losses (cases.py) does not say of a teacher of k classes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiv
from fastdiv import reference
from fastdiv._engine import ops
from fastdiv.reference import Spec
from helpers.cases import TARGET_TYPES, as_type, make_inputs
from helpers.values import same, uneven, value_and_gradients

INF, NAN = torch.inf, torch.nan
MISSING = ("ignore", "renormalize", "uniform")
BACKENDS = pytest.mark.parametrize("backend", ["native", "reference"])
EVERY_TYPE = pytest.mark.parametrize("values_type", TARGET_TYPES)
EVERY_POLICY = pytest.mark.parametrize("missing", MISSING)
topk_rows = partial(fastdiv.topk_kl_div, reduction="none")


def teacher(t: Tensor, k: int, values_type: str) -> tuple[Tensor, Tensor]:
    """The k largest entries of teacher logits, in a random order."""
    values, indices = as_type(t, values_type).topk(k)
    order = torch.randperm(k)
    return values[:, order], indices[:, order]


def dense(p: Tensor, indices: Tensor, classes: int, missing: str) -> Tensor:
    """The probabilities of all classes that a policy stands for."""
    if missing == "renormalize":
        p = p / p.sum(-1, keepdim=True)
    others, full = classes - p.shape[-1], p.new_zeros(len(p), classes)
    if missing == "uniform" and others:
        full = full + (1 - p.sum(-1, keepdim=True)).clamp(min=0) / others
    return full.scatter(-1, indices, p)


def probabilities(values: Tensor, values_type: str, temperature: float = 1.0) -> Tensor:
    if values_type == "logits":
        return (values / temperature).softmax(-1)
    return values.exp() if values_type == "log_probs" else values


# --- what it is: kl_div of the dense teacher ---


@BACKENDS
@EVERY_TYPE
@EVERY_POLICY
@pytest.mark.parametrize("k", [1, 5, 21, 39, 40])
def test_is_kl_div_of_the_dense_teacher(
    backend: str, values_type: str, missing: str, k: int
) -> None:
    x, t = make_inputs((6, 40), torch.float64)
    x[1, 3] = t[1, 3] = -INF  # no mass on either side, but for "uniform": +inf there
    values, indices = teacher(t, k, values_type)
    weight = torch.tensor([1.0, 2.0, 0.0, 0.5, 3.0, 1.0])
    for options in ({}, {"token_weight": weight, "temperature": 1.7}):
        for reduction in ("none", "sum", "mean", "batchmean"):

            def ours(x: Tensor, v: Tensor, o: Any = options, r: str = reduction) -> Tensor:
                with fastdiv.backend(backend):
                    return fastdiv.topk_kl_div(
                        x, v, indices, values_type=values_type, missing=missing, reduction=r, **o
                    )

            def plain(x: Tensor, v: Tensor, o: Any = options, r: str = reduction) -> Tensor:
                p = probabilities(v, values_type, o.get("temperature", 1.0))
                # Where the softmax of k logits leaves no mass, no rounding of it is spread.
                policy = "ignore" if values_type == "logits" else missing
                p = dense(p, indices, 40, policy)
                return fastdiv.kl_div(x, p, target_type="probs", reduction=r, **o)

            value, dx, dv = value_and_gradients(ours, x, values)
            want = value_and_gradients(plain, x, values)
            same(value, want[0], 1e-10)
            same(dx, want[1], 1e-10)
            # Of an infinite term the mass is a constant, and all that is spread is one term; a
            # probability of 0 gets no gradient, through the sum it is divided by neither.
            skipped = want[2].new_zeros(want[2].shape, dtype=torch.bool)
            skipped[1] = missing == "uniform" and values_type != "logits"
            skipped |= (values == 0) & (values_type == "probs")
            # (What 39 classes leave is known to the digits of a difference from 1.)
            same(dv[~skipped], want[2][~skipped], 1e-8 if missing == "uniform" else 1e-10)
            assert dv.isfinite().all()


def test_a_full_teacher_is_kl_div(isa: str) -> None:
    x, t = make_inputs((5, 700), torch.float32)
    order = torch.rand(5, 700).argsort(-1)
    for missing in MISSING:
        got = value_and_gradients(
            lambda x, t, m=missing: fastdiv.topk_kl_div(
                x, t.gather(-1, order), order, values_type="logits", missing=m, temperature=2.0
            ),
            x,
            t,
        )
        want = value_and_gradients(
            lambda x, t: fastdiv.kl_div(x, t, target_type="logits", temperature=2.0), x, t
        )
        for a, b in zip(got, want, strict=True):
            same(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("k", [1, 64, 600, 1020])
def test_accuracy_of_large_rows(dtype: torch.dtype, k: int, isa: str) -> None:
    """Against float64, where the sum over the others is long, and where it is a small rest."""
    x, t = make_inputs((9, 1021), dtype)
    values, indices = teacher(t.double(), k, "probs")
    values = (values * 0.9).float()
    call = partial(topk_rows, values_type="probs", missing="uniform")
    got = value_and_gradients(lambda x, v: call(x, v, indices), x, values, upstream=uneven)
    with fastdiv.backend("reference"):
        want = value_and_gradients(
            lambda x, v: call(x, v, indices), x.double(), values.double(), upstream=uneven
        )
    assert (got[0].dtype, got[1].dtype, got[2].dtype) == (torch.float32, dtype, torch.float32)
    same(got[0].double(), want[0], 1e-6)
    same(got[2].double(), want[2], 1e-5)
    # One rounding to the dtype of the logits, and the float32's before it.
    error = (got[1].double() - want[1]).abs()
    half = dtype != torch.float32
    unit = torch.finfo(dtype).eps * (0.51 if half else 8)
    assert (error <= unit * want[1].abs() + 2e-8 + half * torch.finfo(dtype).tiny).all()


# --- edges ---


@BACKENDS
@EVERY_POLICY
def test_probabilities_of_zero_and_classes_at_minus_infinity(backend: str, missing: str) -> None:
    x, _ = make_inputs((4, 9), torch.float32)
    indices = torch.tensor([[4, 2, 7]]).expand(4, 3)
    p = torch.tensor([[0.5, 0.0, 0.25]]).repeat(4, 1)
    p[3] = torch.tensor([0.5, 0.25, 0.25])  # nothing is left over
    x[1, 2] = -INF  # where p is 0
    x[2, 4] = -INF  # where p is not
    x[3, 0] = -INF  # elsewhere
    with fastdiv.backend(backend):
        value, dx, dp = value_and_gradients(
            lambda x, p: topk_rows(x, p, indices, values_type="probs", missing=missing), x, p
        )
    assert value.isfinite().tolist() == [True, True, False, True] and value[2] == INF
    assert dx.isfinite().all() and dp.isfinite().all() and (dp[p == 0] == 0).all()
    # An infinite term is a constant: its mass gets no gradient from it, the student's does.
    if missing == "ignore":
        assert dp[2, 0] == 0
    assert dx[2, 4] == (-0.5 if missing != "renormalize" else pytest.approx(-2 / 3))
    # What is left over, and a class outside of the k that cannot take it.
    x[0, 8] = -INF
    with fastdiv.backend(backend):
        value, dx, dp = value_and_gradients(
            lambda x, p: topk_rows(x, p, indices, values_type="probs", missing=missing), x, p
        )
    assert value[0] == INF if missing == "uniform" else value[0].isfinite()
    assert dx.isfinite().all() and dp.isfinite().all()
    assert dx[0, 8] == pytest.approx(-0.25 / 6 if missing == "uniform" else 0)


@BACKENDS
@EVERY_TYPE
@EVERY_POLICY
def test_rows_that_do_not_count_may_hold_anything(
    backend: str, values_type: str, missing: str
) -> None:
    x, t = make_inputs((4, 11), torch.float32)
    values, indices = teacher(t, 3, values_type)
    weight = torch.tensor([1.0, 0.0, 0.0, 2.0])
    call = partial(topk_rows, values_type=values_type, missing=missing)
    live = weight != 0
    want = value_and_gradients(
        lambda x, v: call(x, v, indices[live], token_weight=weight[live]), x[live], values[live]
    )
    x[1], values[1], indices[1] = NAN, INF, -1
    x[2], values[2], indices[2] = -INF, NAN, 10**9
    with fastdiv.backend(backend):
        got = value_and_gradients(lambda x, v: call(x, v, indices, token_weight=weight), x, values)
    for a, b in zip(got, want, strict=True):
        assert (a[~live] == 0).all()
        same(a[live], b)


def test_a_teacher_without_mass() -> None:
    x, indices = torch.randn(2, 5), torch.tensor([[0, 1], [3, 2]])
    for values_type, values in (
        ("probs", torch.zeros(2, 2)),
        ("log_probs", torch.full((2, 2), -INF)),
    ):
        call = partial(topk_rows, x, values, indices, values_type=values_type)
        assert (call() == 0).all() and call(missing="renormalize").isnan().all()
        lq = x.log_softmax(-1)
        mean = (lq.sum(-1) - lq.gather(-1, indices).sum(-1)) / 3
        same(call(missing="uniform"), -torch.tensor(3.0).log() - mean)


# --- bad input ---

X = torch.zeros(3, 5)
V, INDICES = torch.full((3, 2), 0.25), torch.tensor([[0, 1], [4, 2], [3, 0]])
LEAF = X.clone().requires_grad_()


def with_row(r: int, row: list[int]) -> Tensor:
    indices = INDICES.clone()
    indices[r] = torch.tensor(row)
    return indices


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input": [0.0]}, TypeError, "input|Tensor|list"),
    ({"values": [0.0]}, TypeError, "values|Tensor|list"),
    ({"values": INDICES}, TypeError, "values|int64"),
    ({"indices": [[0]]}, TypeError, "indices|Tensor|list"),
    ({"indices": V}, TypeError, "indices|int64|float32"),
    ({"values_type": "softmax"}, ValueError, "values_type|'softmax'|log_probs"),
    ({"missing": "spread"}, ValueError, "missing|'spread'|renormalize"),
    ({"reduction": "pointwise"}, ValueError, "pointwise|topk_kl_div|batchmean"),
    ({"reduction": "average"}, ValueError, "reduction|'average'"),
    ({"temperature": 0.0}, ValueError, "temperature|positive|0.0"),
    ({"dim": 2}, IndexError, "dim|2|(3, 5)"),
    ({"values": V[:2], "indices": INDICES[:2]}, ValueError, "values|(3, 5)|dim 1|(2, 2)"),
    ({"values": V[0], "indices": INDICES[0]}, ValueError, "values|(3, 5)|(2,)"),
    ({"values": V[:, :0], "indices": INDICES[:, :0]}, ValueError, "(3, 0)|0 classes|between 1|5"),
    ({"values": torch.zeros(3, 6)}, ValueError, "(3, 6)|6 classes|5"),
    ({"indices": INDICES[:, :1]}, ValueError, "indices|(3, 2)|(3, 1)"),
    ({"indices": with_row(1, [0, 5])}, IndexError, "indices|5|row 1|5 classes"),
    ({"indices": with_row(2, [-1, 0])}, IndexError, "indices|-1|row 2|5 classes"),
    ({"indices": with_row(2, [3, 3])}, ValueError, "indices|3|twice|row 2"),
    ({"indices": INDICES.to("meta")}, RuntimeError, "indices|meta"),
    ({"values": V.to("meta")}, RuntimeError, "values|meta"),
    ({"token_weight": torch.ones(4)}, ValueError, "token_weight|(3,)|(4,)"),
    ({"input": LEAF, "inplace_backward": True}, ValueError, "inplace_backward"),
]


@BACKENDS
@pytest.mark.parametrize(
    ("given", "raises", "says"), BAD, ids=[f"{e.__name__}-{s}" for _, e, s in BAD]
)
def test_bad_input(
    backend: str,
    given: dict[str, Any],
    raises: type[Exception],
    says: str,
    checked_labels: None,
) -> None:
    arguments = {"input": X, "values": V, "indices": INDICES, "values_type": "probs", **given}
    with fastdiv.backend(backend), pytest.raises(raises) as error:
        fastdiv.topk_kl_div(**arguments)
    missing = [word for word in says.split("|") if word not in str(error.value)]
    assert error.type is raises and not missing, f"{missing} not in {error.value}"


@pytest.mark.parametrize("inside", ["vmap", "compile"])
@BACKENDS
def test_wrong_rows_where_python_may_read_no_value(inside: str, backend: str) -> None:
    """The kernel raises, as it does elsewhere; the reference's rows are NaN."""
    x, t = make_inputs((4, 6), torch.float32)
    values, indices = teacher(t, 3, "log_probs")
    indices[1, 2], indices[2, 0] = 6, indices[2, 1]
    token_weight = torch.tensor([1.0, 1.0, 1.0, 0.0])
    indices[3] = -7

    def rows(x: Tensor, v: Tensor, w: Tensor) -> Tensor:
        return topk_rows(x, v, indices, values_type="log_probs", token_weight=w, missing="uniform")

    if inside == "vmap":
        batched = torch.func.vmap(rows)
        function: Callable[..., Tensor] = lambda x, v: batched(  # noqa: E731
            x[None], v[None], token_weight[None]
        )[0]
    else:
        compiled = torch.compile(rows, backend="aot_eager", fullgraph=True)
        function = lambda x, v: compiled(x, v, token_weight)  # noqa: E731
    with fastdiv.backend(backend):
        if backend == "native" and x.is_cpu:
            with pytest.raises(IndexError, match="indices has 6 in row 1, out of range for 6"):
                function(x, values)
            return
        value, dx, dv = value_and_gradients(function, x, values)
    assert value.isnan().tolist() == [False, True, True, False] and value[3] == 0
    for d in (dx, dv):
        assert d[0].isfinite().all() and d[1:3].isnan().all() and (d[3] == 0).all()


# --- how it runs ---


def test_both_directions_in_one_op_have_the_bits_of_two(isa: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x, t = make_inputs((4, 8193), dtype)
        x[2, 5] = -INF
        weight = torch.tensor([1.0, 0.5, 2.0, 0.0], dtype=reference.value_dtype(dtype))
        for k in (3, 5000):
            values, indices = teacher(t, k, "log_probs")
            for loss in reference.TOPK:
                options = ops.options(Spec(loss, target_type="log_probs", scale=0.5))
                rows = (values, indices, None, weight)
                value, record, total = ops.forward(x, *rows, *options)
                grad = torch.randn_like(value)
                dx, dv = ops.backward(grad, x, *rows, record, total, *options, True, True)
                over = x.clone()
                again, dv_again = ops.forward_grad(grad, over, *rows, *options, True)
                assert again.equal(value) and over.equal(dx) and dv_again.equal(dv)
                no_dx, dv_alone = ops.backward(grad, x, *rows, record, total, *options, False, True)
                assert no_dx.numel() == 0 and dv_alone.equal(dv)


@EVERY_POLICY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_place_gradient_is_the_logits_memory(missing: str, dtype: torch.dtype) -> None:
    x, t = make_inputs((3, 50), dtype)
    values, indices = teacher(t.double(), 4, "log_probs")
    leaf = x.requires_grad_()
    call = partial(
        fastdiv.topk_kl_div,
        values=values,
        indices=indices,
        values_type="log_probs",
        missing=missing,
    )
    (want,) = torch.autograd.grad(call(leaf * 1), leaf)
    logits = leaf * 1
    version = logits._version
    (got,) = torch.autograd.grad(call(logits, inplace_backward=True), logits)
    assert got.data_ptr() == logits.data_ptr() and logits._version > version and got.equal(want)


def test_one_long_row_has_the_same_bits_for_any_number_of_threads() -> None:
    """Of k entries that torch would sum by threads."""
    x, t = make_inputs((1, 100_000), torch.float32)
    values, indices = teacher(t, 40_000, "log_probs")
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(
            value_and_gradients(
                lambda x, v: topk_rows(x, v, indices, values_type="log_probs", missing="uniform"),
                x,
                values,
            )
        )
    for one in found[1:]:
        assert all(a.equal(b) for a, b in zip(one, found[0], strict=True))


def test_dtypes_of_values_and_indices_and_dim() -> None:
    x, t = make_inputs((2, 30, 3), torch.float32)
    values, indices = t.log_softmax(1).topk(4, 1)
    want = topk_rows(x, values, indices, values_type="log_probs", dim=1)
    assert want.shape == (2, 3)
    rows = [v.movedim(1, -1).reshape(6, -1) for v in (x, values, indices)]
    assert topk_rows(*rows, values_type="log_probs").view(2, 3).equal(want)
    for dtype in (torch.int32, torch.uint8):
        assert topk_rows(x, values, indices.to(dtype), values_type="log_probs", dim=1).equal(want)
    for dtype in (torch.float64, torch.bfloat16):
        v = values.to(dtype).requires_grad_()
        value = topk_rows(x, v, indices, values_type="log_probs", dim=1)
        (dv,) = torch.autograd.grad(value.sum(), v)
        assert value.dtype == torch.float32 and dv.dtype == dtype
        same(value, want, 1e-6 if dtype == torch.float64 else 2e-2)


@pytest.mark.parametrize("reduction", ["none", "mean", "batchmean"])
@EVERY_POLICY
def test_module(missing: str, reduction: str) -> None:
    x, t = make_inputs((4, 9), torch.float32)
    values, indices = teacher(t, 3, "logits")
    options: dict[str, Any] = {"values_type": "logits", "missing": missing, "reduction": reduction}
    module = fastdiv.nn.TopKKLDivLoss(**options, temperature=2.0)
    expected = fastdiv.topk_kl_div(x, values, indices, temperature=2.0, **options)
    for m in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert m(x, values, indices).equal(expected)
        assert repr(m).startswith("TopKKLDivLoss(") and missing in repr(m)
    squared = fastdiv.nn.TopKKLDivLoss(**options, temperature=2.0, scale_by_temperature=True)
    same(squared(x, values, indices), 4 * expected)
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5])
    weighted = fastdiv.topk_kl_div(
        x, values, indices, temperature=2.0, token_weight=weight, **options
    )
    assert module(x, values, indices, token_weight=weight).equal(weighted)
