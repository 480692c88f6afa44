"""Check of logits that their gradient may overwrite: nothing else may be in their memory.

Whether tensors share memory follows from their addresses, sizes and strides.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .arguments import values_exist
from .torch_private import viewed

MOST_TRIALS = 10_000  # per question; views of one tensor need fewer than a hundred

Step = tuple[int, int, int]  # a distance, and its smallest and largest multiple


def check_in_place(x: Tensor, **others: Tensor | None) -> None:
    """Check that the gradient may overwrite the logits; ``others`` are the other arguments.

    The backward reads all of them while it writes, so none may be in the memory of the logits.
    """
    if not x.requires_grad:
        return  # there is no gradient
    check_no_leaf(x)
    if not values_exist(x):  # compiled code, for example, uses a fresh gradient
        return
    leaf = _only_leaf(x)
    if leaf is not None and values_exist(leaf) and share_memory(x, leaf):
        raise _of_leaf(x, leaf)
    if shares_with_itself(x):
        raise ValueError(
            f"inplace_backward=True would write several gradients to one place: input of shape "
            f"{tuple(x.shape)} and strides {x.stride()} overlaps itself: pass its clone(), or use "
            "inplace_backward=False"
        )
    for name, other in others.items():
        if other is not None and values_exist(other) and share_memory(x, other):
            raise ValueError(
                f"inplace_backward=True would overwrite {name} of shape {tuple(other.shape)}, "
                f"which shares memory with input of shape {tuple(x.shape)} and which the backward "
                f"still needs: pass {name}.clone(), or use inplace_backward=False"
            )


def check_no_leaf(x: Tensor) -> None:
    """Check that the logits are neither a leaf of autograd's graph nor a view of one."""
    if not x.requires_grad:
        return
    if x.is_leaf:
        raise _of_leaf(x, x)
    if torch.compiler.is_compiling():
        return  # a fresh gradient
    base = viewed(x)
    if base is not None and base.is_leaf and base.requires_grad:
        raise _of_leaf(x, base)


def _only_leaf(x: Tensor) -> Tensor | None:
    """Return the leaf that x comes from by functions of one tensor, such as views; None if none.

    It finds views whose base is another tensor, and functions that return their argument.
    """
    node: Any = x.grad_fn
    while node is not None and type(node).__name__ != "AccumulateGrad":
        node = node.next_functions[0][0] if len(node.next_functions) == 1 else None
    return None if node is None else node.variable


def _of_leaf(x: Tensor, leaf: Tensor) -> ValueError:
    view = "" if leaf is x else f", of which input is a view of shape {tuple(x.shape)},"
    return ValueError(
        f"inplace_backward=True would overwrite a leaf tensor of shape {tuple(leaf.shape)}{view} "
        "with its own gradient; it is for logits that a model computed: use inplace_backward=False"
    )


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Return whether an element of one overlaps an element of the other.

    The answer is exact for views that torch makes.  For strides that would take too long to check,
    it is True.
    """
    if a.device != b.device or not a.numel() or not b.numel():
        return False
    distance = b.data_ptr() - a.data_ptr()
    if not -_extent(b) < distance < _extent(a):
        return False
    steps = [(stride, 0, size - 1) for stride, size in _strides(a)]
    steps += [(stride, 1 - size, 0) for stride, size in _strides(b)]
    steps.append((1, 1 - b.element_size(), a.element_size() - 1))
    return _reaches(distance, steps)


def shares_with_itself(a: Tensor) -> bool:
    """Return whether two of its elements overlap, as those of ``expand`` do."""
    if not a.numel():
        return False
    dims = _strides(a)
    if any(stride == 0 for stride, _ in dims):
        return True
    dims.sort()
    reach = a.element_size()
    for stride, size in dims:
        if stride < reach:  # a step is shorter than what it steps over
            break
        reach += stride * (size - 1)
    else:
        return False
    within: Step = (1, 1 - a.element_size(), a.element_size() - 1)
    for i, (stride, size) in enumerate(dims):  # two elements that differ in this dimension
        others = [(s, 1 - n, n - 1) for s, n in dims[:i] + dims[i + 1 :]]
        if _reaches(0, [(stride, 1, size - 1), *others, within]):
            return True
    return False


def _strides(a: Tensor) -> list[tuple[int, int]]:
    """Return stride in bytes and size of all dimensions with more than one element."""
    itemsize = a.element_size()
    return [(s * itemsize, n) for s, n in zip(a.stride(), a.shape, strict=True) if n > 1]


def _extent(a: Tensor) -> int:
    """Return the bytes from the beginning of the first element to the end of the last."""
    return a.element_size() + sum(stride * (size - 1) for stride, size in _strides(a))


def _reaches(distance: int, steps: Iterable[Step]) -> bool:
    """Return whether multiples of these steps, each within its bounds, add up to the distance."""
    merged: dict[int, tuple[int, int]] = {}
    for stride, least, most in steps:
        low, high = merged.get(stride, (0, 0))
        if stride:
            merged[stride] = (low + least, high + most)
    longest_first = [(s, *merged[s]) for s in sorted(merged, reverse=True)]
    # The bounds of what the steps from each one on can add.
    bounds = [(0, 0)]
    for stride, least, most in reversed(longest_first):
        low, high = bounds[-1]
        bounds.append((low + stride * least, high + stride * most))
    bounds.reverse()
    trials = 0
    open_ends = [(distance, 0)]
    while open_ends:
        rest, i = open_ends.pop()
        if i == len(longest_first):
            return True  # without a step the bounds are 0 and 0, so nothing is left
        trials += 1
        if trials > MOST_TRIALS:
            return True
        stride, least, most = longest_first[i]
        low, high = bounds[i + 1]
        first = max(least, -((high - rest) // stride))
        last = min(most, (rest - low) // stride)
        if last - first >= MOST_TRIALS:
            return True
        open_ends += [(rest - stride * n, i + 1) for n in range(first, last + 1)]
    return False
