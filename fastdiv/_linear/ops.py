"""Linear losses as private ops: Python around the loops of ``chunks``, and fakes for the compiler.

What happens inside is hidden from autograd, autocast and the compiler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._engine import arguments, ops
from .._engine.symbolic import as_tensor, is_symbolic
from ..reference import Spec, value_dtype
from . import flops
from .chunks import Problem, by_classes, by_rows
from .tiles import Gradients, Head

# input, linear_weight, linear_bias; the target with a weight and a bias if it is hidden states;
# label, class_weight, row_weight
Tensors = tuple[Tensor | None, ...]
HEADS = 6  # the first of them may need a gradient


@dataclass
class LinearCall:
    """A linear loss with all of its options that are not tensors."""

    spec: Spec
    stats: bool = False
    chunk_size: int = 0

    def options(self, symbolic: Tensor | None = None) -> tuple[list[int], list[float], int, int]:
        """What the ops take after their tensors; no floats where a tensor has them."""
        with_stats = ops.int_options(self.spec, stats=True)[0] if self.stats else -1
        floats = ops.float_options(self.spec) if symbolic is None else ()
        return list(ops.int_options(self.spec)), list(floats), with_stats, self.chunk_size

    def symbolic(self) -> Tensor | None:
        """The floats in a tensor, if the compiler knows one of them by name only."""
        floats = ops.float_options(self.spec)
        return as_tensor(floats) if is_symbolic(*floats) else None


def _problem(
    tensors: Tensors,
    ints: Sequence[int],
    floats: Sequence[float],
    chunk: int,
    symbolic: Tensor | None = None,
) -> Problem:
    x, weight, bias, t, t_weight, t_bias, label, class_weight, row_weight = tensors
    assert x is not None
    teacher = None if t is None else Head(t, t_weight, t_bias)
    given = floats if symbolic is None else symbolic.tolist()
    options = ops.of_each_row([*ints, *given])
    return Problem(Head(x, weight, bias), teacher, label, class_weight, row_weight, options, chunk)


def _gradients(p: Problem, needed: Sequence[bool]) -> list[Gradients]:
    """Of both sides; none where neither needs any."""
    if not any(needed):
        return []
    student = Gradients(p.student, needed[:3])
    if p.teacher is None or not any(needed[3:]):
        return [student]
    return [student, Gradients(p.teacher, needed[3:])]


def _results(x: Tensor, gradients: list[Gradients]) -> list[Tensor]:
    found = [d for g in gradients for d in g.results()]
    return found + [x.new_empty(0) for _ in range(HEADS - len(found))]


def _divisor(tensors: Tensors, ints: Sequence[int]) -> Tensor | int:
    """What the sum of the rows is divided by."""
    x, weight, label, class_weight, row_weight = *tensors[:2], *tensors[HEADS:]
    assert x is not None and weight is not None
    reduction = ints[ops.REDUCTION]
    if reduction != ops.REDUCTIONS["mean"]:
        return ints[ops.BATCH] if reduction == ops.REDUCTIONS["batchmean"] else 1
    logits = x.new_empty(()).expand(len(x), len(weight))  # for its shape
    ignored = ints[ops.IGNORE_INDEX]
    weights = reference.mean_weights(ignored, logits, label, class_weight, row_weight)
    return weights.sum(dtype=torch.float64)


def dtype_of_value(x: Tensor, t: Tensor | None) -> torch.dtype:
    """That of the loss of these hidden states, which a float64 target makes float64."""
    return value_dtype(x.dtype if t is None else torch.promote_types(x.dtype, t.dtype))


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
    loss_with_stats: int,
    chunk_size: int,
    needed: Sequence[bool],
    symbolic: Tensor | None = None,
) -> list[Tensor]:
    """Value, divisor, record, statistics, argmax and the gradients that are needed."""
    tensors = (x, weight, bias, t, t_weight, t_bias, label, class_weight, row_weight)
    ignored = ints[ops.IGNORE_INDEX]
    if label is not None and label.is_cpu:
        named = ("index", None) if ignored == arguments.NO_LABEL_IGNORED else ("target", ignored)
        arguments.check_labels(label, len(weight), *named)
    p = _problem(tensors, ints, floats, chunk_size, symbolic)
    divisor = torch.as_tensor(_divisor(tensors, ints), dtype=torch.float64, device=x.device)
    upstream = (1 / divisor).to(p.weight.dtype).expand(p.rows) if any(needed) else None
    with torch.autocast(x.device.type, enabled=False):
        gradients = _gradients(p, needed)
        out = by_rows(p, loss_with_stats, upstream, gradients)
    value = out.value
    if ops.reduces(ints):
        value = (value.sum(dtype=torch.float64) / divisor).to(value.dtype)
    return [value, divisor, out.record, out.stats, out.argmax, *_results(x, gradients)]


@forward.register_fake
def _(x, weight, bias, t, t_weight, t_bias, *others):  # type: ignore[no-untyped-def]
    ints, with_stats, needed = others[3], others[5], others[7]
    rows = x.shape[0]
    dtype = dtype_of_value(x, t)
    with_rows = rows if with_stats >= 0 else 0
    return [
        x.new_empty(ops.value_shape(ints, rows), dtype=dtype),
        x.new_empty((), dtype=torch.float64),
        x.new_empty((0 if any(needed) else rows, ops.RECORD_SIZE), dtype=dtype),
        x.new_empty((3, with_rows), dtype=dtype),
        x.new_empty((with_rows,), dtype=torch.int64),
        *_fake_gradients((x, weight, bias, t, t_weight, t_bias), needed),
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
    chunk_size: int,
    needed: Sequence[bool],
    symbolic: Tensor | None = None,
) -> list[Tensor]:
    """The gradients that are needed, from the records of the rows."""
    tensors = (x, weight, bias, t, t_weight, t_bias, label, class_weight, row_weight)
    p = _problem(tensors, ints, floats, chunk_size, symbolic)
    if ops.reduces(ints):
        grad = (grad / divisor).to(grad.dtype).expand(p.rows)
    with torch.autocast(x.device.type, enabled=False):
        gradients = _gradients(p, needed)
        by_classes(p, grad, record, gradients)
    return _results(x, gradients)


@backward.register_fake
def _(grad, divisor, record, x, weight, bias, t, t_weight, t_bias, *others):  # type: ignore[no-untyped-def]
    needed = others[6]
    return _fake_gradients((x, weight, bias, t, t_weight, t_bias), needed)


def _fake_gradients(tensors: Tensors, needed: Sequence[bool]) -> list[Tensor]:
    x = tensors[0]
    assert x is not None
    return [
        x.new_empty(0) if v is None or not need else v.new_empty(v.shape)
        for v, need in zip(tensors, needed, strict=True)
    ]


# --- floating-point operations ----------------------------------------------------------------


# The arguments are positional, and those that have their default may be left out.


def _forward_flops(*args: Any, out_val: Any = None) -> int:
    return flops.of_products(args[:HEADS], args[13])


def _backward_flops(grad: Tensor, divisor: Tensor, record: Tensor, *args: Any, **_: Any) -> int:
    return flops.of_products(args[:HEADS], args[12])


flops.register(torch.ops.fastdiv._linear_forward, _forward_flops)
flops.register(torch.ops.fastdiv._linear_backward, _backward_flops)
