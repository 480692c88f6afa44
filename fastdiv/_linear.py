"""Losses of a linear layer's logits, which are made a tile at a time and never held whole.

There are two ways to the gradients.  ``by_rows`` takes rows in chunks, all classes at once, and has
the gradient with the value: three matrix products, as many as autograd does of the whole.  But it
adds up the weight's gradient over the chunks, for a weight of half precision in float32, which is
often more than the logits; and it must know what comes from upstream.  ``by_classes`` makes the
logits a second time in the backward, a block of classes at a time: four products, but nothing is
kept in between, and a block's gradient is complete when the block is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _check, _ops, reference
from .reference import value_dtype

Rows = slice | Tensor  # a range of rows, or the indices of some

SHARE = 12  # tiles take at most this part of the input's logits,
LARGEST = {"cpu": 1 << 26, "cuda": 1 << 29}  # and no more bytes, however many rows there are,
FEWEST_ROWS = {"cpu": 16, "cuda": 256}  # but are this large, or products would take much longer
FEWEST_CLASSES = {"cpu": 256, "cuda": 2048}
ROWS_OF_BLOCK = {"cpu": 512, "cuda": 1 << 14}
CONVERTED = 256  # classes whose weights are converted at a time


# --- matrix products --------------------------------------------------------------------------

# oneDNN takes a fifth less time than BLAS for few rows and many classes.  torch calls it for lower
# precisions only; this operation, which is there for its compiler, always does.  It adds up one
# product after the other, which for sums over the classes is less accurate than what BLAS does.
_ONEDNN: Any = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available()
    else None
)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``."""
    if x.is_cpu and x.dtype == torch.float32 and _ONEDNN is not None and x.numel():
        return _ONEDNN(x, weight, bias, "none", [], "")
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def product_dtype(x: Tensor) -> torch.dtype:
    """What tiles are multiplied in: float32 where the processor has no products of halves."""
    if x.is_cpu and x.dtype in (torch.bfloat16, torch.float16) and not _multiplies(x.dtype):
        return torch.float32
    return x.dtype


def _multiplies(half: torch.dtype) -> bool:
    if half == torch.float16:
        return bool(torch.cpu._is_amx_fp16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported())


# --- logits and their gradients, tile by tile -------------------------------------------------


class Head:
    """Rows of classes: the logits of a linear layer or, without a weight, given as they are."""

    def __init__(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
        self.input, self.weight, self.bias = input, weight, bias
        self.dtype = product_dtype(input)
        self.converts = self.dtype != input.dtype

    def tile(self, rows: Rows, classes: slice, dtype: torch.dtype) -> Tensor:
        """Rows of some classes; where there is a weight, in memory of their own."""
        if self.weight is None:
            return self.input[rows][:, classes].to(dtype)
        x = self.input[rows].to(self.dtype)
        bias = None if self.bias is None else self.bias[classes].to(self.dtype)
        if not self.converts:
            return multiply(x, self.weight[classes], bias).to(dtype)
        tile = x.new_empty(x.shape[0], classes.stop - classes.start)
        for block in self.blocks(classes):
            weight = self.weight[block].to(self.dtype)
            torch.mm(x, weight.t(), out=tile[:, within(block, classes)])
        return (tile if bias is None else tile.add_(bias)).to(dtype)

    def blocks(self, classes: slice) -> Iterator[slice]:
        """These classes, in pieces whose weights may be converted."""
        return ranges(classes, CONVERTED) if self.converts else iter([classes])


class Gradients:
    """Gradients of a head's three tensors, of those that need one; sums are in float32."""

    def __init__(self, head: Head, needed: Sequence[bool]) -> None:
        self.head = head
        tensors = (head.input, head.weight, head.bias)
        self.input, self.weight, self.bias = (
            v.new_zeros(v.shape) if need and v is not None else None
            for v, need in zip(tensors, needed, strict=True)
        )
        # Logits that are given get their gradient tile by tile, and sum nothing.
        self.of_input = self.input if head.weight is None else _sum_for(self.input)
        self.of_weight: Tensor | None = None
        self.of_bias: Tensor | None = None

    def begin(self, classes: slice) -> None:
        """Before the first tile of these classes."""
        self.of_weight = _sum_for(None if self.weight is None else self.weight[classes])
        self.of_bias = _sum_for(None if self.bias is None else self.bias[classes])

    def end(self, classes: slice) -> None:
        """After the last one."""
        _store(self.of_weight, None if self.weight is None else self.weight[classes])
        _store(self.of_bias, None if self.bias is None else self.bias[classes])

    def add(self, d: Tensor, rows: Rows, classes: slice) -> None:
        """Adds what the gradient of a tile of logits comes to."""
        head = self.head
        if head.weight is None:
            if self.of_input is not None:
                self.of_input[rows, classes] = d.to(self.of_input.dtype)
            return
        if self.of_bias is not None:
            self.of_bias += d.sum(0, dtype=self.of_bias.dtype)
        d, x = d.to(head.dtype), head.input[rows].to(head.dtype)
        for block in head.blocks(classes):
            inside = within(block, classes)
            if self.of_input is not None:
                self.of_input[rows] += d[:, inside] @ head.weight[block].to(head.dtype)
            if self.of_weight is None:
                continue
            if self.of_weight.dtype == head.dtype:
                self.of_weight[inside].addmm_(d[:, inside].t(), x)
            else:
                self.of_weight[inside] += d[:, inside].t() @ x

    def results(self) -> list[Tensor]:
        """One tensor for each of the head's; empty where no gradient is needed."""
        _store(self.of_input, self.input)
        empty = self.head.input.new_empty
        return [empty(0) if g is None else g for g in (self.input, self.weight, self.bias)]


def _sum_for(gradient: Tensor | None) -> Tensor | None:
    """Zeros to add up a gradient in; itself where its dtype will do."""
    if gradient is None or gradient.dtype == value_dtype(gradient.dtype):
        return gradient
    return torch.zeros_like(gradient, dtype=value_dtype(gradient.dtype))


def _store(total: Tensor | None, gradient: Tensor | None) -> None:
    if gradient is not None and total is not None and total.dtype != gradient.dtype:
        gradient.copy_(total)


def ranges(whole: slice, most: int) -> Iterator[slice]:
    """Pieces of at most so many, of one size but for the last: memory of one fits the next."""
    length = whole.stop - whole.start
    size = -(-length // -(-length // most)) if length else 1
    for begin in range(whole.start, whole.stop, size):
        yield slice(begin, min(begin + size, whole.stop))


def within(block: slice, outer: slice) -> slice:
    """A block, counted from where ``outer`` begins."""
    return slice(block.start - outer.start, block.stop - outer.start)


# --- the loss ---------------------------------------------------------------------------------


@dataclass
class Problem:
    """A loss with all of its tensors."""

    student: Head
    teacher: Head | None
    label: Tensor | None
    class_weight: Tensor | None
    row_weight: Tensor | None
    options: list[Any]  # of the row ops
    chunk_size: int  # rows; 0: by the rule

    def __post_init__(self) -> None:
        x = self.student
        assert x.weight is not None
        self.rows, self.classes, self.hidden = len(x.input), len(x.weight), x.input.shape[1]
        self.device = "cpu" if x.input.is_cpu else "cuda"
        self.dtype = x.dtype
        if self.teacher is not None:
            self.dtype = torch.promote_types(x.dtype, self.teacher.dtype)
        # All that says whether a row counts in one place: tiles have labels counted from where
        # they begin, and one of those may happen to be the ignored one.
        ignored = self.options[_ops.IGNORE_INDEX]
        weight = reference.row_weights(ignored, x.input, self.label, self.row_weight)
        self.weight = weight.to(value_dtype(self.dtype))
        if self.label is not None:
            self.label = torch.where(self.weight == 0, 0, self.label)
        self.options[_ops.IGNORE_INDEX] = _check.NO_LABEL_IGNORED

    def budget(self) -> int:
        """Bytes that tiles of the input's logits may take."""
        logits = self.rows * self.classes * self.student.input.element_size()
        return min(logits // SHARE, LARGEST[self.device])

    def rows_of_chunk(self, with_gradients: bool) -> int:
        """How many rows ``by_rows`` takes at a time."""
        if self.chunk_size:
            return self.chunk_size
        converted = 8 * CONVERTED * self.hidden if self.student.converts else 0
        # A forward alone leaves room for what its backward adds to memory that is not given back.
        budget = self.budget() if with_gradients else self.budget() // 2
        rows = (budget - converted) // (self.classes * self.dtype.itemsize)
        return max(rows, FEWEST_ROWS[self.device])

    def tile_of_block(self) -> tuple[int, int]:
        """How many rows and classes ``by_classes`` takes at a time."""
        rows = max(1, min(self.rows, ROWS_OF_BLOCK[self.device]))
        if self.chunk_size:
            return rows, max(1, self.chunk_size * self.classes // rows)
        of_input = 4 * self.hidden * (rows + self.rows)  # a tile's rows, and their gradient's sum
        of_class = self.dtype.itemsize * rows + 8 * self.hidden  # logits; a weight, its gradient's
        classes = (self.budget() // 2 - of_input) // of_class
        return rows, max(classes, FEWEST_CLASSES[self.device])

    def pieces(self, most: int, every: bool = False) -> list[Rows]:
        """The rows; on a CPU, where it costs nothing to look, those that count."""
        if self.device == "cpu" and not every:
            counting = self.weight.nonzero().squeeze(1)
            if len(counting) < self.rows:
                return [counting[piece] for piece in ranges(slice(0, len(counting)), most)]
        return list(ranges(slice(0, self.rows), most))

    def tiles(self, rows: Rows, classes: slice) -> tuple[Any, ...]:
        """What the row ops take before their options."""
        return (
            self.student.tile(rows, classes, self.dtype),
            None if self.teacher is None else self.teacher.tile(rows, classes, self.dtype),
            None if self.label is None else self.label[rows] - classes.start,
            None if self.class_weight is None else self.class_weight[classes],
            self.weight[rows],
        )


@dataclass
class Results:
    """What comes of the rows."""

    value: Tensor
    record: Tensor
    stats: Tensor
    argmax: Tensor


def by_rows(
    p: Problem, loss_with_stats: int, grad: Tensor | None, gradients: list[Gradients]
) -> Results:
    """Values of the rows and, if asked for, statistics; adds to gradients for an upstream one."""
    stats = loss_with_stats >= 0
    out = Results(
        p.weight.new_zeros(_ops.value_shape(p.options, p.rows)),
        p.weight.new_zeros(0 if gradients else p.rows, _ops.RECORD_SIZE),
        p.weight.new_zeros(3, p.rows if stats else 0),
        torch.zeros_like(p.weight[: p.rows if stats else 0], dtype=torch.int64),
    )
    whole = slice(0, p.classes)
    options = [loss_with_stats, *p.options[1:]] if stats else p.options

    def chunk(rows: Rows) -> None:  # a function, so that nothing of a chunk outlives it
        tiles = p.tiles(rows, whole)
        dt = None
        if grad is not None and not stats:
            upstream = grad[..., rows].contiguous()
            out.value[..., rows], dt = _ops.forward_grad(
                upstream, *tiles, *p.options, len(gradients) > 1
            )
        else:
            op = _ops.forward_stats if stats else _ops.forward
            value, record, total, *of_rows = op(*tiles, *options)
            out.value[..., rows] = value
            if stats:
                out.stats[:, rows], out.argmax[rows] = of_rows
            if grad is None:
                out.record[rows] = record
            else:
                upstream = grad[..., rows].contiguous()
                dt = _ops.backward_in_place(
                    upstream, *tiles, record, total, *p.options, len(gradients) > 1
                )
        for g, d in zip(gradients, (tiles[0], dt), strict=False):
            g.add(d, rows, whole)

    for g in gradients:
        g.begin(whole)
    for rows in p.pieces(p.rows_of_chunk(bool(gradients)), every=stats):
        chunk(rows)
    for g in gradients:
        g.end(whole)
    return out


def by_classes(p: Problem, grad: Tensor, record: Tensor, gradients: list[Gradients]) -> None:
    """Adds to gradients, for one from upstream for every row, from the forward's records."""
    most_rows, most_classes = p.tile_of_block()
    pieces = p.pieces(most_rows)
    one = p.weight.new_ones(())

    def tile(rows: Rows, classes: slice) -> None:
        tiles = p.tiles(rows, classes)
        upstream = grad[..., rows].contiguous()
        dt = _ops.backward_in_place(
            upstream, *tiles, record[rows], one, *p.options, len(gradients) > 1
        )
        for g, d in zip(gradients, (tiles[0], dt), strict=False):
            g.add(d, rows, classes)

    for classes in ranges(slice(0, p.classes), most_classes):
        for g in gradients:
            g.begin(classes)
        for rows in pieces:
            tile(rows, classes)
        for g in gradients:
            g.end(classes)
