"""Every CUDA kernel once on each kind of row, against the CPU: few launches, for the sanitizers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.bits import backward_call, bits, evaluate, inputs, moved, statistics
from helpers.cases import LOSSES, Case, TopKCase

pytestmark = pytest.mark.beside_cpu

# Rows for a warp, for blocks of either size, for clusters of two and of eight.
CLASSES = [37, 1021, 2500, 9001, 40009]
# Those that differ in more than numbers.
KINDS = [c for c in LOSSES if c.options.keys() <= {"softcap", "label_smoothing"}]
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def somewhere(v: Tensor | None, offset: int) -> Tensor | None:
    """A matrix off alignment; labels as they are."""
    return v if v is None or not v.is_floating_point() else moved(v, offset)


def on_cpu(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.cpu()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_small(case: Case, dtype: torch.dtype) -> None:
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype], "equal_nan": True}
    for classes in CLASSES:
        x, t = inputs(case, (4, classes), dtype)
        expected = evaluate(case, x.cpu(), on_cpu(t))
        got = evaluate(case, somewhere(x, 3), somewhere(t, 5))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.cpu(), b, **tolerance)

        op, (upstream, _, *rest), dx = backward_call(case, x, t)
        over = moved(x, 1)
        torch.ops.fastdiv._row_backward_(upstream, over, *rest[:-2], False)
        assert torch.equal(bits(over), bits(dx)), f"in place, {classes} classes"

        if case.name == "log_prob" or isinstance(case, TopKCase):
            continue  # without a forward that writes the gradient
        rows, options, need_t = rest[:6], rest[8:-2], t is not None and t.is_floating_point()
        over = moved(x, 2)
        _, dt = torch.ops.fastdiv._row_forward_grad(upstream, over, *rows, *options, need_t)
        assert torch.equal(bits(over), bits(dx)), f"forward_grad, {classes} classes"
        assert not need_t or torch.equal(bits(case.of_target(dt, t)), bits(got[2]))


@pytest.mark.parametrize("case", [c for c in KINDS if c.name == "cross_entropy"], ids=str)
def test_small_reductions_and_statistics(case: Case) -> None:
    for classes in CLASSES:
        x, t = inputs(case, (4, classes), torch.float32)
        for reduction in ("sum", "mean"):
            got, expected = (
                case.call(v, w, reduction=reduction) for v, w in ((x, t), (x.cpu(), on_cpu(t)))
            )
            torch.testing.assert_close(got.cpu(), expected, rtol=2e-5, atol=2e-5)
        _, got = statistics(case, x, t)
        _, expected = statistics(case, x.cpu(), on_cpu(t))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=2e-5, atol=2e-5)
