"""The op that adds up a divergence's terms in a part of a row, given the record of the whole."""

from __future__ import annotations

import math

import pytest
import torch

from fastdiv._engine import ops
from fastdiv.reference import Rows, Spec
from helpers.cases import Case, make_inputs

SHIFT = {"kl_div": 1.0, "reverse_kl_div": -1.0}  # shift() of a policy
LOSSES = ("kl_div", "reverse_kl_div", "js_div", "skew_kl_div", "tv_distance")
CUTS = {7: (2, 5), 600: (1, 599), 8200: (512, 513, 7175), 20000: (20000,)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("target_type", ["logits", "log_probs", "probs"])
@pytest.mark.parametrize("loss", LOSSES)
def test_parts_add_up(loss: str, target_type: str, dtype: torch.dtype, isa: str) -> None:
    """To the value of the row, and to what its gradients subtract."""
    spec = Spec(loss, target_type, param=0.3)
    for classes, sizes in CUTS.items():
        x, logits = make_inputs((5, classes), dtype)
        t = Case(loss, target_type, lambda x, t: x).make_target(x, logits)
        options = ops.options(spec)
        value, record, _ = ops.forward(*Rows(x, t), *options)
        parts = [
            ops.terms(*Rows(a, b), record, *options)
            for a, b in zip(x.split(sizes, 1), t.split(sizes, 1), strict=True)
        ]
        f, u, v, q, p = torch.stack(parts).sum(0).unbind(1)
        mass = t.to(record.dtype).sum(1) if target_type == "probs" else p
        rest = SHIFT.get(loss, 0.7 if loss == "skew_kl_div" else 0.0) * (1 - mass)
        tolerance = 1e-11 if dtype == torch.float64 else 3e-5
        near = {"rtol": tolerance, "atol": tolerance}
        torch.testing.assert_close(f - rest, value, **near)
        torch.testing.assert_close(q, torch.ones_like(q), **near)
        torch.testing.assert_close(u / q, record[:, 5], **near)
        torch.testing.assert_close(v / p if target_type == "logits" else v, record[:, 6], **near)


def test_rows_of_no_weight_are_not_read(isa: str) -> None:
    x, t = make_inputs((4, 300), torch.float32)
    x[1], x[3] = math.nan, math.inf
    options = ops.options(Spec("js_div", "logits", param=0.5))
    record = ops.forward(*Rows(x, t), *options)[1]
    weight = torch.tensor([1.0, 0.0, 1.0, 0.0])
    sums = ops.terms(*Rows(x, t, row_weight=weight), record, *options)
    assert sums.isfinite().all() and not sums[1::2].any() and sums[::2].all(1).all()


def test_losses_without_terms_are_refused() -> None:
    x, t = make_inputs((2, 5), torch.float32)
    for spec in (Spec("alpha_div", "logits", param=0.5), Spec("entropy")):
        target = t if spec.target_type == "logits" else None
        options = ops.options(spec)
        record = ops.forward(*Rows(x, target), *options)[1]
        with pytest.raises(ValueError, match="has no terms"):
            ops.terms(*Rows(x, target), record, *options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    x, t = make_inputs((4, 5), dtype)
    options = ops.options(Spec("js_div", "logits", param=0.5))
    record = ops.forward(*Rows(x, t), *options)[1]
    torch.library.opcheck(ops.terms, (*Rows(x, t), record, *options))
