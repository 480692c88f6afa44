"""Masks of classes: the bits of a masked copy, for every loss, form of mask, dtype and stride."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastdiv
from helpers.cases import DTYPES, Case, make_inputs
from helpers.masks import MASKED, bits_of, found, found_of_copy, make_mask, masked_copy
from helpers.values import same, value_and_gradients

EVERY_CASE = pytest.mark.parametrize("case", MASKED, ids=str)
INF = float("inf")
KINDS = [
    next(c for c in MASKED if str(c) == name)
    for name in ("cross_entropy-labels", "cross_entropy-probs", "kl_div-logits", "entropy-none")
]


def equal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True)


def inputs(case: Case, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Any]:
    x, t = make_inputs(shape, dtype)
    return x, case.make_target(x, t)


@EVERY_CASE
def test_bits_of_a_masked_copy(case: Case, isa: str) -> None:
    """A byte or a bit for each class, of each row or of all, at any stride."""
    for dtype, shape in ((DTYPES[0], (2, 1029)), *((d, (4, 69)) for d in DTYPES)):
        x, t = inputs(case, shape, dtype)
        mask = make_mask(shape)
        expected = found_of_copy(case, x, t, mask, **case.per_row)
        apart = torch.cat([mask, ~mask], -1)[:, : shape[1]]
        for form in (mask, bits_of(mask), apart, mask.t().contiguous().t()):
            equal(found(case, x, t, class_mask=form, **case.per_row), expected)
        row = make_mask(shape[1:], seed=1)
        expected = found_of_copy(case, x, t, row, **case.per_row)
        for form in (row, row[None], bits_of(row), row.repeat_interleave(2)[::2]):
            equal(found(case, x, t, class_mask=form, **case.per_row), expected)


@EVERY_CASE
def test_reductions(case: Case) -> None:
    x, t = inputs(case, (5, 37), torch.float32)
    mask = make_mask((5, 37))
    if case.target == "labels":
        mask.scatter_(-1, t.unsqueeze(-1), True)  # type: ignore[union-attr]
    for reduction in ("sum", "mean", "batchmean") if case.per_row else ():
        equal(
            found(case, x, t, class_mask=mask, reduction=reduction),
            found_of_copy(case, x, t, mask, reduction=reduction),
        )
    if case.divergence and case.name != "renyi_div":
        copy = masked_copy(case, x, t, mask)
        terms = [case.call(*copy, reduction="pointwise")]
        terms += [
            case.call(x, t, reduction="pointwise", class_mask=m) for m in (mask, bits_of(mask))
        ]
        same(terms[0].sum(), case.call(*copy, reduction="sum"), 1e-5)
        assert terms[0].equal(terms[1]) and terms[0].equal(terms[2])
        assert terms[0][~mask].eq(0).all()


@pytest.mark.parametrize("case", KINDS, ids=str)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_dimensions(case: Case, dim: int) -> None:
    """The dimensions of a mask are those of the input; a single one is that of the classes."""
    shape = [3, 2, 4]
    shape[dim] = 21
    x, t = (
        v.movedim(-1, dim)
        for v in make_inputs((*shape[:dim], *shape[dim + 1 :], 21), torch.float32)
    )
    t = (
        t.argmax(dim)
        if case.target == "labels"
        else (t.softmax(dim) if case.target == "probs" else t)
    )
    t = None if case.target == "none" else t
    options: dict[str, Any] = {"dim": dim, **case.per_row}
    ones = [
        tuple(1 if i in missing else n for i, n in enumerate(shape))
        for missing in ((), (0,), (1,), (2,))
    ]
    for of_mask in (*ones, tuple(shape[1:]), (21,)):
        mask = torch.rand(of_mask) > 0.4
        whole = mask.reshape(-1, *[1] * (2 - dim)) if of_mask == (21,) else mask
        whole = whole.expand(shape)
        equal(
            found(case, x, t, class_mask=mask, **options),
            found_of_copy(case, x, t, whole, **options),
        )
    if dim == 2:
        for of_mask in ((3, 2, 21), (2, 21), (1, 1, 21), (21,)):
            mask = torch.rand(of_mask) > 0.4
            whole = mask.expand(shape)
            packed = found(case, x, t, class_mask=bits_of(mask), **options)
            equal(packed, found_of_copy(case, x, t, whole, **options))


@EVERY_CASE
def test_reference(case: Case) -> None:
    """Values of classes that are masked out reach nothing, nor do those of the teacher."""
    x, t = inputs(case, (6, 37), torch.float64)
    mask = make_mask((6, 37))
    x[~mask] = torch.tensor([torch.nan, INF, -INF, 1e300]).repeat(99)[: int((~mask).sum())].to(x)
    if case.soft:
        t = t.masked_fill(~mask, torch.nan)  # type: ignore[union-attr]
    native = found(case, x, t, class_mask=mask, **case.per_row)
    with fastdiv.backend("reference"):
        reference = found(case, x, t, class_mask=bits_of(mask), **case.per_row)
    for a, e in zip(native, reference, strict=True):
        same(a, e, 1e-9)
    for gradient in native[1:]:
        assert gradient.isfinite().all() and gradient[~mask].eq(0).all()


@pytest.mark.parametrize("backend", ["native", "reference"], indirect=True)
@EVERY_CASE
def test_no_class_at_all(case: Case, backend: str) -> None:
    """The row is NaN, unless its target has no mass either; its gradient is 0."""
    x, t = inputs(case, (3, 37), torch.float32)
    mask = make_mask((3, 37))
    mask[1] = False
    value, *gradients = found(case, x, t, class_mask=mask, **case.per_row)
    of_row = value[..., 1]
    expected = found_of_copy(case, x, t, mask, **case.per_row)[0]
    torch.testing.assert_close(of_row, expected[..., 1], equal_nan=True)
    assert case.target in ("probs", "log_probs") or of_row.isnan().all()
    assert all(g[1].eq(0).all() and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("backend", ["native", "reference"], indirect=True)
def test_labels_that_are_masked_out(backend: str) -> None:
    x, y = make_inputs((3, 9), torch.float32)[0], torch.tensor([2, 0, 8])
    mask = torch.ones(9, dtype=torch.bool).index_fill(0, torch.tensor([2, 8]), False)
    value, dx = value_and_gradients(
        lambda x: fastdiv.cross_entropy(x, y, class_mask=mask, reduction="none"), x
    )
    assert value.isinf().tolist() == [True, False, True] and (value > 0).all()
    q = x.masked_fill(~mask, -INF).softmax(-1)
    same(dx[0], q[0])  # what it would be, without the label
    assert fastdiv.log_prob(x, y, class_mask=mask).isneginf().tolist() == [True, False, True]
    both = fastdiv.log_prob_and_entropy(x, y, class_mask=mask)
    assert both[0].isneginf().tolist() == [True, False, True] and both[1].isfinite().all()
    kept = torch.tensor([1, 0, 3])
    smoothed = {"label_smoothing": 0.1, "class_mask": mask}
    assert fastdiv.cross_entropy(x, kept, **smoothed) == INF  # the masked classes have a share
    weighted = fastdiv.cross_entropy(x, kept, mask.to(x.dtype), **smoothed)
    few = fastdiv.cross_entropy(
        x[:, mask], torch.tensor([1, 0, 2]), label_smoothing=0.1, reduction="sum"
    )
    assert weighted.isfinite() and not weighted.isclose(few / 3)  # nor are shares given to others


def test_softcap() -> None:
    """The mask comes after the cap, which would make -inf finite."""
    x, y = make_inputs((4, 33), torch.float32)[0] * 9, torch.tensor([1, 2, 3, 4])
    mask = make_mask((4, 33))
    mask[:, 1:5] = True
    capped = (20 * torch.tanh(x / 20)).masked_fill(~mask, -INF)
    same(
        fastdiv.cross_entropy(x, y, softcap=20.0, class_mask=mask),
        fastdiv.cross_entropy(capped, y),
    )


@pytest.mark.parametrize("case", MASKED, ids=str)
def test_batch_invariance(case: Case) -> None:
    """The bits of a row do not depend on the rows and masks beside it."""
    x, t = inputs(case, (7, 1029), torch.float32)
    mask = make_mask((7, 1029))
    of_batch = found(case, x, t, class_mask=mask, **case.per_row)
    for form in (mask, bits_of(mask)):
        for i in range(7):
            own = slice(i, i + 1)
            alone = found(
                case, x[own], None if t is None else t[own], class_mask=form[own], **case.per_row
            )
            equal(alone, (of_batch[0][..., own], *(g[own] for g in of_batch[1:])))


def test_in_place() -> None:
    x, t = make_inputs((4, 33), torch.float32)
    mask = make_mask((4, 33))
    options: dict[str, Any] = {"target_type": "logits", "class_mask": mask}
    results = []
    for inplace in (False, True):
        leaf = x.clone().requires_grad_()
        logits = leaf * 1
        loss = fastdiv.kl_div(logits, t, inplace_backward=inplace, **options)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    equal(*results)
    bytes_of_logits = logits.detach().view(torch.uint8)[:, :5]
    with pytest.raises(ValueError, match="overwrite class_mask of shape"):
        fastdiv.kl_div(
            logits, t, target_type="logits", class_mask=bytes_of_logits, inplace_backward=True
        )


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_derivatives_and_transforms(case: Case) -> None:
    x, t = inputs(case, (2, 5), torch.float64)
    mask = make_mask((2, 5))
    if case.target == "labels":
        mask.scatter_(-1, t.unsqueeze(-1), True)  # type: ignore[union-attr]

    def loss(x: Tensor, t: Any = t, mask: Tensor = mask) -> Tensor:
        return case.call(x, t, class_mask=mask, **case.per_row)

    for form in (mask, bits_of(mask)):
        assert torch.autograd.gradgradcheck(lambda x: loss(x, mask=form), x.requires_grad_())  # noqa: B023
    assert torch.autograd.gradcheck(loss, x.requires_grad_(), check_forward_ad=True)
    x = x.detach()
    masks = torch.stack([mask, mask | (torch.rand(2, 5) > 0.5)])
    each = torch.stack([loss(x, mask=m) for m in masks])
    torch.testing.assert_close(torch.func.vmap(lambda m: loss(x, mask=m))(masks), each)
    batch = torch.stack([x, x + 1])
    each = torch.stack([loss(v) for v in batch])
    torch.testing.assert_close(torch.func.vmap(loss)(batch), each)


@pytest.mark.slow
def test_compiler() -> None:
    """One graph for all numbers of rows, and for a mask in either form another."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def loss(x: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        hard = fastdiv.cross_entropy(x, t.argmax(-1), class_mask=mask, reduction="none")
        return hard + fastdiv.js_div(x, t, target_type="logits", class_mask=mask, reduction="none")

    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    for rows in (3, 5, 8, 11, 4):
        x, t = make_inputs((rows, 37), torch.float32)
        for mask in (torch.ones(37, dtype=torch.bool), bits_of(make_mask((rows, 37)))):
            results = [value_and_gradients(f, x, t, mask) for f in (compiled, loss)]
            for a, e in zip(*results, strict=True):
                same(a, e)
    assert counter.frame_count <= 3  # not one for each number of rows


def test_trace_and_remembered_calls() -> None:
    x, t = make_inputs((4, 21), torch.float32)
    mask, other = make_mask((4, 21)), make_mask((4, 21), seed=3)

    def loss(x: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        return fastdiv.reverse_kl_div(x, t, target_type="logits", class_mask=mask)

    expected = [loss(*masked_copy(KINDS[2], x, t, m), torch.ones(21).bool()) for m in (mask, other)]
    for _ in range(2):  # the second time, the kind of call is known
        for form in (mask, bits_of(mask), mask[None], mask):
            assert loss(x, t, form.expand(4, -1) if form.dim() == 2 else form[0]) == expected[0]
        assert loss(x, t, other) == expected[1] == loss(x, t, bits_of(other))
    trace = torch.jit.trace(loss, (x, t, mask), check_trace=False)
    same(trace(x, t, other), expected[1])
    same(trace(x[:2], t[:2], other[:2]), loss(x[:2], t[:2], other[:2]))


def test_modules() -> None:
    x, t = make_inputs((4, 21), torch.float32)
    y, mask = t.argmax(-1), make_mask((4, 21))
    mask.scatter_(-1, y.unsqueeze(-1), True)
    nn, hard = fastdiv.nn, fastdiv.cross_entropy(x, y, class_mask=mask)
    assert nn.CrossEntropyLoss()(x, y, class_mask=mask) == hard
    entropy = fastdiv.entropy(x, class_mask=mask, reduction="mean")
    assert nn.EntropyLoss()(x, class_mask=mask) == entropy
    for name in ("KLDivLoss", "ReverseKLDivLoss", "JSDivLoss", "SkewKLDivLoss", "TVDistanceLoss"):
        module = getattr(nn, name)(target_type="logits")
        assert module(x, t, class_mask=mask) == module(*masked_copy(KINDS[2], x, t, mask)), name
    soft = fastdiv.kl_div(x, t, target_type="logits", class_mask=mask, reduction="mean")
    same(nn.DistillationLoss()(x, t, y, class_mask=mask), (hard + soft) / 2)


@pytest.mark.cpu_only("a mesh of one process")
@pytest.mark.usefixtures("gloo")
def test_dtensors_are_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    x = distribute_tensor(torch.randn(4, 5), init_device_mesh("cpu", (1,)), [Replicate()])
    with pytest.raises(TypeError, match="entropy does not support a Tensor as class_mask with DT"):
        fastdiv.entropy(x, class_mask=torch.ones(5, dtype=torch.bool))
    with pytest.raises(TypeError, match="as temperature with DTensors.* or pass a number"):
        fastdiv.entropy(x, temperature=torch.tensor(2.0))
    with pytest.raises(TypeError, match="log_prob does not support several classes in each row"):
        fastdiv.log_prob(x, torch.zeros(4, 2, dtype=torch.int64))
