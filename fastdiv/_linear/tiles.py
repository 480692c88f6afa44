"""One tile of a linear layer's logits, and the gradients of input, weight and bias."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .._engine.torch_private import multiplies, onednn_linear
from ..reference import value_dtype
from .dtypes import bytes_of_logit, widens

RowRange = slice | Tensor  # a range of rows, or the indices of some

CONVERTED = 256  # classes whose weights are converted at a time
# Classes whose gradients of float32 logits are rounded at a time, by whether it is on a CPU.
NARROWED = {True: 2048, False: 1 << 14}
ROUNDED = 512  # classes whose gradients are held in half precision at a time, before their sum


# --- matrix products --------------------------------------------------------------------------


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``x @ weight.T + bias``."""
    if x.is_cpu and x.dtype == torch.float32 and onednn_linear is not None and x.numel():
        return onednn_linear(x, weight, bias, "none", [], "")
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of products: float32 if the CPU cannot multiply in half precision."""
    if x.is_cpu and x.dtype in (torch.bfloat16, torch.float16) and not multiplies(x.dtype):
        return torch.float32
    return x.dtype


def rounds_products(x: Tensor) -> bool:
    """Return whether products of such a tensor are rounded to half precision."""
    return x.is_cpu and product_dtype(x).itemsize == 2


# --- logits and their gradients, tile by tile -------------------------------------------------


class TiledLogits:
    """Logits that are computed tile by tile from a linear layer or, without a weight, are given.

    The logits have ``dtype``.  The products that give the gradients have ``of_products``.
    """

    def __init__(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        logits_dtype: torch.dtype | None = None,
    ) -> None:
        self.input, self.weight, self.bias = input, weight, bias
        self.bytes_of_logit = bytes_of_logit(input, logits_dtype)
        self.dtype = self.of_products = product_dtype(input)
        if weight is not None and widens(input, logits_dtype):
            assert logits_dtype is not None
            self.dtype = logits_dtype
        self.converts = input.is_cpu and self.dtype != input.dtype

    def tile(self, rows: RowRange, classes: slice, dtype: torch.dtype) -> Tensor:
        """Compute the logits of some rows and classes; given logits are a view."""
        if self.weight is None:
            return self.input[rows][:, classes].to(dtype)
        x = self.input[rows]
        bias = None if self.bias is None else self.bias[classes].to(self.dtype)
        if self.dtype == x.dtype:
            return multiply(x, self.weight[classes], bias).to(dtype)
        if self.converts:
            x = x.to(self.dtype)
            tile = x.new_empty(x.shape[0], classes.stop - classes.start)
            for block in ranges(classes, CONVERTED):
                weight = self.weight[block].to(self.dtype)
                torch.mm(x, weight.t(), out=tile[:, within(block, classes)])
        else:
            tile = torch.mm(x, self.weight[classes].t(), out_dtype=self.dtype)
        return (tile if bias is None else tile.add_(bias)).to(dtype)

    def blocks(self, classes: slice) -> Iterator[slice]:
        """Split classes into blocks whose weights, or gradients, are converted at a time."""
        if self.of_products != self.input.dtype:
            return ranges(classes, CONVERTED)
        if self.dtype != self.of_products:
            return ranges(classes, NARROWED[self.input.is_cpu])
        return iter([classes])


class Gradients:
    """Gradients of input, weight and bias, where they are needed; sums are in float32.

    With ``as_sums`` the results are these sums, of all rows and classes, without a rounding.
    """

    def __init__(self, logits: TiledLogits, needed: Sequence[bool], as_sums: bool = False) -> None:
        self.logits = logits
        tensors = (logits.input, logits.weight, logits.bias)
        self.input, self.weight, self.bias = (
            v.new_zeros(v.shape, dtype=value_dtype(v.dtype) if as_sums else v.dtype)
            if need and v is not None
            else None
            for v, need in zip(tensors, needed, strict=True)
        )
        # The gradient of given logits is written tile by tile, without a sum.
        self.of_input = self.input if logits.weight is None else _sum_for(self.input)
        self.of_weight: Tensor | None = None
        self.of_bias: Tensor | None = None

    @property
    def bytes_beyond(self) -> int:
        """Return how many bytes the weight's gradient takes, if it is a sum in another dtype."""
        sum_, weight = self.weight, self.logits.weight
        if sum_ is None or weight is None or sum_.dtype == weight.dtype:
            return 0
        return sum_.nbytes

    def begin(self, classes: slice) -> None:
        """Prepare the sums for the first tile of these classes."""
        self.of_weight = _sum_for(None if self.weight is None else self.weight[classes])
        self.of_bias = _sum_for(None if self.bias is None else self.bias[classes])

    def end(self, classes: slice) -> None:
        """Store the sums after the last tile of these classes."""
        _store(self.of_weight, None if self.weight is None else self.weight[classes])
        _store(self.of_bias, None if self.bias is None else self.bias[classes])

    def add(self, d: Tensor, rows: RowRange, classes: slice) -> None:
        """Add to the gradients, from the gradient of a tile of logits."""
        logits = self.logits
        if logits.weight is None:
            if self.of_input is not None:
                self.of_input[rows, classes] = d.to(self.of_input.dtype)
            return
        if self.of_bias is not None:
            self.of_bias += d.sum(0, dtype=self.of_bias.dtype)
        dtype = logits.of_products
        x = logits.input[rows].to(dtype)
        for block in logits.blocks(classes):
            inside = within(block, classes)
            of_block = d[:, inside].to(dtype)
            if self.of_input is not None:
                weight = logits.weight[block].to(dtype)
                _add_product(self.of_input, rows, of_block, weight)
            if self.of_weight is not None:
                parts = ranges(inside, ROUNDED) if rounds_products(x) else [inside]
                for part in parts:
                    _add_product(self.of_weight, part, of_block[:, within(part, inside)].t(), x)

    def results(self) -> list[Tensor]:
        """Return the gradients of input, weight and bias, empty where they are not needed."""
        _store(self.of_input, self.input)
        empty = self.logits.input.new_empty
        return [empty(0) if g is None else g for g in (self.input, self.weight, self.bias)]


def _add_product(total: Tensor, rows: RowRange, a: Tensor, b: Tensor) -> None:
    """Add ``a @ b`` to ``total[rows]`` without rounding the product to half precision.

    A rounding for each tile would add up to as much error as the final one of the gradient.
    """
    if total.dtype == a.dtype:
        if isinstance(rows, slice):
            total[rows].addmm_(a, b)
        else:
            total[rows] += a @ b
    elif not rounds_products(a):
        if isinstance(rows, slice):
            sums = total[rows]
            torch.addmm(sums, a, b, out_dtype=total.dtype, out=sums)
        else:
            total[rows] += torch.mm(a, b, out_dtype=total.dtype)
    else:
        # A second product computes what rounding the first one lost.  Where the product is infinite
        # that is nothing.
        product = a @ b
        if a.dtype == torch.float16 and not product.isfinite().all():
            # The sum may still fit into float16, once it is scaled.
            total[rows] += a.to(total.dtype) @ b.to(total.dtype)
            return
        total[rows] += product
        total[rows] += product.addmm_(a, b, beta=-1).nan_to_num_(0, 0, 0)


def _sum_for(gradient: Tensor | None) -> Tensor | None:
    """Return zeros for the sum of a gradient, or the gradient itself if it is float32 or wider."""
    if gradient is None or gradient.dtype == value_dtype(gradient.dtype):
        return gradient
    return torch.zeros_like(gradient, dtype=value_dtype(gradient.dtype))


def _store(total: Tensor | None, gradient: Tensor | None) -> None:
    if gradient is not None and total is not None and total.dtype != gradient.dtype:
        gradient.copy_(total)


def ranges(whole: slice, most: int) -> Iterator[slice]:
    """Split a range into pieces of one size, except the last, so that memory is reused.

    The size is a multiple of 16 if possible: products of 79 rows take a tenth longer than of 80.
    """
    length = whole.stop - whole.start
    size = -(-length // -(-length // most)) if length else 1
    size = min(-(-size // 16) * 16, most)
    for begin in range(whole.start, whole.stop, size):
        yield slice(begin, min(begin + size, whole.stop))


def within(block: slice, outer: slice) -> slice:
    """Return a block relative to the beginning of ``outer``."""
    return slice(block.start - outer.start, block.stop - outer.start)
