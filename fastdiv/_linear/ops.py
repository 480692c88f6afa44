"""Linear losses as private ops around the loops of ``loops``, with fakes for the compiler.

What happens inside is hidden from autograd, autocast and the compiler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._engine import arguments, ops
from ..reference import Spec, value_dtype
from . import flops
from .loops import Problem, by_classes, by_rows
from .tiles import Gradients, TiledLogits

# input, linear_weight, linear_bias; the target with a weight and a bias if it is hidden states;
# label, class_weight, row_weight
Tensors = Sequence[Tensor | None]
N_HEAD_TENSORS = 6  # the first of them may need a gradient


def problem(tensors: Tensors, spec: Spec, chunk_size: int) -> Problem:
    """Put the tensors of an op together."""
    x, weight, bias, t, t_weight, t_bias, label, class_weight, row_weight = tensors
    assert x is not None
    teacher = None if t is None else TiledLogits(t, t_weight, t_bias)
    student, rows = TiledLogits(x, weight, bias), (label, class_weight, row_weight)
    return Problem(student, teacher, *rows, spec, chunk_size)


def gradients_of(p: Problem, needed: Sequence[bool], as_sums: bool = False) -> list[Gradients]:
    """Make the gradients of student and teacher, or none where neither needs any."""
    if not any(needed):
        return []
    student = Gradients(p.student, needed[:3], as_sums)
    if p.teacher is None or not any(needed[3:]):
        return [student]
    return [student, Gradients(p.teacher, needed[3:], as_sums)]


def results_of(x: Tensor, gradients: list[Gradients]) -> list[Tensor]:
    """Return one gradient for each tensor of the heads, empty where it is not needed."""
    found = [d for g in gradients for d in g.results()]
    return found + [x.new_empty(0) for _ in range(N_HEAD_TENSORS - len(found))]


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
        for v, need in zip(heads, needed, strict=True)
    )


def dtype_of_value(x: Tensor, t: Tensor | None) -> torch.dtype:
    """Return the dtype of the loss of these hidden states, float64 if the target is."""
    return value_dtype(x.dtype if t is None else torch.promote_types(x.dtype, t.dtype))


def _divisor(tensors: Tensors, spec: Spec) -> Tensor | int:
    """Return what the sum over the rows is divided by."""
    x, weight, label, class_weight, row_weight = *tensors[:2], *tensors[N_HEAD_TENSORS:]
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
    label: Tensor | None,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    ints: Sequence[int],
    floats: Sequence[float],
    symbolic: Tensor | None,
    stats: bool,
    chunk_size: int,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Compute value, divisor, record, statistics, argmax and the gradients that are needed.

    Gradients are for an upstream gradient of 1.  If one of them ``rounds``, they are sums in
    float32, still to be multiplied by the upstream gradient and divided by the divisor.
    """
    tensors = (x, weight, bias, t, t_weight, t_bias, label, class_weight, row_weight)
    spec = ops.unpacked(ints, floats, symbolic)
    if label is not None and label.is_cpu:
        ignored = spec.ignore_index
        named = ("index", None) if ignored == arguments.NO_LABEL_IGNORED else ("target", ignored)
        arguments.check_labels(label, len(weight), *named)
    p = problem(tensors, spec, chunk_size)
    divisor = torch.as_tensor(_divisor(tensors, spec), dtype=torch.float64, device=x.device)
    upstream = None
    if any(needed):
        unit = p.unit() if rounds(tensors, needed) else 1 / divisor
        upstream = unit.to(p.weight.dtype).expand(p.rows)
    with torch.autocast(x.device.type, enabled=False):
        gradients = gradients_of(p, needed, as_sums=True)
        out = by_rows(p, stats, upstream, gradients)
    value = out.value
    if spec.reduction != "none":
        value = (value.sum(dtype=torch.float64) / divisor).to(value.dtype)
    if rounds(tensors, needed):
        # If no row counts, the gradients are 0, also where the divisor is.
        divisor = torch.where((p.weight == 0).all(), 1.0, divisor * unit)
    return [value, divisor, out.record, out.stats, out.argmax, *results_of(x, gradients)]


@forward.register_fake
def _(x, weight, bias, t, tw, tb, label, cw, rw, ints, floats, symbolic, stats, chunk, needed):  # type: ignore[no-untyped-def]
    rows, dtype = x.shape[0], dtype_of_value(x, t)
    with_stats = rows if stats else 0
    return [
        x.new_empty(ops.value_shape(ops.spec_of(ints), rows), dtype=dtype),
        x.new_empty((), dtype=torch.float64),
        x.new_empty((0 if any(needed) else rows, ops.RECORD_SIZE), dtype=dtype),
        x.new_empty((3, with_stats), dtype=dtype),
        x.new_empty((with_stats,), dtype=torch.int64),
        *fake_results((x, weight, bias, t, tw, tb), needed, as_sums=True),
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
    label: Tensor | None,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    ints: Sequence[int],
    floats: Sequence[float],
    symbolic: Tensor | None,
    chunk_size: int,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Compute the gradients that are needed, from the records of the rows."""
    tensors = (x, weight, bias, t, t_weight, t_bias, label, class_weight, row_weight)
    spec = ops.unpacked(ints, floats, symbolic)
    p = problem(tensors, spec, chunk_size)
    if spec.reduction != "none":
        grad = (grad / divisor).to(grad.dtype).expand(p.rows)
    with torch.autocast(x.device.type, enabled=False):
        gradients = gradients_of(p, needed)
        by_classes(p, grad, record, gradients)
    return results_of(x, gradients)


@backward.register_fake
def _(grad, divisor, record, x, weight, bias, t, tw, tb, label, cw, rw, ints, floats, *others):  # type: ignore[no-untyped-def]
    return fake_results((x, weight, bias, t, tw, tb), needed=others[-1])


# --- floating-point operations ----------------------------------------------------------------


def _forward_flops(*args: Any, out_val: Any = None) -> int:
    return flops.of_products(args[:N_HEAD_TENSORS], args[-1])


def _backward_flops(grad: Tensor, divisor: Tensor, record: Tensor, *args: Any, **_: Any) -> int:
    return flops.of_products(args[:N_HEAD_TENSORS], args[-1])


flops.register(torch.ops.fastdiv._linear_forward, _forward_flops)
flops.register(torch.ops.fastdiv._linear_backward, _backward_flops)
