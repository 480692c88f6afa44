"""token_weight="probability": each row is weighted by the probability of its label (DFT)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiv
from helpers.cases import DTYPES, make_inputs
from helpers.masks import make_mask
from helpers.values import same, value_and_gradients

OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1},
    {"label_smoothing": 0.1, "smoothing": "others"},
    {"z_loss": 1e-2},
    {"temperature": 2.5},
    {"softcap": 5.0},
]
EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS, ids=str)
LABELS = torch.tensor([3, 0, -100, 36, 7])


def weighted(x: Tensor, y: Tensor = LABELS, **options: Any) -> Tensor:
    return fastdiv.cross_entropy(x, y, token_weight="probability", **options)


def plain(x: Tensor, y: Tensor, weight: Tensor | None = None, **options: Any) -> Tensor:
    """The weights of a pass of their own."""
    kept = {k: v for k, v in options.items() if k in ("temperature", "softcap")}
    rows = fastdiv.cross_entropy(x, y, weight, reduction="none", **options)
    return rows * fastdiv.cross_entropy(x, y, reduction="none", **kept).neg().exp().detach()


@EVERY_OPTION
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows(options: dict[str, Any], dtype: torch.dtype, isa: str) -> None:
    x = make_inputs((5, 37), dtype)[0]
    tolerance = 1e-2 if dtype.itemsize == 2 else 2e-6
    results = [
        value_and_gradients(f, x)
        for f in (
            lambda x: weighted(x, reduction="none", **options),
            lambda x: plain(x.to(torch.promote_types(dtype, torch.float32)), LABELS, **options),
        )
    ]
    with fastdiv.backend("reference"):
        results.append(value_and_gradients(lambda x: weighted(x, reduction="none", **options), x))
    for found in zip(*results, strict=True):
        same(found[0], found[1], tolerance)
        same(found[0], found[2], tolerance)


def test_formula() -> None:
    x = make_inputs((5, 37), torch.float64)[0]
    q = x.softmax(-1).gather(-1, LABELS.clamp(0)[:, None]).squeeze(-1)
    rows = torch.where(LABELS == -100, 0, -q * q.log())
    same(weighted(x, reduction="none"), rows, 1e-12)
    same(weighted(x), rows.sum() / 4, 1e-12)  # as DFT divides: by the rows that count


def test_reductions() -> None:
    x, w = make_inputs((5, 37), torch.float64)[0], torch.rand(37, dtype=torch.float64) + 0.5
    rows = plain(x, LABELS, w)
    total = w[LABELS[LABELS >= 0]].sum()
    for reduction, expected in (("sum", rows.sum()), ("mean", rows.sum() / total)):
        found = fastdiv.cross_entropy(x, LABELS, w, token_weight="probability", reduction=reduction)
        same(found, expected, 1e-12)
    same(weighted(x, reduction="batchmean"), plain(x, LABELS).sum() / 5, 1e-12)


def test_derivatives_and_transforms() -> None:
    """The weight is a constant, in every derivative."""
    x = make_inputs((3, 7), torch.float64)[0]
    y = torch.tensor([1, 6, 0])

    def loss(x: Tensor) -> Tensor:
        return weighted(x, y, label_smoothing=0.1)

    def constant(x: Tensor) -> Tensor:
        p = x.softmax(-1).gather(-1, y[:, None]).squeeze(-1)
        return (F.cross_entropy(x, y, reduction="none", label_smoothing=0.1) * p.detach()).mean()

    both = loss, constant
    same(*(torch.func.grad(f)(x) for f in both), 1e-10)
    same(*(torch.func.hessian(f)(x) for f in both), 1e-10)
    batch = torch.stack([x, x + torch.randn(3, 7)])
    same(*(torch.func.vmap(f)(batch) for f in both), 1e-10)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    own = x.requires_grad_()
    same(torch.autograd.grad(compiled(own), own)[0], torch.autograd.grad(loss(own), own)[0], 1e-10)
    trace = torch.jit.trace(loss, x, check_trace=False)
    same(trace(x + 1), loss(x + 1), 1e-10)


def test_in_place_masks_and_statistics() -> None:
    x = make_inputs((5, 37), torch.float32)[0]
    mask = make_mask((5, 37)).scatter(-1, LABELS.clamp(0)[:, None], True)
    results = []
    for inplace in (False, True):
        leaf = x.clone().requires_grad_()
        value, stats = weighted(
            leaf * 1, class_mask=mask, inplace_backward=inplace, return_stats=True
        )
        value.backward()
        results.append((value, leaf.grad))
        same(value, weighted(x.masked_fill(~mask, -torch.inf)))
        same(stats.log_prob[0], x.masked_fill(~mask, -torch.inf).log_softmax(-1)[0, 3])
    assert all(a.equal(b) for a, b in zip(*results, strict=True))
    mask[0, 3] = False  # a label without mass has no weight
    value, dx = value_and_gradients(lambda x: weighted(x, class_mask=mask, reduction="none"), x)
    assert value[0] == 0 and dx[0].eq(0).all() and dx.isfinite().all()


def test_module_and_remembered_calls() -> None:
    x = make_inputs((5, 37), torch.float32)[0]
    expected, usual = weighted(x), fastdiv.cross_entropy(x, LABELS)
    assert expected != usual
    for _ in range(2):  # the second time, the kind of call is known
        assert weighted(x) == expected and fastdiv.cross_entropy(x, LABELS) == usual
    module = fastdiv.nn.CrossEntropyLoss(token_weight="probability")
    assert module(x, LABELS) == expected and "token_weight='probability'" in repr(module)
    assert fastdiv.nn.CrossEntropyLoss()(x, LABELS, token_weight="probability") == expected
    assert module(x, LABELS, token_weight=torch.ones(5)) == usual
