"""Gradients in bfloat16 are those of float32, rounded to nearest, by instructions as by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import fastdiv

pytestmark = pytest.mark.cpu_only("instruction sets of a CPU")

CLASSES = (1, 15, 16, 17, 100, 2048, 2063, 9000)  # with and without columns left over


def gradient(
    loss: Callable[..., torch.Tensor], x: torch.Tensor, *target: torch.Tensor
) -> torch.Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, *target).sum(), leaf)[0]


@pytest.mark.parametrize("classes", CLASSES)
def test_gradients_are_rounded_to_nearest(isa: str, classes: int) -> None:
    x, t = torch.randn(2, 5, classes, generator=torch.Generator().manual_seed(classes)).bfloat16()
    y = torch.arange(5) % classes
    for loss, target in (
        (lambda x, t: fastdiv.cross_entropy(x, t, reduction="none"), y),
        (lambda x, t: fastdiv.kl_div(x, t, target_type="logits", reduction="none"), t),
    ):
        wide = target if target is y else target.float()
        expected = gradient(loss, x.float(), wide)
        # Subnormal numbers may become 0.
        expected = torch.where(expected.abs() < 2**-126, 0, expected).bfloat16()
        found = gradient(loss, x, target)
        assert torch.equal(torch.where(found.abs() < 2**-126, 0, found), expected)


def test_nan_and_infinity_stay(isa: str) -> None:
    x = torch.tensor([[0.0, 1.0, float("nan")], [0.0, float("-inf"), 1.0]]).bfloat16()
    y = torch.tensor([0, 1])
    found = gradient(lambda x, y: fastdiv.cross_entropy(x, y, reduction="none"), x, y)
    assert found[0].isnan().all()
    assert found[1, 1] == -1 and found[1, [0, 2]].isfinite().all()
