"""Checks of a call that are left out of later calls of the same kind.

They depend on types, shapes and options only, and take longer than the kernels do for a few rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import NoneType
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from .arguments import PLAIN
from .autograd import EagerCall, witness
from .backend import chosen
from .torch_private import is_jit_traced, is_transformed, unwrap_if_dead

F = TypeVar("F", bound=Callable[..., Any])

MOST_KINDS = 256  # that are remembered; after that, all are forgotten
CONSTANTS = {int, float, bool, str, NoneType}


class Plan(NamedTuple):
    """Says what the checks of a kind of call lead to."""

    call: EagerCall | None  # None: such calls need more than one call of an op
    places: Sequence[int | None] = ()  # which arguments are the rows; None for one left out


plans: dict[Hashable, Plan] = {}


def remember_checks(function: F) -> F:
    """Let a loss of rows call its op at once if it has checked a call of the same kind."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        kind = _kind_of(function, given, kwargs)
        plan = None if kind is None else plans.get(kind)
        if plan is not None and plan.call is not None:
            return plan.call.run(
                [None if i is None else unwrap_if_dead(given[i]) for i in plan.places]
            )
        if kind is None or plan is not None or _has_one_twice(given):
            return function(*args, **kwargs)
        value, plan = _observed(function, args, kwargs, given)
        if len(plans) >= MOST_KINDS:
            plans.clear()
        plans[kind] = plan
        return value

    return cast(F, call)


def _kind_of(
    function: Callable[..., Any], given: Sequence[Any], kwargs: Mapping[str, Any]
) -> Hashable | None:
    """Return all that the checks of a call depend on; None if they must be made.

    Types of constants are part of it, since ``1 == 1.0 == True``.
    """
    if torch.compiler.is_compiling() or is_jit_traced() or is_transformed():
        return None
    kind: list[Any] = [function, chosen(), *kwargs]
    for v in given:
        if type(v) in PLAIN:
            if not v.is_cpu or v.layout is not torch.strided or v.is_nested:
                return None
            if not v.is_contiguous() or v.is_inference():
                return None
            kind += v.dtype, v.shape, v.requires_grad
        elif type(v) in CONSTANTS:
            kind += type(v), v
        else:
            return None
    return tuple(kind)


def _has_one_twice(given: Sequence[Any]) -> bool:
    """Return whether one tensor is two arguments, so that its place does not follow from it."""
    tensors = [id(v) for v in given if isinstance(v, Tensor)]
    return len(set(tensors)) < len(tensors)


def _observed(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], given: list[Any]
) -> tuple[Any, Plan]:
    """Call the function with its checks; return its value, and the plan for calls of this kind."""
    witness.asked = True
    try:
        value = function(*args, **kwargs)
        seen = witness.seen
    finally:
        witness.asked, witness.seen = False, None
    if seen is None or seen.value is not value or seen.call.spec.inplace:
        return value, Plan(None)
    place = {id(v): i for i, v in enumerate(given) if v is not None}
    if any(v is not None and id(v) not in place for v in seen.rows):
        return value, Plan(None)
    rows = {id(v) for v in seen.rows}
    if any(isinstance(v, Tensor) and id(v) not in rows for v in given):
        return value, Plan(None)  # an option, of which a kind knows no number
    return value, Plan(seen.call, [place.get(id(v)) for v in seen.rows])
