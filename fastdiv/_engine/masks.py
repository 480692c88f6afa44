"""Masks of classes, and indices that name classes, as matrices with the rows of the logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference.topk import PADDING
from . import arguments
from .arguments import row_count, row_shape, same_device
from .backend import use_kernel
from .symbolic import is_true, same_shape

INDICES = (torch.int64, torch.int32, torch.int16, torch.uint8)


def mask_rows(x: Tensor, dim: int, mask: Tensor | None) -> Tensor | None:
    """Return a mask of classes as a matrix of bools, or of bytes if it is packed into bits.

    One row for all rows of x is not copied.
    """
    if mask is None:
        return None
    arguments.check_tensor(mask, "class_mask")
    same_device(x, mask, "class_mask")
    classes, bits = x.shape[dim], mask.dtype is torch.uint8
    if not bits and mask.dtype is not torch.bool:
        raise TypeError(
            "class_mask must be bool, or uint8 with the bits of eight classes in a byte, got "
            f"{mask.dtype}: pass class_mask.bool()"
        )
    if bits and dim != x.dim() - 1:
        raise ValueError(
            "class_mask of bits needs the classes on the last dimension, got "
            f"dim {dim} of input of shape {tuple(x.shape)}: pass a bool mask"
        )
    columns = (classes + 7) // 8 if bits else classes
    shape = (*x.shape[:dim], columns, *x.shape[dim + 1 :])
    given = mask.reshape(-1, *[1] * (len(shape) - 1 - dim)) if mask.dim() == 1 else mask
    fits = _fits(given.shape, shape) and (not bits or is_true(given.shape[-1] == columns))
    if not fits:
        wanted = f"({columns},) for bits of {classes} classes" if bits else f"({classes},)"
        raise ValueError(
            f"class_mask must be broadcastable to {shape}, or have shape {wanted}, for an input of "
            f"shape {tuple(x.shape)}, got {tuple(mask.shape)}"
        )
    given = given.reshape(*[1] * (len(shape) - given.dim()), *given.shape)
    if all(is_true(n == 1) for n in row_shape(given, dim)):
        row = given.reshape(1, -1)
        row = row if is_true(row.shape[1] == columns) else row.expand(1, columns)
        return row.contiguous().expand(row_count(x, dim), columns)
    if not all(is_true(n == m) for n, m in zip(given.shape, shape, strict=True)):
        given = given.expand(shape)
    return arguments.as_rows(given, dim)


def _fits(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Return whether a shape can be broadcast to another."""
    if len(shape) > len(to):
        return False
    pairs = zip(shape, to[len(to) - len(shape) :], strict=True)
    return all(is_true(n == 1) or same_shape((n,), (m,)) for n, m in pairs)


def check_integers(index: Tensor, name: str) -> None:
    """Raise TypeError unless a tensor has a dtype of class indices."""
    arguments.check_tensor(index, name)
    if index.dtype not in INDICES:
        raise TypeError(
            f"{name} must hold int64, int32, int16 or uint8 class indices, got {index.dtype}"
        )


def index_rows(x: Tensor, dim: int, index: Tensor, several: bool) -> Tensor:
    """Return indices of classes, k in each row and on the last dimension, as a matrix.

    Without ``several``, that dimension is 1, and no message mentions it.  -1 is padding.  The CPU
    kernels check the range.  Elsewhere an index out of range makes its row NaN, or raises with
    ``FASTDIV_CHECK=1``.
    """
    check_integers(index, "index")
    if index.dim() != x.dim() or not same_shape(index.shape[:-1], row_shape(x, dim)):
        given = tuple(index.shape if several else index.shape[:-1])
        raise ValueError(
            f"index must have the shape of input without its class dimension {dim}, "
            f"{row_shape(x, dim)}, or a last dimension of k classes more, got {given}"
        )
    same_device(x, index, "index")
    if index.dim() != 2:
        index = index.reshape(row_count(x, dim), index.shape[-1])
    if index.stride(1) != 1 and index.shape[1] != 1:
        index = index.contiguous()
    checked_by_kernel = x.is_cpu and use_kernel(x)
    if not checked_by_kernel and arguments.values_may_be_read(index):
        check_range(index, x.shape[dim])
    return index


def check_range(index: Tensor, classes: int) -> None:
    """Raise IndexError for an index that is out of range."""
    wide = index.to(torch.int64)
    wrong = arguments.out_of_range(wide, classes) & (wide != PADDING)
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise IndexError(
            f"index has {int(wide[row, column])} in row {row}, out of range for {classes} classes "
            f"({PADDING} is padding)"
        )
