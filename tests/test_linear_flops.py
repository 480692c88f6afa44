"""What torch's counter of floating-point operations sees of linear losses."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastdiv
from fastdiv._linear import tiles
from helpers.linear_cases import OF_CLASSES, TARGETS, TOPK, LinearCase, make_case, named_gradients

EVERY_TARGET = pytest.mark.parametrize(("name", "target"), TARGETS)
ROWS, HIDDEN, CLASSES, TEACHER = 6, 8, 30, 5
STUDENT_PRODUCT = 2 * ROWS * HIDDEN * CLASSES
TEACHER_PRODUCT = 2 * ROWS * TEACHER * CLASSES


def small_case(name: str, target: str, **options: Any) -> LinearCase:
    if name in OF_CLASSES:
        options.pop("reduction", None)
    return make_case(name, (ROWS,), HIDDEN, CLASSES, target=target, teacher_hidden=TEACHER,
                     **options)  # fmt: skip


def count(call: Any, leaves: dict[str, Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        named_gradients(call, leaves)
    return counter.get_total_flops()


@EVERY_TARGET
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_as_the_loss_of_the_whole_logits(name: str, target: str, reduction: str) -> None:
    """Three products for a layer, as that has; a fourth where the logits are made twice."""
    case = small_case(name, target, reduction=reduction)
    with fastdiv.backend("reference"):
        plain = count(case.unfused, case.leaves)
    once = STUDENT_PRODUCT + (TEACHER_PRODUCT if target == "hidden" else 0)
    assert plain == 3 * once
    twice = reduction == "none" or name in (*OF_CLASSES, *TOPK)
    assert count(case.call, case.leaves) == plain + (once if twice else 0)


@pytest.mark.parametrize("accumulate", [None, "weight", "rows"])
@pytest.mark.parametrize("halves", [True, False])
def test_half_precision(
    halves: bool, accumulate: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits once or twice; a gradient takes two products on a CPU that multiplies halves."""
    monkeypatch.setattr(tiles, "multiplies", lambda half: halves)
    case = small_case("cross_entropy", "labels", dtype=torch.bfloat16, accumulate=accumulate)
    cpu = torch.get_default_device().type == "cpu"
    products = (1 if accumulate == "weight" else 2) + (4 if halves and cpu else 2)
    assert count(case.call, case.leaves) == products * STUDENT_PRODUCT


@pytest.mark.parametrize(("accumulate", "products"), [(None, 3), ("weight", 3), ("rows", 4)])
def test_single_precision(accumulate: str | None, products: int) -> None:
    case = small_case("cross_entropy", "labels", accumulate=accumulate)
    assert count(case.call, case.leaves) == products * STUDENT_PRODUCT


@EVERY_TARGET
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_products_that_run(
    name: str, target: str, reduction: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The count is that of the products of which a step is made, however it is cut into tiles."""
    monkeypatch.setattr(tiles, "multiplies", lambda half: True)
    ran = []
    multiply, add_product = tiles.multiply, tiles._add_product

    def noted(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        ran.append(2 * len(x) * weight.numel())
        return multiply(x, weight, *rest)

    def added(total: Tensor, rows: Any, a: Tensor, b: Tensor) -> None:
        twice = a.is_cpu and a.dtype != total.dtype
        ran.append(2 * a.shape[0] * b.numel() * (2 if twice else 1))
        add_product(total, rows, a, b)

    case = small_case(name, target, dtype=dtype, reduction=reduction, chunk_size=4)
    with monkeypatch.context() as patched:
        patched.setattr(tiles, "multiply", noted)
        patched.setattr(tiles, "_add_product", added)
        named_gradients(case.call, case.leaves)
    assert count(case.call, case.leaves) == sum(ran)


def test_only_gradients_that_are_needed() -> None:
    case = small_case("cross_entropy", "labels", bias=False)
    h, w = case.leaves["input"], case.leaves["linear_weight"]
    for leaf in (h, w):
        leaf.requires_grad_()
        with FlopCounterMode(display=False) as counter:
            case.call().backward()
        leaf.requires_grad_(False)
        assert counter.get_total_flops() == 2 * STUDENT_PRODUCT
    with FlopCounterMode(display=False) as counter:
        case.call()
    assert counter.get_total_flops() == STUDENT_PRODUCT


def test_the_counter_may_come_later() -> None:
    """It is not imported with fastdiv, for it imports Triton; and counts, whoever comes first."""
    code = """
import sys, torch, fastdiv
assert "torch.utils.flop_counter" not in sys.modules
h, w, y = torch.randn(4, 3, requires_grad=True), torch.randn(7, 3), torch.zeros(4, dtype=torch.long)
fastdiv.linear_cross_entropy(h, w, y).backward()
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    fastdiv.linear_cross_entropy(h, w, y).backward()
print(counter.get_total_flops())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 2 * (2 * 4 * 3 * 7)
