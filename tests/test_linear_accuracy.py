"""How far linear losses are from float64, in ulps, where logits are floats and where halves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.cases import DTYPES
from helpers.linear_cases import make_case, named_gradients

# Root mean square errors of the value, of the gradients of the student's tensors and of the
# teacher's, in ulps of the root mean square result.  A logit of about 10 is a sum of 64 products
# and has an error of an ulp or two of its size, which the exponential turns into a relative one.  A
# teacher's logits are three times as large, and KL magnifies its gradient.  The bounds are twice of
# what oneDNN and MKL need, since another library adds up in another order.
IN_FLOAT = {"labels": (1.5, 5.0, 0.0), "logits": (2.0, 9.0, 4.0), "hidden": (4.0, 12.0, 30.0)}
# Halves that are multiplied in float32 are rounded once, at the end.
ROUNDED_ONCE = (3.0, 0.35, 0.35)
# Products of halves are rounded to halves; the value is in ulps of these here, too.
IN_HALVES = {"labels": (0.15, 0.8, 0.0), "logits": (0.15, 2.0, 0.5), "hidden": (0.7, 3.0, 6.0)}


@pytest.mark.parametrize(
    ("dtype", "products"),
    [(d, p) for d in DTYPES[:3] for p in ("float", "half") if p == "float" or d != torch.float32],
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("target", ["labels", "logits", "hidden"])
def test_accept_rule(
    dtype: torch.dtype, reduction: str, target: str, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Close to float64, in ulps; eager torch of whole logits stands beside it in a failure."""
    on_cpu = torch.get_default_device().type == "cpu"
    in_halves = products == "half" or (dtype != torch.float32 and not on_cpu)
    monkeypatch.setattr("fastdiv._linear.tiles.multiplies", lambda half: in_halves)
    divergence = target != "labels"
    case = make_case(
        "kl_div" if divergence else "cross_entropy", (96,), 64, 2000, dtype, target,
        teacher_hidden=32, reduction=reduction, chunk_size=20,
    )  # fmt: skip

    def eager(v: Any) -> Tensor:
        x = F.linear(v["input"], v["linear_weight"], v["linear_bias"])
        if not divergence:
            return F.cross_entropy(x, case.label, reduction=reduction)
        t = v["target"]
        if target == "hidden":
            t = F.linear(t, v["target_linear_weight"], v["target_linear_bias"])
        lq, lp = torch.log_softmax(x, -1), torch.log_softmax(t, -1)
        rows = (lp.exp() * (lp - lq)).sum(-1)
        return rows.mean() if reduction == "mean" else rows

    def side_by_side(results: tuple[Tensor, dict[str, Tensor]]) -> list[Tensor]:
        return [results[0], *results[1].values()]

    table = IN_HALVES if in_halves else IN_FLOAT
    ulps = ROUNDED_ONCE if dtype != torch.float32 and not in_halves else table[target]
    ours = side_by_side(named_gradients(case.call, case.leaves))
    plain = side_by_side(named_gradients(eager, case.leaves))
    names = ["value", *case.leaves]
    for name, our, their, true in zip(names, ours, plain, side_by_side(case.truth()), strict=True):
        error, theirs = ((v.double() - true).square().mean().sqrt() for v in (our, their))
        unit = torch.finfo(dtype if in_halves else our.dtype).eps * true.square().mean().sqrt()
        allowed = ulps[0 if name == "value" else 2 if name.startswith("target") else 1] * unit
        assert error <= allowed, f"{name}: {error:.1e} > {allowed:.1e}; of eager torch {theirs:.1e}"
