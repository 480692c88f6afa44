"""The private ops for torch: their options, fakes for the compiler, and rules for vmap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..reference import OF_CLASSES, Rows, Spec, Stats, value_dtype
from ..reference.topk import REST
from . import backend
from .symbolic import as_tensor, is_symbolic

RECORD_SIZE = 8  # numbers per row that the forward keeps for the backward: csrc/losses/record.h
TERM_SUMS = 5  # of a divergence: TermSums in divergence.h

LOSSES = () if backend._C is None else tuple(backend._C.loss_names())
_TARGET_TYPES = ("none", "logits", "log_probs", "probs")
_REDUCTIONS = ("none", "sum", "mean", "batchmean")
_N_ROWS = len(Rows._fields)
_N_INTS = Spec._fields.index("scale")  # the options before it are integers, the others are floats


# --- options ----------------------------------------------------------------------------------


def options(spec: Spec, stats: bool = False) -> tuple[Any, ...]:
    """Return the options of an op: those of the spec, with numbers for words."""
    return (
        LOSSES.index(spec.loss + "_stats" if stats else spec.loss),
        _TARGET_TYPES.index(spec.target_type),
        _REDUCTIONS.index(spec.reduction),
        *spec[3:-1],
    )


def spec_of(options: Sequence[Any]) -> Spec:
    """Return the spec that has these options; those that are left out have their defaults."""
    loss, target_type, reduction, *others = options
    spec = Spec(LOSSES[loss], _TARGET_TYPES[target_type], _REDUCTIONS[reduction], *others)
    return spec._replace(by_probability=bool(spec.by_probability))  # ``packed`` makes it a number


def symbolic_floats(spec: Spec) -> Tensor | None:
    """Return the float options in a tensor, if ``torch.compile`` knows one of them by name only."""
    floats: tuple[float, ...] = options(spec)[_N_INTS:]
    return as_tensor(floats) if is_symbolic(*floats) else None


def packed(
    spec: Spec, symbolic: Tensor | None = None
) -> tuple[list[int], list[float], Tensor | None]:
    """Pack the options for an op that is written in Python: integers and floats.

    The floats may be in a tensor, see ``symbolic_floats``.
    """
    values = options(spec)
    # Next to a symbol torch takes no bool for an integer.
    ints = [int(v) if isinstance(v, bool) else v for v in values[:_N_INTS]]
    return ints, list(values[_N_INTS:] if symbolic is None else ()), symbolic


def unpacked(ints: Sequence[int], floats: Sequence[float], symbolic: Tensor | None) -> Spec:
    """Return the spec that was packed."""
    return spec_of([*ints, *(floats if symbolic is None else symbolic.tolist())])


def stats_of(stats: Tensor, argmax: Tensor) -> Stats:
    """Return the statistics of rows from the two tensors that ops give them in."""
    lse, entropy, log_prob = stats.unbind(0)
    return Stats(lse, entropy, argmax, log_prob)


def value_shape(spec: Spec, rows: int, label: Tensor | None = None) -> tuple[int, ...]:
    """Return the shape of the value of so many rows; ``label`` has k columns for named classes."""
    if spec.loss in OF_CLASSES:
        assert label is not None
        rest = REST.get(spec.loss, "none")
        return rows, label.shape[1] + (0 if rest == "none" else 1)  # a bool is no number to sympy
    if spec.reduction != "none":
        return ()
    return (2, rows) if spec.loss == "log_prob_and_entropy" else (rows,)


def value_dtype_of(spec: Spec, x: Tensor) -> torch.dtype:
    """Return the dtype of the value: what top-k losses are computed from is float64."""
    return torch.float64 if spec.loss in REST else value_dtype(x.dtype)


# --- fakes: what torch.compile and torch.export need to know ----------------------------------


def fake_forward(
    x: Tensor, label: Tensor | None, options: Sequence[Any], stats: bool
) -> tuple[Tensor, ...]:
    """Make tensors like those of a forward."""
    rows, dtype, spec = x.shape[0], value_dtype(x.dtype), spec_of(options)
    value = x.new_empty(value_shape(spec, rows, label), dtype=value_dtype_of(spec, x))
    out = (value, x.new_empty((rows, RECORD_SIZE), dtype=dtype), x.new_empty((), dtype=dtype))
    if not stats:
        return out
    return (*out, x.new_empty((3, rows), dtype=dtype), x.new_empty(rows, dtype=torch.int64))


def fake_gradient(of: Tensor | None, x: Tensor, needed: bool) -> Tensor:
    """Make a tensor like a gradient, empty where none is needed."""
    of = x if of is None else of
    return of.new_empty(of.shape if needed else (0,))


# --- vmap: the batch is more rows -------------------------------------------------------------


def _fold(v: Any, dim: int | None, batch: int) -> Any:
    """Merge the batch dimension into the rows."""
    if v is None:
        return None
    v = v.unsqueeze(0).expand(batch, *v.shape) if dim is None else v.movedim(dim, 0)
    v = v.reshape(-1, *v.shape[2:])
    return v.contiguous() if v.dim() == 1 else v  # a batch of single rows may be a view with gaps


def _fold_rows(rows: tuple[Any, ...], dims: tuple[Any, ...], batch: int) -> Rows:
    """Merge the batch dimension into the rows."""
    given, dim_of = Rows(*rows), Rows(*dims)
    if dim_of.class_weight is not None:
        raise RuntimeError("vmap over class weights is not supported: give every call the same")
    folded = Rows(*(_fold(v, dim, batch) for v, dim in zip(rows, dims, strict=True)))
    return folded._replace(class_weight=given.class_weight)


def _unfold(v: Tensor, batch: int, dim: int = 0) -> Tensor:
    """Split ``dim``, counted from the front, and put the batch dimension first."""
    return v.unflatten(dim, (batch, v.shape[dim] // batch)).movedim(dim, 0)


def _rows_dim(spec: Spec, value: Tensor) -> int:
    """Return the dimension of the rows in a value of each row."""
    return 0 if spec.loss in OF_CLASSES else value.dim() - 1


def _vmap_forward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    return _vmap_any_forward(forward, info.batch_size, in_dims, args)


def _vmap_forward_stats(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    return _vmap_any_forward(forward_stats, info.batch_size, in_dims, args)


def _vmap_any_forward(
    op: Any, batch: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    rows = _fold_rows(args[:_N_ROWS], in_dims[:_N_ROWS], batch)
    spec = spec_of(args[_N_ROWS:])
    value, record, divisor, *stats = op(*rows, *options(spec._replace(reduction="none")))
    value, divisor = _unfold(value, batch, _rows_dim(spec, value)), divisor.new_ones(batch)
    if spec.reduction == "mean":
        x, _, _, label, class_weight, row_weight, _ = rows
        weights = reference.mean_weights(spec.ignore_index, x, label, class_weight, row_weight)
        divisor = _unfold(weights, batch).sum(-1)
    elif spec.reduction == "batchmean":
        divisor = divisor * spec.batch
    if spec.reduction != "none":
        value = value.sum(-1) / divisor
    found = (*(_unfold(s, batch, s.dim() - 1) for s in stats),)
    out = (value, _unfold(record, batch), divisor, *found)
    return out, (0,) * len(out)


def _vmap_backward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    batch = info.batch_size
    grad, rows, (record, divisor, *rest) = args[0], args[1 : 1 + _N_ROWS], args[1 + _N_ROWS :]
    of_grad, of_rows, (of_record, of_divisor) = (
        in_dims[0],
        in_dims[1 : 1 + _N_ROWS],
        in_dims[1 + _N_ROWS : 3 + _N_ROWS],
    )
    spec, needs = spec_of(rest[:-2]), rest[-2:]
    folded = _fold_rows(rows, of_rows, batch)
    grad = grad.expand(batch, *grad.shape) if of_grad is None else grad.movedim(of_grad, 0)
    if spec.reduction in ("mean", "batchmean"):
        grad = grad / (divisor if of_divisor is None else divisor.movedim(of_divisor, 0))
    if grad.dim() == 1:  # every row has the upstream gradient of the reduced value
        grad = grad.unsqueeze(-1).expand(batch, folded.x.shape[0] // batch)
    if spec.loss in OF_CLASSES:
        grad = grad.flatten(0, 1)
    else:
        grad = grad.movedim(0, -2).flatten(-2)
    out = backward(
        grad.contiguous(),
        *folded,
        _fold(record, of_record, batch).contiguous(),
        record.new_ones(()),
        *options(spec._replace(reduction="none")),
        *needs,
    )
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
    _AFTER_X = _N_ROWS - 1
    _LABEL = Rows._fields.index("label") - 1
    _register("fastdiv::_row_forward")(
        lambda x, *a: fake_forward(x, a[_LABEL], a[_AFTER_X:], False)
    )
    _register("fastdiv::_row_forward_stats")(
        lambda x, *a: fake_forward(x, a[_LABEL], a[_AFTER_X:], True)
    )
    _register("fastdiv::_row_backward")(
        lambda grad, x, t, *a: (fake_gradient(x, x, a[-2]), fake_gradient(t, x, a[-1]))
    )
    _register("fastdiv::_row_backward_")(lambda grad, x, t, *a: fake_gradient(t, x, a[-1]))
    _register("fastdiv::_row_forward_grad")(
        lambda grad, x, t, *a: (
            fake_forward(x, a[_LABEL - 1], a[_AFTER_X - 1 : -1], False)[0],
            fake_gradient(t, x, a[-1]),
        )
    )
    _register("fastdiv::_row_terms")(lambda x, *a: a[_AFTER_X].new_empty((x.shape[0], TERM_SUMS)))
    torch.library.register_vmap("fastdiv::_row_forward", _vmap_forward)
    torch.library.register_vmap("fastdiv::_row_forward_stats", _vmap_forward_stats)
    torch.library.register_vmap("fastdiv::_row_backward", _vmap_backward)
