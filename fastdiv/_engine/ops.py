"""The private ops as torch sees them: their options, fakes for the compiler, and rules for vmap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..reference import Spec, value_dtype
from . import backend

RECORD_SIZE = 8  # numbers a row that the forward leaves for the backward: Row in row_state.h
TERM_SUMS = 5  # of a divergence: TermSums in divergence.h
LOSS, REDUCTION, BATCH, IGNORE_INDEX = 0, 2, 3, 4  # their places among the options

_LOSS_IDS = (
    {} if backend._C is None else {name: i for i, name in enumerate(backend._C.loss_names())}
)
_TARGET_TYPES = {"none": 0, "logits": 1, "log_probs": 2, "probs": 3}
REDUCTIONS = {"none": 0, "sum": 1, "mean": 2, "batchmean": 3}


def options(spec: Spec, stats: bool = False) -> tuple[Any, ...]:
    """The options of an op, in the order of FD_OPTIONS_SCHEMA in row_ops.h."""
    return *int_options(spec, stats), *float_options(spec)


def int_options(spec: Spec, stats: bool = False) -> tuple[int, ...]:
    """The first of them."""
    return (
        _LOSS_IDS[spec.loss + "_stats" if stats else spec.loss],
        _TARGET_TYPES[spec.target_type],
        REDUCTIONS[spec.reduction],
        spec.batch,
        spec.ignore_index,
    )


def float_options(spec: Spec) -> tuple[float, ...]:
    """The others."""
    return spec.scale, spec.softcap, spec.shape, spec.confidence, spec.spread, spec.z_loss


def spec_of(options: Sequence[Any]) -> Spec:
    """The losses and options that these are, but for ``inplace``."""
    loss, target_type, reduction, *rest = options
    name = list(_LOSS_IDS)[loss]
    return Spec(name, list(_TARGET_TYPES)[target_type], list(REDUCTIONS)[reduction], *rest)


def reduces(options: Sequence[Any]) -> bool:
    """Whether the values of the rows become one."""
    return options[REDUCTION] != REDUCTIONS["none"]


def value_shape(options: Sequence[Any], rows: int) -> tuple[int, ...]:
    """Shape of the value of so many rows."""
    if reduces(options):
        return ()
    return (2, rows) if options[LOSS] == _LOSS_IDS["log_prob_and_entropy"] else (rows,)


def of_each_row(options: Sequence[Any]) -> list[Any]:
    """The options of the same op without reduction."""
    return [*options[:REDUCTION], REDUCTIONS["none"], *options[REDUCTION + 1 :]]


# --- fakes: what torch.compile and torch.export need to know ----------------------------------


def fake_forward(x: Tensor, options: Sequence[Any], stats: bool) -> tuple[Tensor, ...]:
    """Tensors like those of a forward."""
    rows, dtype = x.shape[0], value_dtype(x.dtype)
    value = x.new_empty(value_shape(options, rows), dtype=dtype)
    out = (value, x.new_empty((rows, RECORD_SIZE), dtype=dtype), x.new_empty((), dtype=dtype))
    if not stats:
        return out
    return (*out, x.new_empty((3, rows), dtype=dtype), x.new_empty(rows, dtype=torch.int64))


def fake_gradient(of: Tensor | None, x: Tensor, needed: bool) -> Tensor:
    """A tensor like a gradient; like an empty one where none is needed."""
    of = x if of is None else of
    return of.new_empty(of.shape if needed else (0,))


# --- vmap: the batch is more rows -------------------------------------------------------------


def _fold(v: Any, dim: int | None, batch: int) -> Any:
    """The batch dimension and that of the rows as one."""
    if v is None:
        return None
    v = v.unsqueeze(0).expand(batch, *v.shape) if dim is None else v.movedim(dim, 0)
    v = v.reshape(-1, *v.shape[2:])
    return v.contiguous() if v.dim() == 1 else v  # of batches of one row a view may have gaps


def _fold_rows(rows: tuple[Any, ...], dims: tuple[Any, ...], batch: int) -> list[Any]:
    """The tensors x, t, label, class_weight, row_weight of an op."""
    if dims[3] is not None:
        raise RuntimeError("vmap over class weights is not supported: give every call the same")
    folded = [_fold(v, dim, batch) for v, dim in zip(rows, dims, strict=True)]
    folded[3] = rows[3]
    return folded


def _unfold(v: Tensor, batch: int, dim: int = 0) -> Tensor:
    """The batch dimension first; ``dim`` is the one that holds it, counted from the front."""
    return v.unflatten(dim, (batch, v.shape[dim] // batch)).movedim(dim, 0)


def _vmap_forward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    return _vmap_any_forward(forward, info.batch_size, in_dims, args)


def _vmap_forward_stats(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    return _vmap_any_forward(forward_stats, info.batch_size, in_dims, args)


def _vmap_any_forward(
    op: Any, batch: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    rows, options = _fold_rows(args[:5], in_dims[:5], batch), args[5:]
    value, record, total, *stats = op(*rows, *of_each_row(options))
    value, total = _unfold(value, batch, value.dim() - 1), total.new_ones(batch)
    if options[REDUCTION] == REDUCTIONS["mean"]:
        x, _, label, class_weight, row_weight = rows
        weights = reference.mean_weights(options[IGNORE_INDEX], x, label, class_weight, row_weight)
        total = _unfold(weights, batch).sum(-1)
    elif options[REDUCTION] == REDUCTIONS["batchmean"]:
        total = total * options[BATCH]
    if reduces(options):
        value = value.sum(-1) / total
    out = (value, _unfold(record, batch), total, *(_unfold(s, batch, s.dim() - 1) for s in stats))
    return out, (0,) * len(out)


def _vmap_backward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    batch = info.batch_size
    grad, *tensors = args[:8]
    *options, need_x, need_t = args[8:]
    *rows, record, total = tensors
    rows = _fold_rows(tuple(rows), in_dims[1:6], batch)
    grad = grad.expand(batch, *grad.shape) if in_dims[0] is None else grad.movedim(in_dims[0], 0)
    if options[REDUCTION] in (REDUCTIONS["mean"], REDUCTIONS["batchmean"]):
        grad = grad / (total if in_dims[7] is None else total.movedim(in_dims[7], 0))
    if grad.dim() == 1:  # of a scalar: the same for every row
        grad = grad.unsqueeze(-1).expand(batch, rows[0].shape[0] // batch)
    out = backward(
        grad.movedim(0, -2).flatten(-2).contiguous(),
        *rows,
        _fold(record, in_dims[6], batch).contiguous(),
        grad.new_ones(()),
        *of_each_row(options),
        need_x,
        need_t,
    )
    needs = (need_x, need_t)
    unfolded = tuple(_unfold(d, batch) if n else d for d, n in zip(out, needs, strict=True))
    return unfolded, tuple(0 if n else None for n in needs)


if backend._C is not None:
    forward = torch.ops.fastdiv._row_forward.default
    forward_stats = torch.ops.fastdiv._row_forward_stats.default
    backward = torch.ops.fastdiv._row_backward.default
    backward_in_place = torch.ops.fastdiv._row_backward_.default
    forward_grad = torch.ops.fastdiv._row_forward_grad.default
    terms = torch.ops.fastdiv._row_terms.default

    _register = torch.library.register_fake
    _register("fastdiv::_row_forward")(lambda x, *a: fake_forward(x, a[4:], False))
    _register("fastdiv::_row_forward_stats")(lambda x, *a: fake_forward(x, a[4:], True))
    _register("fastdiv::_row_backward")(
        lambda grad, x, t, *a: (fake_gradient(x, x, a[-2]), fake_gradient(t, x, a[-1]))
    )
    _register("fastdiv::_row_backward_")(lambda grad, x, t, *a: fake_gradient(t, x, a[-1]))
    _register("fastdiv::_row_forward_grad")(
        lambda grad, x, t, *a: (fake_forward(x, a[3:-1], False)[0], fake_gradient(t, x, a[-1]))
    )
    _register("fastdiv::_row_terms")(lambda x, *a: a[4].new_empty((x.shape[0], TERM_SUMS)))
    torch.library.register_vmap("fastdiv::_row_forward", _vmap_forward)
    torch.library.register_vmap("fastdiv::_row_forward_stats", _vmap_forward_stats)
    torch.library.register_vmap("fastdiv::_row_backward", _vmap_backward)
