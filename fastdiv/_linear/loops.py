"""The loops of the linear losses, which compute the logits tile by tile and never hold all.

There are two ways to compute the gradients.

``by_rows`` takes chunks of rows, with all classes at once.  Given the upstream gradient, it
computes value and gradients in three matrix products, as many as autograd takes.  It sums the
weight's gradient over the chunks (``accumulate="weight"``).  For a weight in half precision that
sum is in float32, and often takes more memory than the logits.  Without the upstream gradient, it
computes values, and the records that ``by_classes`` needs.

``by_classes`` computes the logits a second time in the backward, one block of classes at a time.
It takes four matrix products.  The weight's gradient of a block is complete when the loop leaves
the block, and the gradient of the rows is summed over the blocks (``accumulate="rows"``).

``LinearCall`` in ``autograd.py`` chooses between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._engine import arguments, ops
from .._engine.temperature import scale_gradient
from ..reference import OF_CLASSES, Rows, Spec, value_dtype
from ..reference.masks import unpacked
from ..reference.topk import are_classes
from .tiles import CONVERTED, Gradients, RowRange, TiledLogits, ranges

# Unless chunk_size is given, a tile takes at most 1 / MIN_TILES of the memory of all logits, and at
# most MAX_TILE_BYTES.
MIN_TILES = 12
MAX_TILE_BYTES = {"cpu": 1 << 26, "cuda": 1 << 29}
# These override the limits, because products of fewer rows or classes take much longer per logit.
MIN_ROWS = 256
MIN_CLASSES = {"cpu": 512, "cuda": 2048}
MAX_ROWS_OF_BLOCK = {"cpu": 512, "cuda": 1 << 14}
# Each chunk of rows reads and writes the float32 sum of the weight's gradient.  On a GPU this takes
# longer than the product of fewer than some 900 rows.
MIN_ROWS_OF_SUM = {"cpu": MIN_ROWS, "cuda": 2048}


def budget_of(rows: int, classes: int, itemsize: int, device: str) -> int:
    """Return how many bytes a tile of such logits may take."""
    return min(rows * classes * itemsize // MIN_TILES, MAX_TILE_BYTES[device])


def device_of(x: Tensor) -> str:
    """Return for which device the sizes of tiles are chosen."""
    return "cpu" if x.is_cpu else "cuda"


@dataclass
class Problem:
    """A linear loss with all of its tensors, and how large its tiles are."""

    student: TiledLogits
    teacher: TiledLogits | None
    scale: Tensor | None  # of the rows
    label: Tensor | None
    class_weight: Tensor | None
    row_weight: Tensor | None
    mask: Tensor | None
    spec: Spec
    chunk_size: int  # rows whose logits are held at a time; 0 chooses by ``budget``

    def __post_init__(self) -> None:
        x = self.student
        assert x.weight is not None
        self.rows, self.classes, self.hidden = len(x.input), len(x.weight), x.input.shape[1]
        self.device = device_of(x.input)
        self.dtype = x.dtype
        if self.teacher is not None:
            self.dtype = torch.promote_types(x.dtype, self.teacher.dtype)
        # The weights alone say which rows are ignored.  Labels of a tile are relative to its first
        # class, so one of them could equal ignore_index.
        ignored = self.spec.ignore_index
        weight = reference.row_weights(ignored, x.input, self.label, self.row_weight)
        self.names_classes = self.spec.loss in OF_CLASSES
        if self.names_classes:
            assert self.label is not None
            weight = torch.where(are_classes(self.label).any(-1), weight, 0.0)
        self.weight = weight.to(value_dtype(self.dtype))
        if self.label is not None and not self.names_classes:
            self.label = torch.where(self.weight == 0, 0, self.label)
        self.spec = self.spec._replace(reduction="none", ignore_index=arguments.NO_LABEL_IGNORED)
        self.options = ops.options(self.spec)

    def budget(self) -> int:
        """Return how many bytes a tile of the student's logits may take."""
        return budget_of(self.rows, self.classes, self.student.bytes_of_logit, self.device)

    def rows_of_chunk(self, gradients: Sequence[Gradients] = ()) -> int:
        """Return how many rows ``by_rows`` takes at a time."""
        if self.chunk_size:
            return self.chunk_size
        converted = 8 * CONVERTED * self.hidden if self.student.converts else 0
        # glibc keeps freed memory, so a forward alone leaves room for its backward.
        budget = self.budget() if gradients else self.budget() // 2
        least, beyond = MIN_ROWS, sum(g.bytes_beyond for g in gradients)
        if beyond <= budget // 2:
            budget -= beyond
        else:
            least = MIN_ROWS_OF_SUM[self.device]
        return max((budget - converted) // (self.classes * self.dtype.itemsize), least)

    def unit(self) -> Tensor:
        """Return a power of two that leaves float16 the most digits, as an upstream gradient.

        A row's gradient is at most its weights over the temperature, or some times that.  This
        number makes it at most 256, of the 65504 that float16 holds.
        """
        if not self.rows:
            return self.weight.new_ones(())
        largest = self.spec.scale * _largest(self.weight)
        if self.scale is not None:
            largest = largest * _largest(self.scale)
        if self.class_weight is not None:
            largest = largest * _largest(self.class_weight)
        return torch.exp2((8 - largest.log2().ceil()).clamp(-100, 100))

    def tile_of_block(self) -> tuple[int, int]:
        """Return how many rows and classes ``by_classes`` takes at a time."""
        itemsize, budget = self.dtype.itemsize, self.budget() // 2
        rows = self.rows // 4
        if self.device == "cpu":
            # The forward has held as many bytes for MIN_ROWS rows of all classes.
            rows, budget = self.rows, max(budget, MIN_ROWS * self.classes * itemsize)
        rows = min(max(rows, 1), MAX_ROWS_OF_BLOCK[self.device])
        if self.chunk_size:
            return rows, max(1, self.chunk_size * self.classes // rows)
        # The input takes the rows of a tile, and the sum of the gradients of all rows.
        of_input = 4 * self.hidden * (rows + self.rows)
        # A class takes its logits, a row of the weight and that row's gradient.
        of_class = itemsize * rows + 8 * self.hidden
        return rows, max((budget - of_input) // of_class, MIN_CLASSES[self.device])

    def pieces(self, most: int, every: bool = False) -> list[RowRange]:
        """Return ranges of at most so many rows.  A CPU skips ignored rows unless ``every``."""
        if self.device == "cpu" and not every:
            counting = self.weight.nonzero().squeeze(1)
            if len(counting) < self.rows:
                return [counting[piece] for piece in ranges(slice(0, len(counting)), most)]
        return list(ranges(slice(0, self.rows), most))

    def tiles(self, rows: RowRange, classes: slice) -> Rows:
        """Compute a tile; return the tensors that the row ops take before their options."""
        label = None if self.label is None else self.label[rows]
        if label is not None and not self.names_classes:
            label = label - classes.start
        return Rows(
            self.student.tile(rows, classes, self.dtype),
            None if self.teacher is None else self.teacher.tile(rows, classes, self.dtype),
            None if self.scale is None else self.scale[rows],
            label,
            None if self.class_weight is None else self.class_weight[classes],
            self.weight[rows],
            None if self.mask is None else self._mask_of(rows, classes),
        )

    def _mask_of(self, rows: RowRange, classes: slice) -> Tensor:
        """Return the mask of a tile; bits are unpacked only if the block begins within a byte."""
        assert self.mask is not None
        if self.mask.dtype is torch.bool:
            return self.mask[:, classes][rows]
        first = classes.start // 8
        bits = self.mask[:, first : -(-classes.stop // 8)][rows]
        if classes.start % 8 == 0:
            return bits
        return unpacked(bits, classes.stop - 8 * first)[:, classes.start - 8 * first :]

    def options_of(self, classes: slice) -> tuple[Any, ...]:
        """Return the options of the row ops for a tile of these classes."""
        if not self.names_classes:
            return self.options
        return ops.options(self.spec._replace(first_class=classes.start))

    def of_rows(self, values: Tensor, rows: RowRange) -> Tensor:
        """Return what values, or their upstream gradients, have of some rows."""
        return values[rows] if self.names_classes else values[..., rows]

    def put(self, to: Tensor, rows: RowRange, values: Tensor) -> None:
        """Write the values of some rows."""
        if self.names_classes:
            to[rows] = values
        else:
            to[..., rows] = values


def _largest(weight: Tensor) -> Tensor:
    return weight.abs().nan_to_num(0, 0, 0).amax()


@dataclass
class Results:
    """The results of ``by_rows``, per row."""

    value: Tensor
    record: Tensor
    stats: Tensor
    argmax: Tensor


Look = Callable[[RowRange, Rows, Tensor, Tensor], None]  # rows, tiles, values, records


def by_rows(
    p: Problem,
    stats: bool,
    grad: Tensor | None,
    gradients: list[Gradients],
    look: Look | None = None,
    d_scale: Tensor | None = None,
) -> Results:
    """Compute values and, if asked for, statistics of the rows, and add to the gradients.

    Without an upstream gradient, ``look`` is called for every chunk while its logits are held.
    ``d_scale`` gets the gradient of the scales.
    """
    both = len(gradients) > 1
    out = Results(
        p.weight.new_zeros(
            ops.value_shape(p.spec, p.rows, p.label), dtype=ops.value_dtype_of(p.spec, p.weight)
        ),
        p.weight.new_zeros(0 if gradients else p.rows, ops.RECORD_SIZE),
        p.weight.new_zeros(3, p.rows if stats else 0),
        torch.zeros_like(p.weight[: p.rows if stats else 0], dtype=torch.int64),
    )
    whole = slice(0, p.classes)
    options = ops.options(p.spec, stats)

    def chunk(rows: RowRange) -> None:  # a function frees the tensors of a chunk at its end
        tiles = p.tiles(rows, whole)
        upstream = None if grad is None else p.of_rows(grad, rows).contiguous()
        if upstream is not None and not stats and d_scale is None:
            value, dt = ops.forward_grad(upstream, *tiles, *p.options, both)
            p.put(out.value, rows, value)
        else:
            op = ops.forward_stats if stats else ops.forward
            value, record, divisor, *of_rows = op(*tiles, *options)
            p.put(out.value, rows, value)
            if stats:
                out.stats[:, rows], out.argmax[rows] = of_rows
            if upstream is None:
                out.record[rows] = record
                if look is not None:
                    look(rows, tiles, value, record)
                return
            if d_scale is not None:
                d_scale[rows] = scale_gradient(p.spec, upstream, *tiles, record, divisor)
            dt = ops.backward_in_place(upstream, *tiles, record, divisor, *p.options, both)
        for g, d in zip(gradients, (tiles[0], dt), strict=False):
            g.add(d, rows, whole)

    for g in gradients:
        g.begin(whole)
    for rows in p.pieces(p.rows_of_chunk(gradients), every=stats):
        chunk(rows)
    for g in gradients:
        g.end(whole)
    return out


def by_classes(
    p: Problem,
    grad: Tensor,
    record: Tensor,
    gradients: list[Gradients],
    d_scale: Tensor | None = None,
) -> None:
    """Add to the gradients, from an upstream gradient and the forward's record of every row."""
    most_rows, most_classes = p.tile_of_block()
    pieces, both = p.pieces(most_rows), len(gradients) > 1
    one = p.weight.new_ones(())

    def tile(rows: RowRange, classes: slice) -> None:
        tiles, of_rows = p.tiles(rows, classes), record[rows]
        upstream, options = p.of_rows(grad, rows).contiguous(), p.options_of(classes)
        if d_scale is not None:
            spec = p.spec._replace(first_class=classes.start)
            d_scale[rows] += scale_gradient(spec, upstream, *tiles, of_rows, one)
        dt = ops.backward_in_place(upstream, *tiles, of_rows, one, *options, both)
        for g, d in zip(gradients, (tiles[0], dt), strict=False):
            g.add(d, rows, classes)

    for classes in ranges(slice(0, p.classes), most_classes):
        for g in gradients:
            g.begin(classes)
        for rows in pieces:
            tile(rows, classes)
        for g in gradients:
            g.end(classes)
