"""What the table of losses (cases.py) does not say of a teacher of k classes."""

from __future__ import annotations

import copy
import importlib
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import hypothesis
import mpmath
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import fastdiv
from fastdiv._losses import topk_rows
from helpers.cases import TARGET_TYPES, as_type, make_inputs
from helpers.values import same, uneven, value_and_gradients

INF, NAN = torch.inf, torch.nan
MISSING = ("ignore", "renormalize", "tail", "uniform")
FUNCTIONS = {
    "kl_div": fastdiv.topk_kl_div,
    "reverse_kl_div": fastdiv.topk_reverse_kl_div,
    "js_div": partial(fastdiv.topk_js_div, beta=0.3),
}
EVERY_KIND = pytest.mark.parametrize("kind", FUNCTIONS)
BACKENDS = pytest.mark.parametrize("backend", ["native", "reference"])
EVERY_TYPE = pytest.mark.parametrize("values_type", TARGET_TYPES)
EVERY_POLICY = pytest.mark.parametrize("missing", MISSING)
topk_kl_rows = partial(fastdiv.topk_kl_div, reduction="none")


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
@pytest.mark.parametrize("missing", ["ignore", "renormalize", "uniform"])
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


def plain_terms(kind: str, lq: Tensor, p: Tensor) -> Tensor:
    """The terms as one writes them, of classes that have mass on both sides."""
    q, lp = lq.exp(), p.log()
    if kind == "kl_div":
        return p * (lp - lq)
    if kind == "reverse_kl_div":
        return q * (lq - lp)
    log_m = (0.3 * p + 0.7 * q).log()
    return 0.3 * p * (lp - log_m) + 0.7 * q * (lq - log_m)


def reduced(rows: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    weight = torch.ones_like(rows) if weight is None else weight.to(rows.dtype)
    rows = rows * weight
    return {
        "none": lambda: rows,
        "sum": rows.sum,
        "mean": lambda: rows.sum() / weight.sum(),
        "batchmean": lambda: rows.sum() / len(rows),
    }[reduction]()


def log_tail(lq: Tensor, indices: Tensor) -> Tensor:
    """The log of the mass of all other classes."""
    return lq.scatter(-1, indices, -INF).logsumexp(-1, keepdim=True)


@BACKENDS
@EVERY_KIND
@EVERY_TYPE
@pytest.mark.parametrize("missing", ["ignore", "renormalize", "tail"])
@pytest.mark.parametrize("k", [1, 5, 39])
def test_values_and_gradients_are_those_of_the_plain_formula(
    backend: str, kind: str, values_type: str, missing: str, k: int
) -> None:
    """Of the sum over the k classes, with ``"tail"`` over one bucket more."""
    if (kind, values_type, missing) == ("reverse_kl_div", "logits", "tail"):
        return  # infinite: logits leave the teacher no mass elsewhere
    x, t = make_inputs((6, 40), torch.float64)
    values, indices = teacher(t, k, values_type)
    weight = torch.tensor([1.0, 2.0, 0.0, 0.5, 3.0, 1.0])
    for scale, w in ((1.0, None), (1.7, weight)):
        for reduction in ("none", "sum", "mean", "batchmean"):

            def ours(x: Tensor, v: Tensor, s: Any = scale, w: Any = w, r: Any = reduction) -> Any:
                options = {"values_type": values_type, "missing": missing, "reduction": r}
                with fastdiv.backend(backend):
                    return FUNCTIONS[kind](x, v, indices, **options, temperature=s, token_weight=w)

            def plain(x: Tensor, v: Tensor, s: Any = scale, w: Any = w, r: Any = reduction) -> Any:
                all_lq, p = (x / s).log_softmax(-1), probabilities(v, values_type, s)
                lq = all_lq.gather(-1, indices)
                if missing == "renormalize":
                    p = p / p.sum(-1, keepdim=True)
                rows = plain_terms(kind, lq, p).sum(-1)
                if missing == "tail":
                    tail = log_tail(all_lq, indices)
                    if values_type == "logits":  # of a bucket without mass, JS is the mixture's
                        rest = 0.7 * tail.exp() * -math.log(0.7) if kind == "js_div" else 0 * tail
                    else:
                        rest = plain_terms(kind, tail, 1 - p.sum(-1, keepdim=True))
                    rows = rows + rest.squeeze(-1)
                return reduced(rows, w, r)

            want = value_and_gradients(plain, x, values)
            for got, expected in zip(value_and_gradients(ours, x, values), want, strict=True):
                same(got, expected, 1e-9)


@EVERY_KIND
def test_tail_of_all_classes_is_the_sum_over_them(kind: str) -> None:
    x, t = make_inputs((5, 9), torch.float64)
    order = torch.rand(5, 9).argsort(-1)
    got, want = (
        value_and_gradients(
            lambda x, t, m=missing: FUNCTIONS[kind](
                x, t.gather(-1, order), order, values_type="logits", missing=m, reduction="none"
            ),
            x,
            t,
        )
        for missing in ("tail", "ignore")
    )
    for a, b in zip(got, want, strict=True):
        same(a, b, 1e-12)


# --- next to zero ---


def exact(kind: str, x: list[float], v: list[Any], indices: list[int], kind_of_v: str) -> Any:
    """The divergence of the buckets with 60 digits, from the numbers that the loss reads."""
    mp = mpmath.mp
    logits = [mp.mpf(value) for value in x]
    total = mp.fsum(mp.exp(value) for value in logits)
    q = [mp.exp(logits[i]) / total for i in indices]
    p = [mp.exp(mp.mpf(value)) for value in v]
    q.append(mp.fsum(mp.exp(z) for i, z in enumerate(logits) if i not in indices) / total)
    if kind_of_v == "logits":
        p = [value / mp.fsum(p) for value in p]
        q.pop()  # the k are all classes
    else:
        p.append(1 - mp.fsum(p))
    beta = mp.mpf(0.3)
    m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    forward, backward = (
        mp.fsum(a * mp.log(a / b) for a, b in zip(left, right, strict=True))
        for left, right in ((p, q), (q, p))
    )
    js = mp.fsum(
        beta * a * mp.log(a / c) + (1 - beta) * b * mp.log(b / c)
        for a, b, c in zip(p, q, m, strict=True)
    )
    return {"kl_div": forward, "reverse_kl_div": backward, "js_div": js}[kind]


@EVERY_KIND
@pytest.mark.parametrize("values_type", ["logits", "log_probs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epsilon", [1e-2, 1e-3, 1e-5])
def test_tail_next_to_zero(kind: str, values_type: str, dtype: torch.dtype, epsilon: float) -> None:
    """KL about 5e-7 for the middle one, where float32 formulas keep no digit.

    The log-sum-exp of float32 logits is rounded; an error of it counts once p and q differ less.
    """
    x, noise = (v.to(dtype) for v in make_inputs((3, 60), torch.float32, scale=1.0))
    t = x + epsilon * noise
    bound = 1e-6 if dtype is torch.float64 else 1.5e-7 / epsilon
    k = 60 if values_type == "logits" else 20
    values, indices = teacher(t.double(), k, values_type)
    values = values.float()
    options = {"values_type": values_type, "missing": "tail", "reduction": "none"}
    got = FUNCTIONS[kind](x, values, indices, **options)
    with mpmath.workdps(60):
        for r in range(3):
            rows = x[r].tolist(), values[r].tolist(), indices[r].tolist()
            want = exact(kind, *rows, values_type)
            assert abs(float(got[r].item() / want) - 1) <= bound, (got[r], want)


@EVERY_KIND
def test_a_tail_with_almost_no_mass(kind: str) -> None:
    """The others have 2**-20 of it, and 1e-6 in the student."""
    x = torch.tensor([[3.0, 2.5, -11.0, -12.0]])
    p, indices = torch.tensor([[0.625, 0.375 - 2**-20]]), torch.tensor([[0, 1]])
    got = FUNCTIONS[kind](x, p, indices, values_type="probs", missing="tail", reduction="none")
    with mpmath.workdps(60):
        log_p = [mpmath.log(value) for value in p[0].tolist()]
        want = exact(kind, x[0].tolist(), log_p, [0, 1], "log_probs")
        assert abs(float(got.item() / want) - 1) <= 1e-6


@st.composite
def buckets(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Student logits, teacher logits, and which classes are named."""
    classes = draw(st.integers(2, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(1, classes, generator=generator, device="cpu") * draw(
        st.sampled_from([0.1, 3.0, 20.0])
    )
    noise = torch.randn(1, classes, generator=generator, device="cpu")
    t = x + noise * draw(st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 30.0]))
    order = torch.randperm(classes, generator=generator, device="cpu")
    return x, t, order[: draw(st.integers(1, classes))].unsqueeze(0)


@pytest.mark.cpu_only("hypothesis draws on the CPU")
@EVERY_KIND
@hypothesis.settings(max_examples=150)
@hypothesis.given(problem=buckets())
def test_tail_is_a_divergence(kind: str, problem: tuple[Tensor, Tensor, Tensor]) -> None:
    """Never negative, 0 where the buckets are equal and nowhere else, the dense one's value."""
    x, t, indices = problem
    lq, lp = x.double().log_softmax(-1), t.double().log_softmax(-1)
    options = {"missing": "tail", "reduction": "none"}
    found = {
        "probs": FUNCTIONS[kind](x, lp.exp().gather(-1, indices).float(), indices,
                                 values_type="probs", **options),
        "log_probs": FUNCTIONS[kind](x, lp.gather(-1, indices), indices,
                                     values_type="log_probs", **options),
    }  # fmt: skip
    for value in found.values():
        assert (value >= 0).all()
    q, p = (torch.cat([v.gather(-1, indices), log_tail(v, indices)], -1).exp() for v in (lq, lp))
    others = x.shape[1] - indices.shape[1]
    if not others:
        q, p = q[:, :-1], p[:, :-1]
    if others and 1 - lp.exp().gather(-1, indices).sum() < 1e-6:
        return  # float32 may leave the teacher no rest, where reverse KL is infinite
    if torch.equal(x, t):
        assert (found["log_probs"] <= 1e-13).all() and (found["probs"] <= 1e-6).all()
    elif (q - p).abs().max() > 1e-7:
        assert (found["log_probs"] > 0).all()
    want = getattr(fastdiv, kind)(
        q.log(), p, target_type="probs", reduction="none", **({"beta": 0.3} if "js" in kind else {})
    )
    same(found["log_probs"], want, 1e-6)


# --- padding and indices ---


@BACKENDS
@EVERY_KIND
@EVERY_TYPE
@EVERY_POLICY
def test_padding_is_no_class(backend: str, kind: str, values_type: str, missing: str) -> None:
    if missing == "uniform" and kind != "kl_div":
        return
    x, t = make_inputs((4, 12), torch.float64)
    values, indices = teacher(t, 5, values_type)
    named = torch.tensor([0, 2, 3])  # where the five of a padded row go
    options = {"values_type": values_type, "missing": missing, "reduction": "none"}
    call = partial(FUNCTIONS[kind], **options)
    junk = torch.tensor([NAN, INF, -INF], dtype=torch.float64)
    wide = junk.repeat(4, 3)[:, :8]
    wide[:, :5] = values
    where = indices.new_full((4, 8), -1)
    where[:, :5] = indices
    wide[3, 5:8], where[3, 5:8] = wide[3, named], where[3, named]
    wide[3, named], where[3, named] = junk, -1
    want = value_and_gradients(lambda x, v: call(x, v, indices), x, values)
    with fastdiv.backend(backend):
        value, dx, dv = value_and_gradients(lambda x, v: call(x, v, where), x, wide)
    same(value, want[0], 1e-12)
    same(dx, want[1], 1e-12)
    assert (dv[where == -1] == 0).all()
    same(dv[:3, :5], want[2][:3], 1e-12)
    same(dv[3, 5:8], want[2][3, named], 1e-12)


@BACKENDS
@EVERY_KIND
@EVERY_TYPE
@pytest.mark.parametrize("missing", ["ignore", "renormalize", "tail"])
def test_a_row_of_padding_alone_is_zero(
    backend: str, kind: str, values_type: str, missing: str
) -> None:
    x, values = torch.randn(2, 7), torch.full((2, 3), NAN)
    indices = torch.full((2, 3), -1)
    with fastdiv.backend(backend):
        results = value_and_gradients(
            lambda x, v: FUNCTIONS[kind](
                x, v, indices, values_type=values_type, missing=missing, reduction="none"
            ),
            x,
            values,
        )
    for result in results:
        assert (result.abs() <= 1e-15).all()


def test_indices_reach_the_op_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def record(loss: Any, x: Tensor, indices: Tensor, *others: Any) -> Tensor:
        seen.append(indices)
        return topk_rows.named_of_logits(loss, x, indices, *others)

    monkeypatch.setattr(importlib.import_module("fastdiv._losses.topk"), "named_of_logits", record)
    x, t = make_inputs((3, 30), torch.float32)
    values, indices = t.log_softmax(-1).topk(4)
    want = topk_kl_rows(x, values, indices, values_type="log_probs")
    for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8):
        given = indices.to(dtype)
        got = topk_kl_rows(x, values, given, values_type="log_probs")
        assert got.equal(want)
        assert seen[-1].dtype == dtype and seen[-1].data_ptr() == given.data_ptr()
    x, values = torch.randn(1, 256), torch.zeros(1, 1)
    last = torch.tensor([[255]], dtype=torch.uint8)  # not padding
    same(topk_kl_rows(x, values, last, values_type="log_probs"), -x.log_softmax(-1)[:, 255])


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
    call = partial(topk_kl_rows, values_type="probs", missing="uniform")
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
            lambda x, p: topk_kl_rows(x, p, indices, values_type="probs", missing=missing), x, p
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
            lambda x, p: topk_kl_rows(x, p, indices, values_type="probs", missing=missing), x, p
        )
    assert value[0] == INF if missing == "uniform" else value[0].isfinite()
    assert dx.isfinite().all() and dp.isfinite().all()
    assert dx[0, 8] == pytest.approx(-0.25 / 6 if missing == "uniform" else 0)


@BACKENDS
@pytest.mark.parametrize("missing", ["ignore", "renormalize", "tail"])
def test_student_mass_where_the_teacher_has_none(backend: str, missing: str) -> None:
    x, _ = make_inputs((2, 9), torch.float64)
    x[1, 7] = -INF  # so that the second row agrees
    indices = torch.tensor([[4, 2, 7]]).expand(2, 3)
    p = torch.tensor([[0.5, 0.25, 0.0]], dtype=torch.float64).repeat(2, 1)
    for kind, infinite in (("reverse_kl_div", True), ("js_div", False)):
        with fastdiv.backend(backend):
            value, *gradients = value_and_gradients(
                lambda x, p, k=kind: FUNCTIONS[k](
                    x, p, indices, values_type="probs", missing=missing, reduction="none"
                ),
                x,
                p,
            )
        assert (value == INF).tolist() == [infinite, False] and not value.isnan().any()
        for gradient in gradients:
            assert gradient.isfinite().all()


@BACKENDS
@EVERY_TYPE
@EVERY_POLICY
def test_rows_that_do_not_count_may_hold_anything(
    backend: str, values_type: str, missing: str
) -> None:
    x, t = make_inputs((4, 11), torch.float32)
    values, indices = teacher(t, 3, values_type)
    weight = torch.tensor([1.0, 0.0, 0.0, 2.0])
    call = partial(topk_kl_rows, values_type=values_type, missing=missing)
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
        call = partial(topk_kl_rows, x, values, indices, values_type=values_type)
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
    ({"indices": V}, TypeError, "indices|int16|float32"),
    ({"values_type": "softmax"}, ValueError, "values_type|'softmax'|log_probs"),
    ({"missing": "uniform", "function": "js_div"}, ValueError, "missing|topk_js_div|tail|dense"),
    ({"missing": "uniform", "function": "reverse_kl_div"}, ValueError, "reverse|tail|dense"),
    ({"missing": "spread", "function": "js_div"}, ValueError, "missing|'spread'|tail"),
    ({"missing": "spread"}, ValueError, "missing|'spread'|tail|uniform"),
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
    ({"indices": with_row(2, [-2, 0])}, IndexError, "indices|-2|row 2|5 classes|-1 is padding"),
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
    function = FUNCTIONS[arguments.pop("function", "kl_div")]
    with fastdiv.backend(backend), pytest.raises(raises) as error:
        function(**arguments)
    missing = [word for word in says.split("|") if word not in str(error.value)]
    assert error.type is raises and not missing, f"{missing} not in {error.value}"


@pytest.mark.parametrize("inside", ["vmap", "compile"])
@BACKENDS
def test_wrong_rows_where_python_may_read_no_value(inside: str, backend: str) -> None:
    """A kernel of a CPU raises.  Elsewhere the row is NaN."""
    x, t = make_inputs((4, 6), torch.float32)
    values, indices = teacher(t, 3, "log_probs")
    indices[1, 2], indices[2, 0] = 6, indices[2, 1]
    token_weight = torch.tensor([1.0, 1.0, 1.0, 0.0])
    indices[3] = -7  # does not count

    def rows(x: Tensor, v: Tensor, w: Tensor) -> Tensor:
        return topk_kl_rows(
            x, v, indices, values_type="log_probs", token_weight=w, missing="uniform"
        )

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
            with pytest.raises(IndexError, match="indices has 6 in row 1, out of range"):
                function(x, values)
            return
        value, dx, dv = value_and_gradients(function, x, values)
    assert value.isnan().tolist() == [False, True, True, False] and value[3] == 0
    for d in (dx, dv):
        assert d[0].isfinite().all() and d[1:3].isnan().all() and (d[3] == 0).all()


# --- how it runs ---


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
                lambda x, v: topk_kl_rows(
                    x, v, indices, values_type="log_probs", missing="uniform"
                ),
                x,
                values,
            )
        )
    for one in found[1:]:
        assert all(a.equal(b) for a, b in zip(one, found[0], strict=True))


def test_dtypes_of_values_and_indices_and_dim() -> None:
    x, t = make_inputs((2, 30, 3), torch.float32)
    values, indices = t.log_softmax(1).topk(4, 1)
    want = topk_kl_rows(x, values, indices, values_type="log_probs", dim=1)
    assert want.shape == (2, 3)
    rows = [v.movedim(1, -1).reshape(6, -1) for v in (x, values, indices)]
    assert topk_kl_rows(*rows, values_type="log_probs").view(2, 3).equal(want)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert topk_kl_rows(x, values, indices.to(dtype), values_type="log_probs", dim=1).equal(
            want
        )
    for dtype in (torch.float64, torch.bfloat16):
        v = values.to(dtype).requires_grad_()
        value = topk_kl_rows(x, v, indices, values_type="log_probs", dim=1)
        (dv,) = torch.autograd.grad(value.sum(), v)
        assert value.dtype == torch.float32 and dv.dtype == dtype
        same(value, want, 1e-6 if dtype == torch.float64 else 2e-2)


@pytest.mark.parametrize("reduction", ["none", "mean", "batchmean"])
@pytest.mark.parametrize(
    ("name", "function", "own"),
    [
        *(("TopKKLDivLoss", fastdiv.topk_kl_div, {"missing": missing}) for missing in MISSING),
        ("TopKReverseKLDivLoss", fastdiv.topk_reverse_kl_div, {"missing": "renormalize"}),
        ("TopKJSDivLoss", fastdiv.topk_js_div, {"missing": "tail", "beta": 0.2}),
    ],
)
def test_module(name: str, function: Any, own: dict[str, Any], reduction: str) -> None:
    x, t = make_inputs((4, 9), torch.float32)
    values, indices = teacher(t, 3, "logits")
    kind = getattr(fastdiv.nn, name)
    options: dict[str, Any] = {"values_type": "logits", "reduction": reduction, **own}
    module = kind(**options, temperature=2.0)
    expected = function(x, values, indices, temperature=2.0, **options)
    for m in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert m(x, values, indices).equal(expected)
        assert repr(m).startswith(f"{name}(")
        assert all(f"{key}={value!r}" in repr(m) for key, value in options.items())
    squared = kind(**options, temperature=2.0, scale_by_temperature=True)
    same(squared(x, values, indices), 4 * expected)
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5])
    weighted = function(x, values, indices, temperature=2.0, token_weight=weight, **options)
    assert module(x, values, indices, token_weight=weight).equal(weighted)
