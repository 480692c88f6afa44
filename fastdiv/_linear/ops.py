"""Linear losses as private ops around the loops of ``loops``, with fakes for the compiler.

What happens inside is hidden from autograd, autocast and the compiler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from .._engine import arguments, ops
from .._engine.masks import check_range
from ..reference import OF_CLASSES, Spec, value_dtype
from . import flops
from .loops import Problem, by_classes, by_rows
from .tiles import Gradients, TiledLogits

Tensors = Sequence[Tensor | None]


class LayerRows(NamedTuple):
    """The tensors of a linear loss, in the order of the ops.  The first seven get gradients."""

    x: Tensor  # hidden states [R, H]
    weight: Tensor  # [C, H]
    bias: Tensor | None  # [C]
    t: Tensor | None = None  # target [R, C], or with a weight of its own hidden states [R, K]
    t_weight: Tensor | None = None  # [C, K]
    t_bias: Tensor | None = None  # [C]
    scale: Tensor | None = None  # from here on as in Rows
    label: Tensor | None = None
    class_weight: Tensor | None = None
    row_weight: Tensor | None = None
    mask: Tensor | None = None


N_HEAD_TENSORS = LayerRows._fields.index("scale")  # those of layers
N_INPUTS = N_HEAD_TENSORS + 1  # the first of them may need a gradient


def problem(
    tensors: Tensors, spec: Spec, chunk_size: int, logits_dtype: torch.dtype | None = None
) -> Problem:
    """Put the tensors of an op together."""
    given = LayerRows(*tensors)  # type: ignore[arg-type]
    x, weight, bias, t, t_weight, t_bias, *_ = given
    teacher = None if t is None else TiledLogits(t, t_weight, t_bias, logits_dtype)
    student = TiledLogits(x, weight, bias, logits_dtype)
    rows = (given.scale, given.label, given.class_weight, given.row_weight, given.mask)
    return Problem(student, teacher, *rows, spec, chunk_size)


def gradients_of(p: Problem, needed: Sequence[bool], as_sums: bool = False) -> list[Gradients]:
    """Make the gradients of student and teacher, or none where neither needs any."""
    if not any(needed):
        return []
    student = Gradients(p.student, needed[:3], as_sums)
    if p.teacher is None or not any(needed[3:N_HEAD_TENSORS]):
        return [student]
    return [student, Gradients(p.teacher, needed[3:N_HEAD_TENSORS], as_sums)]


def scale_gradient_of(p: Problem, needed: Sequence[bool]) -> Tensor | None:
    """Make the gradient of the scales, if it is needed."""
    if len(needed) <= N_HEAD_TENSORS or not needed[N_HEAD_TENSORS] or p.scale is None:
        return None
    return torch.zeros_like(p.scale)


def results_of(
    x: Tensor, gradients: list[Gradients], d_scale: Tensor | None = None
) -> list[Tensor]:
    """Return one gradient for each tensor that may need one, empty where it does not."""
    found = [d for g in gradients for d in g.results()]
    found += [x.new_empty(0) for _ in range(N_HEAD_TENSORS - len(found))]
    return [*found, x.new_empty(0) if d_scale is None else d_scale]


def fake_results(tensors: Tensors, needed: Sequence[bool], as_sums: bool = False) -> list[Tensor]:
    """Make tensors like those of ``results_of``."""
    x = tensors[0]
    assert x is not None
    return [
        v.new_empty(v.shape, dtype=value_dtype(v.dtype) if as_sums else v.dtype)
        if need and v is not None
        else x.new_empty(0)
        for v, need in zip(tensors, needed, strict=True)
    ]


def rounds(tensors: Tensors, needed: Sequence[bool]) -> bool:
    """Return whether one of the gradients that are needed is in half precision."""
    heads = tensors[:N_HEAD_TENSORS]
    return any(
        need and v is not None and v.dtype.itemsize == 2
        for v, need in zip(heads, needed[:N_HEAD_TENSORS], strict=True)
    )


def dtype_of_value(x: Tensor, t: Tensor | None) -> torch.dtype:
    """Return the dtype of the loss of these hidden states, float64 if the target is."""
    return value_dtype(x.dtype if t is None else torch.promote_types(x.dtype, t.dtype))


def check_labels(spec: Spec, label: Tensor, classes: int) -> None:
    """Raise IndexError for a label out of range, before any is used."""
    if spec.loss in OF_CLASSES:
        check_range(label, classes)
    elif spec.loss == "log_prob_and_entropy":
        arguments.check_labels(label, classes, "index", spec.ignore_index)
    else:
        arguments.check_labels(label, classes, "target", spec.ignore_index)


def _divisor(tensors: Tensors, spec: Spec) -> Tensor | int:
    """Return what the sum over the rows is divided by."""
    x, weight, *_, label, class_weight, row_weight, _ = tensors
    assert x is not None and weight is not None
    if spec.reduction != "mean":
        return spec.batch if spec.reduction == "batchmean" else 1
    logits = x.new_empty(()).expand(len(x), len(weight))  # for its shape
    weights = reference.mean_weights(spec.ignore_index, logits, label, class_weight, row_weight)
    return weights.sum(dtype=torch.float64)


@torch.library.custom_op("fastdiv::_linear_forward", mutates_args=())
def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    t: Tensor | None,
    t_weight: Tensor | None,
    t_bias: Tensor | None,
    scale: Tensor | None,
    label: Tensor | None,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    mask: Tensor | None,
    ints: Sequence[int],
    floats: Sequence[float],
    symbolic: Tensor | None,
    stats: bool,
    chunk_size: int,
    logits_dtype: torch.dtype | None,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Compute value, divisor, record, statistics, argmax and the gradients that are needed.

    Gradients are for an upstream gradient of 1.  If one of them ``rounds``, they are sums in
    float32, still to be multiplied by the upstream gradient and divided by the divisor.
    """
    heads, rows = (x, weight, bias, t, t_weight, t_bias), (label, class_weight, row_weight, mask)
    tensors = (*heads, scale, *rows)
    spec = ops.unpacked(ints, floats, symbolic)
    if label is not None and label.is_cpu:
        check_labels(spec, label, len(weight))
    p = problem(tensors, spec, chunk_size, logits_dtype)
    divisor = torch.as_tensor(_divisor(tensors, spec), dtype=torch.float64, device=x.device)
    upstream = None
    if any(needed):
        unit = p.unit() if rounds(tensors, needed) else 1 / divisor
        upstream = unit.to(p.weight.dtype).expand(p.rows)
    with torch.autocast(x.device.type, enabled=False):
        gradients, d_scale = gradients_of(p, needed, as_sums=True), scale_gradient_of(p, needed)
        out = by_rows(p, stats, upstream, gradients, d_scale=d_scale)
    value = out.value
    if spec.reduction != "none":
        value = (value.sum(dtype=torch.float64) / divisor).to(value.dtype)
    if rounds(tensors, needed):
        # If no row counts, the gradients are 0, also where the divisor is.
        divisor = torch.where((p.weight == 0).all(), 1.0, divisor * unit)
    return [value, divisor, out.record, out.stats, out.argmax, *results_of(x, gradients, d_scale)]


@forward.register_fake
def _(x, w, b, t, tw, tb, scale, label, cw, rw, mask, ints, floats, symbolic, stats, *others):  # type: ignore[no-untyped-def]
    rows, dtype, needed = x.shape[0], dtype_of_value(x, t), others[-1]
    with_stats, spec = rows if stats else 0, ops.spec_of(ints)
    of_value = torch.promote_types(dtype, ops.value_dtype_of(spec, x))
    return [
        x.new_empty(ops.value_shape(spec, rows, label), dtype=of_value),
        x.new_empty((), dtype=torch.float64),
        x.new_empty((0 if any(needed) else rows, ops.RECORD_SIZE), dtype=dtype),
        x.new_empty((3, with_stats), dtype=dtype),
        x.new_empty((with_stats,), dtype=torch.int64),
        *fake_results((x, w, b, t, tw, tb, scale), needed, as_sums=True),
    ]


@torch.library.custom_op("fastdiv::_linear_backward", mutates_args=())
def backward(
    grad: Tensor,
    divisor: Tensor,
    record: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    t: Tensor | None,
    t_weight: Tensor | None,
    t_bias: Tensor | None,
    scale: Tensor | None,
    label: Tensor | None,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    mask: Tensor | None,
    ints: Sequence[int],
    floats: Sequence[float],
    symbolic: Tensor | None,
    chunk_size: int,
    logits_dtype: torch.dtype | None,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Compute the gradients that are needed, from the records of the rows."""
    heads, rows = (x, weight, bias, t, t_weight, t_bias), (label, class_weight, row_weight, mask)
    tensors = (*heads, scale, *rows)
    spec = ops.unpacked(ints, floats, symbolic)
    p = problem(tensors, spec, chunk_size, logits_dtype)
    if spec.reduction != "none":
        grad = (grad / divisor).to(grad.dtype).expand(p.rows)
    with torch.autocast(x.device.type, enabled=False):
        gradients, d_scale = gradients_of(p, needed), scale_gradient_of(p, needed)
        by_classes(p, grad, record, gradients, d_scale)
    return results_of(x, gradients, d_scale)


@backward.register_fake
def _(grad, divisor, record, x, weight, bias, t, tw, tb, scale, *others):  # type: ignore[no-untyped-def]
    return fake_results((x, weight, bias, t, tw, tb, scale), needed=others[-1])


# --- floating-point operations ----------------------------------------------------------------


def _forward_flops(*args: Any, out_val: Any = None) -> int:
    return flops.of_products(args[:N_HEAD_TENSORS], args[-1])


def _backward_flops(grad: Tensor, divisor: Tensor, record: Tensor, *args: Any, **_: Any) -> int:
    return flops.of_products(args[:N_HEAD_TENSORS], args[-1])


flops.register(torch.ops.fastdiv._linear_forward, _forward_flops)
flops.register(torch.ops.fastdiv._linear_backward, _backward_flops)
