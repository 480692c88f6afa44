"""Weights, smoothing, soft targets and reductions of cross_entropy and kl_div: exactly torch's."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiv
from helpers.values import uneven, value_and_gradients

pytestmark = pytest.mark.usefixtures("backend")

REDUCTIONS = ["none", "sum", "mean"]


def agree(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *leaves: Tensor) -> None:
    """Value and gradients to 1e-12, with an upstream gradient that is not 1."""
    results = (value_and_gradients(f, *leaves, upstream=uneven) for f in (ours, theirs))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def logits(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) * 3


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(9,), (6, 9), (4, 9, 5), (2, 9, 3, 2)], ids=str)
def test_labels(shape: tuple[int, ...], reduction: str, weighted: bool, smoothing: float) -> None:
    classes_at = 1 if len(shape) > 1 else 0
    y = torch.randint(0, 9, shape[:classes_at] + shape[classes_at + 1 :])
    if y.dim():
        y.view(-1)[1] = 200  # ignored, and further out than the class weights reach
    weight = torch.rand(9, dtype=torch.float64) + 0.1 if weighted else None
    options = {"ignore_index": 200, "reduction": reduction, "label_smoothing": smoothing}
    agree(
        lambda x: fastdiv.cross_entropy(x, y, weight, **options),
        lambda x: F.cross_entropy(x, y, weight, **options),
        logits(*shape),
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(9,), (6, 9), (4, 9, 5)], ids=str)
def test_soft_targets(
    shape: tuple[int, ...], reduction: str, weighted: bool, smoothing: float
) -> None:
    # Neither non-negative nor of sum 1: the loss is linear in them, and so are the gradients.
    weight = torch.rand(9, dtype=torch.float64) + 0.1 if weighted else None
    options = {"reduction": reduction, "label_smoothing": smoothing}
    agree(
        lambda x, p: fastdiv.cross_entropy(x, p, weight, **options),
        lambda x, p: F.cross_entropy(x, p, weight, **options),
        logits(*shape),
        torch.randn(*shape, dtype=torch.float64),
    )


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
def test_token_weights(reduction: str, weighted: bool, soft: bool) -> None:
    x = logits(4, 9, 3)
    y = logits(4, 9, 3).softmax(1) if soft else torch.randint(0, 9, (4, 3))
    weight = torch.rand(9, dtype=torch.float64) + 0.1 if weighted else None
    token = torch.rand(4, 3, dtype=torch.float64)
    token[1, 2] = 0

    def theirs(x: Tensor) -> Tensor:
        each = F.cross_entropy(x, y, weight, reduction="none", label_smoothing=0.2) * token
        if reduction == "none":
            return each
        # As torch: the class weight of a label counts in the mean, that of soft targets does not.
        counts = token * weight[y] if weighted and not soft else token
        return each.sum() / {"sum": 1, "mean": counts.sum(), "batchmean": 4}[reduction]

    options = {"reduction": reduction, "label_smoothing": 0.2, "token_weight": token}
    agree(lambda x: fastdiv.cross_entropy(x, y, weight, **options), theirs, x)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32, torch.bfloat16], ids=str)
def test_weights_of_other_types_are_converted(dtype: torch.dtype) -> None:
    x, y = logits(4, 5).float(), torch.tensor([0, 1, 2, 3])
    weight, token = torch.tensor([1, 0, 1, 1, 1]), torch.tensor([1, 1, 0, 1])
    value = fastdiv.cross_entropy(x, y, weight.to(dtype), token_weight=token.to(dtype))
    expected = F.cross_entropy(x, y, reduction="none")[[0, 3]].mean()
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("kind", ["log_probs", "probs"])
@pytest.mark.parametrize(
    ("backend", "reduction"),
    [
        *product(["native", "reference"], ["sum", "batchmean", "mean", "none"]),
        ("reference", "pointwise"),
    ],
    indirect=["backend"],
)
def test_kl_div(reduction: str, kind: str) -> None:
    # Targets that do not sum to 1: both gradients know.
    target = logits(4, 9).log_softmax(-1) + torch.rand(4, 1, dtype=torch.float64)
    target = target.exp() if kind == "probs" else target

    def theirs(x: Tensor, t: Tensor) -> Tensor:
        terms = F.kl_div(x.log_softmax(-1), t, reduction="none", log_target=kind == "log_probs")
        rows = terms.sum(-1)
        return {"pointwise": terms, "none": rows, "sum": rows.sum()}.get(reduction, rows.mean())

    agree(
        lambda x, t: fastdiv.kl_div(x, t, target_type=kind, reduction=reduction),
        theirs,
        logits(4, 9),
        target,
    )


def test_batchmean_divides_by_the_first_dimension() -> None:
    x, t = logits(2, 3, 9), logits(2, 3, 9)
    for dim in (-1, 1, 0):
        rows = fastdiv.kl_div(x, t, target_type="logits", reduction="none", dim=dim)
        mean = fastdiv.kl_div(x, t, target_type="logits", dim=dim)
        torch.testing.assert_close(mean, rows.sum() / 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("soft", [False, True])
def test_statistics(soft: bool) -> None:
    x = logits(4, 9, 3)
    x[1, 2] = x[1, 5] = 20.0  # of two maxima the first
    y = logits(4, 9, 3).softmax(1) if soft else torch.randint(0, 9, (4, 3))
    if not soft:
        y[0, 0] = -100
    value, stats = fastdiv.cross_entropy(x, y, return_stats=True, temperature=2.0)
    torch.testing.assert_close(value, F.cross_entropy(x / 2, y))
    lq = (x / 2).log_softmax(1)
    log_prob = (y * lq).sum(1) if soft else -F.nll_loss(lq, y, reduction="none")
    torch.testing.assert_close(stats.log_prob, log_prob)
    torch.testing.assert_close(stats.lse, (x / 2).logsumexp(1))
    torch.testing.assert_close(stats.entropy, -(lq.exp() * lq).sum(1))
    assert stats.argmax.equal(x.argmax(1)) and (stats.argmax[1] == 2).all()
