"""The gradient of temperatures that are a tensor, by that of their reciprocals, the scales.

A scaled logit is ``s x``, so with the gradient ``dx`` of the logits the scale of a row gets
``sum dx x / s``.  It is computed apart from the gradient of the logits, some rows at a time and in
float32, because few losses need it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference import Rows, Spec, value_dtype
from . import ops

CHUNK = {"cpu": 1 << 18, "cuda": 1 << 24}  # logits at a time


@torch.library.custom_op("fastdiv::_scale_gradient", mutates_args=())
def _op(
    grad: Tensor,
    x: Tensor,
    t: Tensor | None,
    scale: Tensor,
    label: Tensor | None,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    mask: Tensor | None,
    record: Tensor,
    divisor: Tensor,
    ints: Sequence[int],
    floats: Sequence[float],
    symbolic: Tensor | None,
) -> Tensor:
    spec = ops.unpacked(ints, floats, symbolic)
    chunk = max(CHUNK["cpu" if x.is_cpu else "cuda"] // x.shape[1], 1)
    out = torch.empty_like(scale)
    given = Rows(x, t, scale, label, class_weight, row_weight, mask)
    for begin in range(0, len(x), chunk):
        which = slice(begin, begin + chunk)
        out[which] = _of_rows(spec, grad, given, record, divisor, which)
    return out


@_op.register_fake
def _(grad, x, t, scale, *others):  # type: ignore[no-untyped-def]
    return torch.empty_like(scale)


def _of_rows(
    spec: Spec, grad: Tensor, given: Rows, record: Tensor, divisor: Tensor, which: slice
) -> Tensor:
    dtype = value_dtype(given.x.dtype)
    x = given.x[which].to(dtype)
    if spec.softcap:
        x = spec.softcap * torch.tanh(x / spec.softcap)
    rows = Rows(
        x.contiguous(),
        *(
            v if v is None or name == "class_weight" else v[which]
            for name, v in zip(Rows._fields[1:], given[1:], strict=True)
        ),
    )
    if rows.t is not None:
        rows = rows._replace(t=rows.t.to(dtype).contiguous())
    if grad.dim():
        grad = grad[which] if grad.shape[0] == len(given.x) else grad[:, which]
    record = record[which]
    scaled = spec.target_type == "logits"
    options = ops.options(spec._replace(softcap=0.0))
    dx, dt = ops.backward(
        grad.contiguous(), *rows, record.contiguous(), divisor, *options, True, scaled
    )
    total = _product(dx, rows.x, record[:, 0])
    if spec.z_loss:  # the only part of a loss that changes if all logits grow alike
        total = total + dx.sum(-1) * record[:, 0]
    if scaled and rows.t is not None:
        total = total + _product(dt, rows.t, record[:, 2])
    assert rows.scale is not None
    return torch.where(total == 0, 0.0, total / rows.scale)


def _product(d: Tensor, x: Tensor, largest: Tensor) -> Tensor:
    """Compute ``sum d x`` over the finite logits.

    The gradients ``d`` of all logits add up to 0, so that the largest may be subtracted.  Those of
    infinite logits, which an infinite loss has, are then missing in the sum.
    """
    apart = x - largest.unsqueeze(-1)
    infinite = torch.isinf(apart)
    product = (d * torch.where((d == 0) | infinite, 0.0, apart)).sum(-1)
    missing = torch.where(infinite, d, 0.0).sum(-1)
    return product - torch.where(missing == 0, 0.0, missing * largest)


def scale_gradient(
    spec: Spec, grad: Tensor, *saved: Tensor | None, symbolic: Tensor | None = None
) -> Tensor:
    """Compute the gradient of the scale of each row.

    ``saved`` are the tensors of ``Rows``, the record and the divisor.
    """
    return _op(grad, *saved, *ops.packed(spec, symbolic))
